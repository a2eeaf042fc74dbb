"""The recorded values of one U-Net call by slot: whole, or as an overlay of active rows over those of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fisedit.runtime.cache.block import Block, Kept, take_samples
from fisedit.runtime.kernels.gather_rows.reference import gather_rows
from fisedit.runtime.kernels.scatter_rows.reference import scatter_rows

Value = Tensor | Kept
"""A recorded value: in a block on some tier, or a tensor of its own."""


@dataclass(frozen=True)
class Overlay:
    """Active rows ``[B, N, C]`` that replace rows ``index`` (int64 ``[M, N]``, padded with R) of the base's slot."""

    rows: Value
    index: Tensor


@dataclass
class StepCache:
    """Recorded values of one call of ``batch`` samples, by slot key; what is missing is looked up in ``base``.

    A dense recording has whole values and no base. A recorded edit holds only the rows it computed, over its base, so
    that a chain of edits costs memory in proportion to what changed.

    Attributes:
        device: where values are wanted, wherever they lie.
    """

    batch: int
    values: Mapping[str, Value | Overlay] = field(default_factory=dict)
    base: StepCache | None = None
    device: torch.device | None = None
    _tables: dict[tuple[str, ...], tuple[list[int], Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def load(self, slot: str, index: Tensor | None = None) -> Tensor:
        """A slot's value, or rows ``index`` (int64 ``[M, H]``) of it.

        Raises:
            KeyError: the slot was not recorded.
            CacheReadError: it lies in a file that is gone or was changed.
        """
        value = self.values.get(slot)
        if value is None:
            if self.base is None:
                raise KeyError(slot)
            return self.base.load(slot, index)
        if isinstance(value, Overlay):
            assert self.base is not None
            rows = self._read(value.rows)
            value = scatter_rows(self.base.load(slot), value.index.to(rows.device), rows)  # [B, R, C]
        return self._read(value, index)

    def _read(self, value: Value, index: Tensor | None = None) -> Tensor:
        if isinstance(value, Kept):
            return value.read(self.device or torch.device("cpu"), index)
        return value if index is None else gather_rows(value, index)  # [B, H, C]

    @property
    def chain(self) -> list[StepCache]:
        """This cache and its bases, the dense recording first."""
        return [*(self.base.chain if self.base is not None else ()), self]

    def lacks(self, slots: Sequence[str]) -> list[str]:
        """The slots that were not recorded, or are lost."""
        return [slot for slot in slots if not any(_is_there(step.values.get(slot)) for step in self.chain)]

    def blocks(self) -> list[Block]:
        """The blocks that hold its own values, each once."""
        return list({id(value.block): value.block for value in self._own() if isinstance(value, Kept)}.values())

    def _own(self) -> Iterator[Value]:
        for value in self.values.values():
            yield value.rows if isinstance(value, Overlay) else value

    def is_resident(self, slots: Sequence[str]) -> bool:
        """Whether kernels can read the slots where they lie: whole, unquantized, in the memory of the device."""
        return all(self._lies_here(self.values.get(slot)) for slot in slots)

    def _lies_here(self, value: Value | Overlay | None) -> bool:
        if isinstance(value, Kept):
            data = value.block.data
            return data is not None and data.device == self.device and not value.quantized
        return isinstance(value, Tensor)

    def addresses(self, slots: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]:
        """Where each sample's values begin, contiguous from there: int64 ``[slots, batch]`` on the values' device.

        Returns:
            The table, and tensors that must stay alive while it is used.
        """
        values = [self.values.get(slot) for slot in slots]
        whole = [v if self._lies_here(v) else self.load(slot) for v, slot in zip(values, slots, strict=True)]
        begins: list[list[int]] = []
        alive: list[Tensor] = []
        for value in whole:
            if isinstance(value, Kept):
                begins.append(value.addresses()[0])
                alive += [data for data in (value.block.data,) if data is not None]
            else:
                assert isinstance(value, Tensor)
                alive.append(value if value.is_contiguous() or value[0].is_contiguous() else value.contiguous())
                step = alive[-1].stride(0) * value.element_size()
                begins.append([alive[-1].data_ptr() + number * step for number in range(self.batch)])
        flat = [begin for of_slot in begins for begin in of_slot]
        known = self._tables.get(slots)
        if known is None or known[0] != flat:
            device = alive[0].device if alive else torch.device("cpu")
            starts = torch.from_numpy(np.array(flat, np.int64).reshape(-1, self.batch))  # [slots, batch]
            self._tables[slots] = known = flat, starts.to(device, non_blocking=True)
        return known[1], alive

    def samples(self, numbers: Sequence[int]) -> StepCache:
        """Some samples of this call: views where their numbers are evenly spaced, else copies."""
        chosen: dict[str, Value | Overlay] = {}
        for slot, value in self.values.items():
            if isinstance(value, Overlay):
                index = value.index if len(value.index) == 1 else take_samples(value.index, self.batch, numbers)
                chosen[slot] = Overlay(self._some(value.rows, numbers), index)
            else:
                chosen[slot] = self._some(value, numbers)
        base = self.base.samples(numbers) if self.base is not None else None
        return StepCache(len(numbers), chosen, base, self.device)

    def _some(self, value: Value, numbers: Sequence[int]) -> Value:
        return value.samples(numbers) if isinstance(value, Kept) else take_samples(value, self.batch, numbers)

    def on(self, device: torch.device) -> StepCache:
        """The same values, wanted on another device."""
        base = self.base.on(device) if self.base is not None else None
        return StepCache(self.batch, self.values, base, device)

    @property
    def nbytes(self) -> int:
        """Bytes held by this step itself, without its base."""
        own = {(value.data_ptr() if isinstance(value, Tensor) else (id(value.block), value.slot)): value.nbytes
               for value in self._own()}  # fmt: skip
        return sum(own.values())


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
        each = []
        for number, (cache, sample) in enumerate(self.origins):
            own = None if index is None else index[number % len(index)][None]  # [1, H]
            each.append(cache.samples([sample]).load(slot, own))
        return torch.cat(each)

    def on(self, device: torch.device) -> StackedCache:
        """The same values, wanted on another device."""
        return StackedCache([(cache.on(device), sample) for cache, sample in self.origins])

    def addresses(self, slots: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]:
        """As :meth:`StepCache.addresses`, of every sample of the call."""
        known = {id(cache): cache.addresses(slots) for cache, _ in self.origins}
        columns = [known[id(cache)][0][:, sample] for cache, sample in self.origins]
        alive = [value for _, values in known.values() for value in values]
        return torch.stack(columns, 1), alive


def _is_there(value: Value | Overlay | None) -> bool:
    value = value.rows if isinstance(value, Overlay) else value
    return isinstance(value, Tensor) or (value is not None and value.block.lost is None)


def clone_detached(value: Tensor) -> Tensor:
    """A copy that later writes by the caller cannot reach."""
    return value.detach().clone(memory_format=torch.preserve_format)
