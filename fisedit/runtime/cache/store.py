"""The recorded values of one U-Net call by slot: whole, or as an overlay of active rows over those of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fisedit.runtime.cache.block import SCALE, Block, Kept, take_samples
from fisedit.runtime.kernels.gather_rows.reference import gather_rows
from fisedit.runtime.kernels.scatter_rows.reference import scatter_rows

Value = Tensor | Kept
"""A recorded value: in a block on some tier, or a tensor of its own."""


@dataclass(frozen=True)
class Overlay:
    """Active rows ``[B, N, C]`` that replace rows ``index`` (int64 ``[M, N]``, padded with R) of the base's slot."""

    rows: Value
    index: Tensor


@dataclass(frozen=True)
class Places:
    """Where some slots of one link of a chain lie, as long as their blocks stay.

    Attributes:
        begins, scales: addresses of each sample's value and of its scales, int64 ``[slots, B]``; 0: there is none.
        indexes: of each slot that is an overlay, which rows it replaces.
        names: tells links whose overlays replace the same rows.
        blocks: what the values are in, and the memory that they lie in (``None``: a file).
        alone: the block that holds these slots for all samples, their scales, and nothing else; if there is one.
        whole: whether every slot is there, unquantized and no overlay.
    """

    begins: np.ndarray
    scales: np.ndarray
    indexes: tuple[Tensor | None, ...]
    names: tuple[int, ...]
    blocks: tuple[tuple[Block, Tensor | None], ...]
    tensors: tuple[Tensor, ...]
    alone: Block | None
    whole: bool

    @property
    def holds(self) -> bool:
        """Whether the blocks still lie where they did."""
        return all(block.data is data for block, data in self.blocks)

    @property
    def memory(self) -> list[Tensor]:
        """What must stay alive while the addresses are used."""
        return [*self.tensors, *(data for _, data in self.blocks if data is not None)]

    def is_within(self, device: torch.device) -> bool:
        """Whether all lies in the memory of a device."""
        return all(data is not None and data.device == device for data in self._lie_in())

    def is_reachable(self, device: torch.device) -> bool:
        """Whether a device reads all by its address."""
        pinned = all(d is not None and (d.device == device or (b.slab is not None and b.slab.pinned))
                     for b, d in self.blocks)  # fmt: skip
        return pinned and all(tensor.device == device for tensor in self.tensors)

    def _lie_in(self) -> list[Tensor | None]:
        return [*self.tensors, *(data for _, data in self.blocks)]


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
    _places: dict[tuple[str, ...], Places] = field(default_factory=dict, repr=False, compare=False)
    _tables: dict[tuple[str, ...], tuple[Places, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _held: tuple[Mapping[str, Value | Overlay], list[Block]] | None = field(default=None, repr=False, compare=False)

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
        if all(map(self.values.__contains__, slots)) and all(block.lost is None for block in self.blocks()):
            return []
        return [slot for slot in slots if not any(_is_there(step.values.get(slot)) for step in self.chain)]

    def blocks(self) -> list[Block]:
        """The blocks that hold its own values, each once."""
        if self._held is None or self._held[0] is not self.values:
            self._held = self.values, list({id(value.block): value.block for value in self.kept()}.values())
        return self._held[1]

    def kept(self) -> list[Kept]:
        """Its own values that lie in blocks."""
        return [value for value in self._own() if isinstance(value, Kept)]

    def _own(self) -> Iterator[Value]:
        for value in self.values.values():
            yield value.rows if isinstance(value, Overlay) else value

    def has_any(self, slots: Sequence[str]) -> bool:
        """Whether some of the slots were recorded."""
        chain = self.chain
        return any(slot in step.values for slot in slots for step in chain)

    def is_resident(self, slots: Sequence[str]) -> bool:
        """Whether kernels can read the slots where they lie: whole, unquantized, in the memory of the device."""
        places = self.places(tuple(slots))
        return places.whole and self.device is not None and places.is_within(self.device)

    def places(self, slots: tuple[str, ...]) -> Places:
        """Where this link's own values of some slots lie; looked at once, until one of their blocks moves."""
        known = self._places.get(slots)
        if known is None or not known.holds:
            known = self._places[slots] = self._look(slots)
        return known

    def _look(self, slots: tuple[str, ...]) -> Places:
        begins, scales = (np.zeros((len(slots), self.batch), np.int64) for _ in range(2))
        indexes: list[Tensor | None] = []
        blocks: dict[int, tuple[Block, Tensor | None]] = {}
        tensors, plain = [], True
        for row, slot in enumerate(slots):
            value = self.values.get(slot)
            indexes.append(value.index if isinstance(value, Overlay) else None)
            rows = value.rows if isinstance(value, Overlay) else value
            plain &= value is rows is not None
            if isinstance(rows, Kept):
                plain &= not rows.quantized
                blocks[id(rows.block)] = rows.block, rows.block.data
                if rows.block.data is not None:
                    begins[row], of_scales = rows.addresses()
                    if of_scales:
                        scales[row] = of_scales
            elif rows is not None:
                tensors.append(rows if rows.is_contiguous() or rows[0].is_contiguous() else rows.contiguous())
                step = tensors[-1].stride(0) * rows.element_size()
                begins[row] = [tensors[-1].data_ptr() + number * step for number in range(self.batch)]
        names = tuple(0 if index is None else index.data_ptr() for index in indexes)
        only = not tensors and not any(index is not None for index in indexes)
        alone = self._alone(slots, [block for block, _ in blocks.values()]) if only else None
        return Places(begins, scales, tuple(indexes), names, tuple(blocks.values()), tuple(tensors), alone, plain)

    def _alone(self, slots: tuple[str, ...], blocks: list[Block]) -> Block | None:
        if len(blocks) != 1 or [f for f in blocks[0].layout.fields if not f.startswith(SCALE)] != list(slots):
            return None
        kept = [value for slot in slots if isinstance(value := self.values.get(slot), Kept)]
        return blocks[0] if all(v.numbers is None and v.batch == self.batch for v in kept) else None

    def addresses(self, slots: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]:
        """Where each sample's values begin, contiguous from there: int64 ``[slots, batch]`` on the values' device.

        Returns:
            The table, and tensors that must stay alive while it is used.
        """
        places = self.places(slots)
        device = self.device or (places.tensors[0].device if places.tensors else torch.device("cpu"))
        if not (places.whole and places.is_within(device)):  # brought here for this call
            return StepCache(self.batch, {slot: self.load(slot) for slot in slots}, device=device).addresses(slots)
        table = self._tables.get(slots)
        if table is None or table[0] is not places:
            table = self._tables[slots] = places, torch.from_numpy(places.begins).to(device, non_blocking=True)
        return table[1], places.memory

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
               for value in self._own() if isinstance(value, Tensor) or value.block.lost is None}  # fmt: skip
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

    def is_resident(self, slots: Sequence[str]) -> bool:
        """As :meth:`StepCache.is_resident`, of all runs."""
        return all(cache.is_resident(slots) for cache in {id(cache): cache for cache, _ in self.origins}.values())

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
