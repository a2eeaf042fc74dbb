"""The in-memory cache: the recorded values of each U-Net call, whole or as an overlay of active rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Overlay:
    """Active rows ``[B, N, C]`` that replace rows ``index`` (int64 ``[1, N]``) of the base's slot."""

    rows: Tensor
    index: Tensor


@dataclass
class StepCache:
    """Recorded values of one call, by slot key; what is missing is looked up in ``base``.

    A dense recording has whole values and no base. A recorded edit holds only the rows it computed, over its base, so
    that a chain of edits costs memory in proportion to what changed.
    """

    values: dict[str, Tensor | Overlay] = field(default_factory=dict)
    base: StepCache | None = None

    def load(self, slot: str, index: Tensor | None = None) -> Tensor:
        """A slot's value, or rows ``index`` (int64 ``[1, H]``) of it.

        Raises:
            KeyError: the slot was not recorded.
        """
        value = self.values.get(slot)
        if value is None:
            if self.base is None:
                raise KeyError(slot)
            return self.base.load(slot, index)
        if isinstance(value, Overlay):
            assert self.base is not None
            value = self.base.load(slot).index_copy(1, value.index[0], value.rows)  # [B, R, C]
        return value if index is None else value.index_select(1, index[0])  # [B, H, C]

    @property
    def nbytes(self) -> int:
        """Bytes held by this step itself, without its base."""
        tensors = [v.rows if isinstance(v, Overlay) else v for v in self.values.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def slots(self) -> set[str]:
        return set(self.values) | (self.base.slots() if self.base is not None else set())


def shrink(values: dict[str, tuple[Tensor, Tensor | None]]) -> dict[str, Tensor | Overlay]:
    """Keep of whole recorded values only their active rows.

    Args:
        values: slot -> (whole value ``[B, R, C]``, active index ``[1, N]``), or (value, None) to keep it whole.
    """
    return {
        slot: value if index is None else Overlay(value.index_select(1, index[0]), index)
        for slot, (value, index) in values.items()
    }


def clone_detached(value: Tensor) -> Tensor:
    """A copy that later writes by the caller cannot reach."""
    return value.detach().clone(memory_format=torch.preserve_format)
