"""Blocks: the recorded values of one call that are read alike, in one piece of memory, on whichever tier it lies."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fisedit.runtime.cache.disk import open_tensors
from fisedit.runtime.cache.host import Slab
from fisedit.runtime.geometry import ConvGeometry
from fisedit.runtime.kernels.gather_rows.reference import gather_rows
from fisedit.runtime.kernels.quantize_rows.reference import dequantize_rows

Kind = Literal["small", "keys", "maps", "queries"]
"""How recorded values are read: ``maps`` by edits, the rows around the mask; ``keys`` by edits, whole (keys and values
of self-attention, maps of dense islands); ``queries`` while a mask is sought, whole; ``small`` (statistics)
in every sparse call, whole."""
Tier = Literal["gpu", "pinned", "pageable", "disk"]
"""Where a block lies: in the GPU's memory, in host memory that the GPU reads by address, in other host memory (all
that a CPU knows), or in a file."""


@dataclass(frozen=True)
class Use:
    """How a recorded value is read; ``geometries``: of the convolutions that read it, for maps."""

    kind: Kind
    geometries: tuple[ConvGeometry, ...] = ()


ALIGNMENT = 256
"""Bytes to which values are aligned within a block, as allocators align theirs."""
SCALE = "scale:"
"""What the slot of a quantized value's scales is called, before the value's own slot."""


@dataclass(frozen=True)
class Field:
    """Where a value lies in a block: its first byte, its shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def strides(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[dimension + 1 :]) for dimension in range(len(self.shape)))

    def view(self, data: Tensor) -> Tensor:
        """The value, of memory ``data`` of its dtype."""
        return data.as_strided(self.shape, self.strides, data.storage_offset() + self.offset // self.dtype.itemsize)


@dataclass(frozen=True)
class Layout:
    """Where the values of a block lie, by slot."""

    fields: Mapping[str, Field]
    nbytes: int

    @staticmethod
    def of(values: Mapping[str, Tensor]) -> Layout:
        """The same one for all calls of a run: a call has hundreds of values."""
        return _layout(tuple((slot, tuple(value.shape), value.dtype) for slot, value in values.items()))

    def view(self, data: Tensor, slot: str) -> Tensor:
        """A value in memory uint8 ``[nbytes]``."""
        of = self.fields[slot]
        return of.view(data.view(of.dtype))

    def views(self, data: Tensor) -> dict[str, Tensor]:
        """All values in memory uint8 ``[nbytes]``."""
        typed = {dtype: data.view(dtype) for dtype in {of.dtype for of in self.fields.values()}}
        return {slot: of.view(typed[of.dtype]) for slot, of in self.fields.items()}

    def write(self, data: Tensor, values: Mapping[str, Tensor]) -> None:
        """Copy values into memory uint8 ``[nbytes]``, in a launch for each dtype."""
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for slot, view in self.views(data).items():
            goals, sources = by_dtype[view.dtype]
            goals.append(view)
            sources.append(values[slot])
        for goals, sources in by_dtype.values():
            torch._foreach_copy_(goals, sources)


@lru_cache(maxsize=64)
def _layout(values: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]) -> Layout:
    fields, offset = {}, 0
    for slot, shape, dtype in values:
        fields[slot] = Field(offset, shape, dtype)
        offset += -(-fields[slot].nbytes // ALIGNMENT) * ALIGNMENT
    return Layout(fields, offset)


@dataclass(eq=False)
class Block:
    """Recorded values of one call and kind.

    Attributes:
        data: uint8 ``[nbytes]`` on the GPU or the host; ``None`` on disk, and once it is lost.
        slab: what ``data`` is a view of, on the host. file, checksum: on disk.
        ready: when the copy that brought it here is over; ``None`` if nothing is waited for.
        lost: why no tier has it; ``None`` if one has.
        used: counts up with every read, over all blocks: what was read longest ago moves first.
        readers: how many have said that they are about to read it; it stays where it is meanwhile.
        mapped: its values in the file of a saved base, which is not the block's own: they are read from there while
            no tier has a copy.
    """

    kind: Kind
    layout: Layout
    tier: Tier
    data: Tensor | None
    slab: Slab | None = None
    file: Path | None = None
    checksum: str | None = None
    ready: torch.cuda.Event | None = None
    lost: str | None = None
    used: int = 0
    readers: int = 0
    mapped: Mapping[str, Tensor] | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def values(self) -> Mapping[str, Tensor]:
        """All values by slot, see :meth:`value`."""
        return {slot: self.value(slot) for slot in self.layout.fields}

    def value(self, slot: str) -> Tensor:
        """A value where it lies. On the host it is waited for; of a file, what is used of it is read.

        Raises:
            CacheReadError: its file is gone or was changed.
        """
        with self.lock:
            if self.data is None:
                return self._opened[slot]
            if self.ready is not None and not self.data.is_cuda:
                self.ready.synchronize()
                self.ready = None
            return self.layout.view(self.data, slot)

    @cached_property
    def _opened(self) -> Mapping[str, Tensor]:
        if self.mapped is not None:
            return self.mapped
        assert self.file is not None, self.lost
        return open_tensors(self.file, self.checksum)


@dataclass(frozen=True)
class Kept:
    """A recorded value in a block; it looks like the tensor that it stands for.

    Attributes:
        dtype: what it was recorded in; within the block it may be quantized, with its scales beside it.
        numbers: the samples of the block's value that this one has; ``None``: all.
        batch: samples that the block's values have.
    """

    block: Block
    slot: str
    dtype: torch.dtype
    batch: int
    numbers: tuple[int, ...] | None = None

    @property
    def field(self) -> Field:
        return self.block.layout.fields[self.slot]

    @property
    def quantized(self) -> bool:
        return SCALE + self.slot in self.block.layout.fields

    @property
    def shape(self) -> torch.Size:
        first, *rest = self.field.shape
        share = 1 if self.numbers is None else len(self.numbers) / self.batch
        return torch.Size((round(first * share), *rest))

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the block, with its scales."""
        fields = [self.block.layout.fields[slot] for slot in (self.slot, SCALE + self.slot)[: 1 + self.quantized]]
        share = 1.0 if self.numbers is None else len(self.numbers) / self.batch
        return round(sum(f.nbytes for f in fields) * share)

    def samples(self, numbers: Sequence[int]) -> Kept:
        """Some samples of it."""
        own = range(self.batch) if self.numbers is None else self.numbers
        return replace(self, numbers=tuple(own[number] for number in numbers))

    def raw(self) -> dict[str, Tensor]:
        """The value as it lies in the block, and its scales if it is quantized, by their slots."""
        values = {slot: self.block.value(slot) for slot in (self.slot, SCALE + self.slot)[: 1 + self.quantized]}
        if values[self.slot].is_cuda and self.block.ready is not None:
            torch.cuda.current_stream(values[self.slot].device).wait_event(self.block.ready)
        if self.numbers is None:
            return values
        return {slot: take_samples(value, self.batch, self.numbers) for slot, value in values.items()}

    def read(self, device: torch.device, index: Tensor | None = None) -> Tensor:
        """The value on ``device``, or rows ``index`` (int64 ``[M, H]``) of it, as it was recorded.

        Of what lies on the host only the rows that are asked for are read.
        """
        raw = self.raw()
        value, scales = raw[self.slot], raw.get(SCALE + self.slot)
        if index is not None:
            rows = index.to(value.device)
            value = gather_rows(value, rows)  # [B, H, C]
            scales = None if scales is None else gather_rows(scales[..., None], rows)[..., 0]
        ahead = device.type != "cpu"  # what the host gets it reads at once
        value = value.to(device, non_blocking=ahead)
        return value if scales is None else dequantize_rows(value, scales.to(device, non_blocking=ahead), self.dtype)

    def addresses(self) -> tuple[list[int], list[int]]:
        """Where each sample's value begins in memory, and where its scales do (empty if it has none)."""
        data, fields = self.block.data, self.block.layout.fields
        assert data is not None
        begin, numbers = data.data_ptr(), self.numbers or range(self.batch)
        found: list[list[int]] = []
        for of in (fields[self.slot], fields.get(SCALE + self.slot)):
            step = 0 if of is None else of.nbytes // self.batch
            found.append([] if of is None else [begin + of.offset + number * step for number in numbers])
        return found[0], found[1]


def take_samples(value: Tensor, batch: int, numbers: Sequence[int]) -> Tensor:
    """Samples of a value ``[batch * k, ...]`` (k: heads folded into the batch, or 1); a view if evenly spaced."""
    split = value.unflatten(0, (batch, -1)) if len(value) != batch else value
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step > 0 and list(numbers) == list(range(numbers[0], numbers[-1] + 1, step)):
        taken = split[numbers[0] : numbers[-1] + 1 : step]
    else:
        taken = torch.stack([split[number] for number in numbers])  # an index would be waited for
    return taken.flatten(0, 1) if len(value) != batch else taken
