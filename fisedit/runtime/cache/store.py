"""The in-memory cache: the recorded values of each U-Net call, whole or as an overlay of active rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fisedit.runtime.kernels.gather_rows.reference import gather_rows
from fisedit.runtime.kernels.scatter_rows.reference import scatter_rows


@dataclass(frozen=True)
class Overlay:
    """Active rows ``[B, N, C]`` that replace rows ``index`` (int64 ``[M, N]``, padded with R) of the base's slot."""

    rows: Tensor
    index: Tensor


@dataclass
class StepCache:
    """Recorded values of one call of ``batch`` samples, by slot key; what is missing is looked up in ``base``.

    A dense recording has whole values and no base. A recorded edit holds only the rows it computed, over its base, so
    that a chain of edits costs memory in proportion to what changed.
    """

    batch: int
    values: dict[str, Tensor | Overlay] = field(default_factory=dict)
    base: StepCache | None = None
    _addresses: dict[tuple[str, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def load(self, slot: str, index: Tensor | None = None) -> Tensor:
        """A slot's value, or rows ``index`` (int64 ``[M, H]``) of it.

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
            value = scatter_rows(self.base.load(slot), value.index, value.rows)  # [B, R, C]
        return value if index is None else gather_rows(value, index)  # [B, H, C]

    def addresses(self, slots: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]:
        """Where each sample's values begin, contiguous from there: int64 ``[slots, batch]`` on the values' device.

        Returns:
            The table, and tensors that must stay alive while it is used.
        """
        if slots in self._addresses:
            return self._addresses[slots], []
        values = [self.load(slot) for slot in slots]
        whole = [v if v.is_contiguous() or v[0].is_contiguous() else v.contiguous() for v in values]
        begins = np.array([(v.data_ptr(), v.stride(0) * v.element_size()) for v in whole], np.int64).reshape(-1, 2)
        starts = torch.from_numpy(begins[:, :1] + begins[:, 1:] * np.arange(self.batch))  # [slots, batch]
        table = starts.to(whole[0].device if whole else "cpu", non_blocking=True)
        if all(value is self.values.get(slot) for value, slot in zip(whole, slots, strict=True)):
            self._addresses[slots] = table
            return table, []
        return table, whole

    def samples(self, numbers: Sequence[int]) -> StepCache:
        """Some samples of this call: views where their numbers are evenly spaced, else copies."""
        chosen: dict[str, Tensor | Overlay] = {}
        for slot, value in self.values.items():
            if isinstance(value, Overlay):
                index = value.index if len(value.index) == 1 else take_samples(value.index, self.batch, numbers)
                chosen[slot] = Overlay(take_samples(value.rows, self.batch, numbers), index)
            else:
                chosen[slot] = take_samples(value, self.batch, numbers)
        return StepCache(len(numbers), chosen, self.base.samples(numbers) if self.base is not None else None)

    def compacted(self) -> StepCache:
        """This cache; or a whole one of the same values, where the overlays of a chain of edits have come to hold more
        than that. So a chain of any length holds at most twice what a dense recording does."""
        chain = [self]
        while chain[-1].base is not None:
            chain.append(chain[-1].base)
        root = chain[-1]
        if sum(step.nbytes for step in chain[:-1]) <= root.nbytes:
            return self
        return StepCache(self.batch, {slot: self.load(slot).clone() for slot in root.values})

    @property
    def nbytes(self) -> int:
        """Bytes held by this step itself, without its base."""
        tensors = [v.rows if isinstance(v, Overlay) else v for v in self.values.values()]
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@dataclass
class StackedCache:
    """The recorded values of several runs, put together as the samples of one call.

    Args:
        origins: for each sample of the call, the run's cache and the sample's number in it.
    """

    origins: Sequence[tuple[StepCache, int]]

    def load(self, slot: str, index: Tensor | None = None) -> Tensor:
        """A slot's value for every sample, or rows ``index`` (int64 ``[M, H]``) of it.

        Raises:
            KeyError: a run did not record the slot.
        """
        whole = {id(cache): cache.load(slot) for cache, _ in self.origins}
        each = []
        for number, (cache, sample) in enumerate(self.origins):
            value = take_samples(whole[id(cache)], cache.batch, [sample])
            if index is not None:
                value = gather_rows(value, index[number % len(index)][None])  # [1, H, C]
            each.append(value)
        return torch.cat(each)

    def addresses(self, slots: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]:
        """As :meth:`StepCache.addresses`, of every sample of the call."""
        known = {id(cache): cache.addresses(slots) for cache, _ in self.origins}
        columns = [known[id(cache)][0][:, sample] for cache, sample in self.origins]
        alive = [value for _, values in known.values() for value in values]
        return torch.stack(columns, 1), alive


def take_samples(value: Tensor, batch: int, numbers: Sequence[int]) -> Tensor:
    """Samples of a value ``[batch * k, ...]`` (k: heads folded into the batch, or 1); a view if evenly spaced."""
    split = value.unflatten(0, (batch, -1)) if len(value) != batch else value
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step > 0 and list(numbers) == list(range(numbers[0], numbers[-1] + 1, step)):
        taken = split[numbers[0] : numbers[-1] + 1 : step]
    else:
        taken = torch.stack([split[number] for number in numbers])  # an index would be waited for
    return taken.flatten(0, 1) if len(value) != batch else taken


def shrink(values: dict[str, tuple[Tensor, Tensor | None]]) -> dict[str, Tensor | Overlay]:
    """Keep of whole recorded values only their active rows.

    Args:
        values: slot -> (whole value ``[B, R, C]``, active index ``[M, N]``), or (value, None) to keep it whole.
    """
    return {
        slot: value if index is None else Overlay(gather_rows(value, index), index)
        for slot, (value, index) in values.items()
    }


def clone_detached(value: Tensor) -> Tensor:
    """A copy that later writes by the caller cannot reach."""
    return value.detach().clone(memory_format=torch.preserve_format)
