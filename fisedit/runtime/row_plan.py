"""Index tables in buffers of fixed sizes: what captured CUDA graphs read, refilled for each mask.

Row counts are padded to buckets, so that masks of about one size share a graph. All tables are written by a few
vectorized ops on the device of the buffers, from the masks alone; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fisedit.runtime.geometry import ConvGeometry, Level, block_positions
from fisedit.runtime.plan import Table, project_mask

LOCKS = 16384
"""Counters for kernels that split their work: at least as many as one launch has tiles."""
SMALLEST = 8


def bucket(rows: int, positions: int) -> int:
    """``rows`` rounded up to 8, 12, 16, 24, 32, 48, 64, then 80, 96, 112, 128, 160, 192, ..., 512, 576, 640, ...; at
    most all ``positions``. Of large numbers there are more: what pads them is computed by a library's products, too,
    and which way is fastest changes with every round of tiles."""
    step = _step(rows)
    size = -(-max(rows, SMALLEST) // step) * step
    return min(size, positions)


@lru_cache(maxsize=64)
def buckets(positions: int) -> tuple[int, ...]:
    """All numbers of rows that a level of so many positions can be padded to."""
    found = [bucket(1, positions)]
    while found[-1] < positions:
        found.append(bucket(found[-1] + 1, positions))
    return tuple(found)


def smallest(padded: int) -> int:
    """The smallest of the numbers that :func:`bucket` pads to this one."""
    return padded - _step(padded) + 1 if padded > SMALLEST else 1


def typical(padded: int) -> int:
    """The number in the middle of those that :func:`bucket` pads to this one."""
    return padded - _step(padded) // 2


def _step(rows: int) -> int:
    """From the next smaller bucket to that of ``rows``."""
    power = 1 << max(rows - 1, SMALLEST - 1).bit_length()  # the next power of two
    return power // (16 if power > 512 else 8 if power > 64 else 4)


@dataclass(frozen=True)
class Buckets:
    """What a captured graph is made for: M masks, and of each level the padded rows N and whether any mask is full."""

    masks: int
    rows: tuple[tuple[Level, int, bool], ...]

    def __str__(self) -> str:
        return ", ".join(f"{h}x{w}: {n}{' (all)' if full else ''}" for (h, w), n, full in self.rows)


class LevelMasks:
    """The masks of one call at every level of a graph, on the host.

    Args:
        masks: bool ``[M, H, W]``; M is 1 if one is shared by the batch.
    """

    def __init__(self, masks: Tensor, levels: Iterable[Level]) -> None:
        masks = masks.cpu()
        masks = masks[:1] if bool((masks == masks[:1]).all()) else masks
        self.at = {level: torch.stack([project_mask(mask, level) for mask in masks]).flatten(1) for level in levels}
        self.counts = {level: mask.sum(1).tolist() for level, mask in self.at.items()}
        sizes = {level: max(counts) for level, counts in self.counts.items()}
        self.buckets = Buckets(
            len(masks),
            tuple(
                (level, bucket(size, level[0] * level[1]), size == level[0] * level[1]) for level, size in sizes.items()
            ),
        )


@dataclass(frozen=True)
class Halos:
    """Which recorded positions of each level the convolutions of masks read: int64 ``[h]`` for each mask, ascending.

    What is fetched from another tier are these rows, one after the other.
    """

    positions: Mapping[Level, list[Tensor]]

    @staticmethod
    def of(masks: LevelMasks, geometries: Iterable[ConvGeometry], whole: Iterable[Level] = ()) -> Halos:
        """The halos of all ``geometries``; of the levels ``whole`` every position."""
        read: dict[Level, list[Tensor]] = {}
        for geometry in geometries:
            reads = read_positions(geometry, torch.device("cpu"))  # [R', taps]
            marks = read.setdefault(geometry.source, [torch.zeros_like(mask) for mask in masks.at[geometry.source]])
            for mark, target in zip(marks, masks.at[geometry.target], strict=True):
                wanted = reads[target].flatten()
                mark[wanted[wanted >= 0].long()] = True
        for level, marks in read.items():
            for mark, active in zip(marks, masks.at[level], strict=True):
                mark &= ~active
        positions = {level: [mark.nonzero()[:, 0] for mark in marks] for level, marks in read.items()}
        for level in whole:
            positions[level] = [torch.arange(level[0] * level[1])] * len(masks.at[level])
        return Halos(positions)

    def size(self, level: Level) -> int:
        """Rows of the largest mask."""
        return max(len(positions) for positions in self.positions[level])

    def index(self, level: Level) -> Tensor:
        """The positions, int64 ``[M, H]``, padded with the first position."""
        return torch.nn.utils.rnn.pad_sequence(self.positions[level], batch_first=True)

    def places(self, level: Level) -> Tensor:
        """For each position its place among the fetched rows: int32 ``[M, R]``, 0 for those that are not read."""
        places = torch.zeros(len(self.positions[level]), level[0] * level[1], dtype=torch.int32)
        for row, positions in zip(places, self.positions[level], strict=True):
            row[positions] = torch.arange(len(positions), dtype=torch.int32)
        return places


@lru_cache(maxsize=256)
def read_positions(geometry: ConvGeometry, device: torch.device) -> Tensor:
    """For each output of a convolution, the input positions it reads, -1 outside: int32 ``[R', taps]``."""
    height, width = geometry.target
    lines = torch.arange(height * width, device=device)
    positions, inside = block_positions(geometry, (1, 1), lines // width, lines % width)  # [R', kh, kw]
    steps = geometry.dilation
    taps = torch.where(inside, positions, -1)[:, :: steps[0], :: steps[1]]  # [R', kh, kw]
    return taps.flatten(1).to(torch.int32)


class RowPlan:
    """The tables of one captured graph.

    Args:
        keys: the tables that the graph reads.
        buckets: the sizes of its rows.
        batch: samples in a call.
    """

    def __init__(self, keys: Iterable[Table], buckets: Buckets, batch: int, device: torch.device) -> None:
        self.buckets, self.batch, self.device = buckets, batch, device
        self.sizes = {level: size for level, size, _ in buckets.rows}
        self.full = {level: full for level, _, full in buckets.rows}
        self.locks = torch.zeros(LOCKS, dtype=torch.int32, device=device)
        self._tables: dict[Table, Tensor] = {}
        for key in sorted(set(keys), key=str):
            if (shape := self._shape(key)) is not None:
                dtype = torch.int64 if key.kind in ("active", "count") else torch.int32
                self._tables[key] = torch.zeros(shape, dtype=dtype, device=device)

    def _shape(self, key: Table) -> tuple[int, ...] | None:
        masks = self.buckets.masks
        if isinstance(key.of, ConvGeometry):
            if key.kind == "places":
                return masks, self.sizes[key.of.target], 4
            return masks, self.sizes[key.of.target], key.of.kernel[0] * key.of.kernel[1]
        shapes = {"active": (masks, self.sizes[key.of]), "keys": (masks, key.of[0] * key.of[1]), "number": (1,),
                  "count": (masks,), "counts": (self.batch,)}  # fmt: skip
        return shapes.get(key.kind)

    def rows(self, level: Level) -> int:
        """N: the rows of each packed sample at ``level``, padding included."""
        return self.sizes[level]

    def table(self, key: Table) -> Tensor | bool:
        """A table, or one of the flags ``full`` and ``partial`` of a level.

        Shapes: active int64 ``[M, N]``, padded with R; sources and own sources int32 ``[M, N', taps]``; places int32
        ``[M, T, 4]``, the active rows of each block of 2x2 positions, which a row of the target stands for, -1 for
        none; keys int32 ``[M, R]``; number int32 ``[1]``, the rows of the largest sample; count int64 ``[M]`` and
        counts int32 ``[B]``, the rows of each; locks int32 ``[LOCKS]``, zeros.
        """
        if key.kind == "locks":
            return self.locks
        if key.kind in ("full", "partial"):
            assert not isinstance(key.of, ConvGeometry)
            return self.full[key.of] == (key.kind == "full")
        return self._tables[key]

    def write(self, masks: LevelMasks, halos: Halos | None = None) -> None:
        """Fill the tables for other masks of the same buckets.

        Args:
            halos: the recorded rows that convolutions find one after the other; ``None``: they find whole maps.
        """
        assert masks.buckets == self.buckets
        places: dict[Level, Tensor] = {}
        fetched: dict[Level, Tensor] = {}
        active: dict[Level, Tensor] = {}
        for level, size in self.sizes.items():
            mask = masks.at[level].to(self.device, non_blocking=True)  # [M, R]
            positions = torch.arange(mask.shape[1], dtype=torch.int32, device=self.device)
            rank = mask.cumsum(1, dtype=torch.int32) - 1
            places[level] = fetched[level] = torch.where(mask, rank, positions + size)  # [M, R]
            if halos is not None and level in halos.positions:
                recorded = halos.places(level).to(self.device, non_blocking=True)
                fetched[level] = torch.where(mask, rank, recorded + size)  # [M, R]
            padded = torch.full((len(mask), size + 1), mask.shape[1], dtype=torch.int64, device=self.device)
            goal = torch.where(mask, rank, size).long()
            active[level] = padded.scatter_(1, goal, positions.long().expand_as(goal))[:, :size]  # [M, N]
        for key, table in self._tables.items():
            if isinstance(key.of, ConvGeometry) and key.kind == "places":
                table.copy_(self._places(key.of, places[key.of.source], active[key.of.target]))
            elif isinstance(key.of, ConvGeometry):
                of_source = (fetched if key.kind == "sources" else places)[key.of.source]
                table.copy_(self._sources(key.of, of_source, active[key.of.target]))
            elif key.kind == "active":
                table.copy_(active[key.of])
            elif key.kind == "keys":
                table.copy_(places[key.of])
            else:
                counts = masks.counts[key.of]
                values = [max(counts)] if key.kind == "number" else counts * (len(table) // len(counts))
                table.copy_(torch.tensor(values, dtype=table.dtype), non_blocking=True)

    def _places(self, geometry: ConvGeometry, places: Tensor, active: Tensor) -> Tensor:
        """``[M, T, 4]``: the active rows of each block of 2x2 positions, line by line; -1: not active."""
        (height, width), across = geometry.target, geometry.source[1]
        first = active // width * 2 * across + active % width * 2  # [M, T]
        inside = torch.arange(4, device=self.device)
        positions = first[:, :, None] + inside // 2 * across + inside % 2
        positions = positions.clamp_max(places.shape[1] - 1)  # [M, T, 4]
        found = torch.take_along_dim(places, positions.flatten(1), 1).view_as(positions)
        there = (found < self.sizes[geometry.source]) & (active < height * width)[:, :, None]
        return torch.where(there, found, -1)

    def _sources(self, geometry: ConvGeometry, places: Tensor, active: Tensor) -> Tensor:
        """``[M, N', taps]``: an active row, N + a recorded position, or -1."""
        reads = read_positions(geometry, self.device)  # [R', taps]
        wanted = reads[active.clamp_max(len(reads) - 1)].long()  # [M, N', taps]
        found = torch.take_along_dim(places, wanted.clamp_min(0).flatten(1), 1).view_as(wanted)
        return torch.where((wanted >= 0) & (active < len(reads))[:, :, None], found, -1)
