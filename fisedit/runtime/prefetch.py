"""Fetch what a call of an edit reads of a recording while the call before it computes, from whichever tier it lies on.

Of the maps that convolutions read only the rows around the mask are fetched, one after the other into buffers of fixed
places; keys and values, and the queries that a mask is sought with, are read whole, where they lie if that is the GPU.
There are two sets of buffers: one is read by the call under way, the other one filled for the next. On a GPU the copies
run on a stream of their own, and streams wait for each other by events, never the host; only files, and memory that is
not page-locked, are read by a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisedit.runtime import trace
from fisedit.runtime.cache.block import Kind, Layout, Use
from fisedit.runtime.cache.links import Links, Reach, Source, links, newest, origins
from fisedit.runtime.cache.store import Overlay
from fisedit.runtime.cache.tiers import Tiers
from fisedit.runtime.geometry import ConvGeometry, Level
from fisedit.runtime.kernels.load_rows.moves import Moves, plan_moves
from fisedit.runtime.kernels.load_rows.reference import load_rows as load_rows_reference
from fisedit.runtime.row_plan import Halos

SETS = 2
"""Sets of buffers: one is read while the other one is filled."""
AHEAD = 3
"""Calls for which the reading thread works ahead, where it has to."""
BUS_PROGRAMS, OWN_PROGRAMS = 12, 64
"""Programs of a GPU that copy rows: few keep the bus busy, and leave the rest to the call that computes; rows in the
GPU's own memory take more."""
FETCHED: tuple[Kind, ...] = ("maps", "keys", "queries")
"""What is fetched; statistics and the like always lie where they are read."""


@dataclass(frozen=True)
class Wants:
    """What the step stage of a graph reads: ``views``, in their place, and ``loads``, whole; ``uses``: how."""

    views: tuple[str, ...]
    loads: tuple[str, ...]
    uses: Mapping[str, Use]
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)  # rows and channels, once they are known

    def of(self, kind: Kind) -> tuple[str, ...]:
        return tuple(sorted({slot for slot in (*self.views, *self.loads) if self.uses[slot].kind == kind}))

    @property
    def geometries(self) -> list[ConvGeometry]:
        """Of all convolutions that read maps."""
        return list(dict.fromkeys(g for s in (*self.views, *self.loads) for g in self.uses[s].geometries))

    @property
    def whole_levels(self) -> list[Level]:
        """Levels of maps that are also read whole: these are fetched whole, each row to its own place."""
        read = (self.uses[slot] for slot in (*self.views, *self.loads))
        return list(dict.fromkeys(g.source for use in read if use.kind == "keys" for g in use.geometries))

    def level(self, slot: str) -> Level | None:
        """The level of a map; ``None`` for what is fetched whole."""
        use = self.uses[slot]
        return use.geometries[0].source if use.kind == "maps" else None


@dataclass
class Buffers:
    """One set: a piece of memory for each kind.

    Attributes:
        values: by slot, in that memory. goals, begins: their addresses, of each kind int64 ``[slots, B]`` and by slot.
        quantized: a block as it was stored in 8 bits.
        table: where the kernels of a call read each view, int64 ``[views, B]``.
        ready: when they are filled. read: when the call is over that reads them. alive: what is being copied.
    """

    data: dict[Kind, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    goals: dict[Kind, Tensor] = field(default_factory=dict)
    begins: dict[str, np.ndarray] = field(default_factory=dict)
    quantized: Tensor | None = None
    table: Tensor | None = None
    ready: torch.cuda.Event | None = None
    read: torch.cuda.Event | None = None
    alive: list[Tensor] = field(default_factory=list)


@dataclass
class Fetched:
    """The recorded values of one call, where they were fetched to; a :class:`SlotSource`."""

    table: Tensor
    values: Mapping[str, Tensor]
    source: Source

    def addresses(self, slots: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]:
        return self.table, []

    def load(self, slot: str, index: Tensor | None = None) -> Tensor:
        if index is None and (value := self.values.get(slot)) is not None:
            return value
        return self.source.load(slot, index)


@dataclass(frozen=True)
class Coming:
    """A call to fetch for: its recorded values, and how each kind of them is reached."""

    source: Source
    reach: Mapping[Kind, Reach]


class Prefetch:
    """Fetches the recorded values of an edit's calls of one kind, in their order, each before it is asked for.

    Args:
        wants: what a call reads.
        halos: which rows of the maps; ``None`` where none are read.
        sources: the recorded values of call ``number``; ``None`` where none are read.
        batch: samples of a call.
        tiers: where recorded values lie.
    """

    def __init__(
        self, wants: Wants, halos: Halos | None, sources: Callable[[int], Source | None], batch: int, tiers: Tiers
    ) -> None:
        self.wants, self.halos, self.sources, self.batch, self.tiers = wants, halos, sources, batch, tiers
        self.device = tiers.device
        self.bytes_loaded: dict[int, int] = {}
        self._slots = {kind: slots for kind in FETCHED if (slots := wants.of(kind))}
        self._stream = torch.cuda.Stream(self.device, priority=-1) if tiers.on_gpu else None
        self._sets = [Buffers() for _ in range(SETS)]
        self._now = self._sets[0], -1
        self._filled: dict[int, Fetched] = {}
        self._coming: dict[int, Coming | None] = {}
        self._rows_of = {kind: [row for row, slot in enumerate(wants.views) if slot in set(of)]
                         for kind, of in self._slots.items()}  # fmt: skip
        self._moves: dict[Any, tuple[Moves, np.ndarray]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._reading: dict[tuple[int, Kind], Future[Tensor]] = {}

    def source(self, number: int) -> Fetched:
        """The values of call ``number``; the compute stream waits until they are there."""
        if number not in self._filled:
            self._fill(number)
        fetched, buffers = self._filled.pop(number), self._sets[number % SETS]
        self._now = buffers, number
        if buffers.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(buffers.ready)
        return fetched

    def covers(self, number: int) -> bool:
        """Whether call ``number`` is one to fetch for."""
        return self._look(number) is not None

    def done(self) -> None:
        """The kernels of the call are under way: fetch for the next one beside them."""
        buffers, number = self._now
        if self._stream is not None:
            buffers.read = torch.cuda.Event()
            buffers.read.record(torch.cuda.current_stream(self.device))
        self._coming.pop(number, None)
        self._fill(number + 1)

    def close(self) -> None:
        """Stop reading ahead. The buffers are free once the copies under way are over."""
        for job in self._reading.values():
            job.cancel()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._reading.clear()
        self._filled.clear()
        self._sets.clear()

    @property
    def _halos(self) -> Halos:
        assert self.halos is not None
        return self.halos

    # Filling a set of buffers

    def _fill(self, number: int) -> None:
        coming = self._look(number)
        if coming is None:
            return
        buffers, source = self._sets[number % SETS], coming.source
        for kind in self._slots:
            if not coming.reach[kind].in_place and kind not in buffers.data:
                self._prepare(buffers, kind, source)
        self._read_ahead(number)
        counted: dict[str, int] = {}
        with self._on_stream(buffers), trace.span("load", f"call {number + 1}", self.device, counted):
            buffers.alive = [t for kind in self._slots for t in self._fetch(number, kind, buffers, coming)]
            table = self._table(buffers, coming).to(self.device, non_blocking=True)
            if buffers.table is None:
                buffers.table = table
            else:
                buffers.table.copy_(table)  # in its place: results of an earlier capture may still read it
            counted["bytes"] = self.bytes_loaded.get(number, 0)
            if self._stream is not None:
                self.tiers.slow_down(self.bytes_loaded.get(number, 0))
                buffers.ready = torch.cuda.Event()
                buffers.ready.record()
        self._filled = {number: Fetched(buffers.table, buffers.values, source)}

    def _look(self, number: int) -> Coming | None:
        """What call ``number`` reads, and how it is reached: looked at once."""
        if number not in self._coming:
            source = self.sources(number)
            reach = {
                kind: Reach.of(source, slots, self.batch, self.device, whole=kind != "maps")
                for kind, slots in self._slots.items()
                if source is not None
            }
            self._coming[number] = Coming(source, reach) if source is not None else None
        return self._coming[number]

    def _on_stream(self, buffers: Buffers) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        if buffers.read is not None:
            self._stream.wait_event(buffers.read)  # the call that reads what is in them
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # they were just allocated
        return torch.cuda.stream(self._stream)

    def _prepare(self, buffers: Buffers, kind: Kind, source: Source) -> None:
        """Make a set's buffer for one kind, with the sizes of this mask."""
        first = origins(source, self.batch)[0][0].chain[0]
        shapes = {}
        for slot in self._slots[kind]:
            value, level = first.values[slot], self.wants.level(slot)
            assert not isinstance(value, Overlay)
            self.wants.shapes[slot] = value.shape[1], value.shape[2:].numel()
            rows = value.shape[1] if level is None else self._halos.size(level)
            shapes[slot] = torch.empty(self.batch, rows, *value.shape[2:], dtype=value.dtype, device="meta")
        layout = Layout.of(shapes)
        buffers.data[kind] = self.tiers.allocate(layout.nbytes)
        buffers.values |= layout.views(buffers.data[kind])
        begins = np.array([_begins(buffers.values[slot]) for slot in self._slots[kind]], np.int64)
        buffers.begins |= zip(self._slots[kind], begins, strict=True)
        buffers.goals[kind] = torch.from_numpy(begins).to(self.device)

    def _fetch(self, number: int, kind: Kind, buffers: Buffers, coming: Coming) -> list[Tensor]:
        """Bring the values of one kind into a set of buffers; returns what has to stay alive meanwhile."""
        reach, slots = coming.reach[kind], self._slots[kind]
        if reach.in_place:
            return []
        if not reach.by_address:
            read = self._reading.pop((number, kind)).result()
            self._copy_all(number, buffers.data[kind], read)
            return [read]
        every = enumerate(links(coming.source, self.batch, slots))
        return [t for depth, each in every for t in self._copy(number, kind, buffers, each, depth)]

    def _copy(self, number: int, kind: Kind, buffers: Buffers, each: Links, depth: int) -> list[Tensor]:
        """Copy what one link of the samples' chains has: the dense recordings, or what edits put over them."""
        block, begins, scales = each.alone if kind != "maps" else None, each.begins, each.scales
        alive = []
        if block is not None and block.data is not None:
            if not scales.any():
                self._copy_all(number, buffers.data[kind], block.data)
                return [block.data]
            # In one piece over the bus, as it lies; what makes it exact again reads it on this side.
            if buffers.quantized is None:
                buffers.quantized = self.tiers.allocate(block.nbytes)
            self._copy_all(number, buffers.quantized, block.data)
            shift = buffers.quantized.data_ptr() - block.data.data_ptr()
            begins, scales = begins + shift, scales + shift
            alive.append(block.data)
        for quantized in (False, True):
            of = np.where((each.scales > 0) == quantized, begins, 0)
            if of.any():
                here = block is not None or all(data.is_cuda for data in each.memory)
                moved = self._copy_rows(kind, buffers, each, depth, of, scales if quantized else None, here)
                self._count(number, 0 if block is not None else moved)
                alive += each.memory
        return alive

    def _copy_rows(
        self, kind: Kind, buffers: Buffers, each: Links, depth: int, begins: np.ndarray, scales: np.ndarray | None,
        here: bool,
    ) -> int:  # fmt: skip
        """Copy the rows at these addresses, 0 where there are none; the bytes read. ``here``: none are the host's."""
        moves, sizes = self._plan(kind, each, depth)
        begins_there = torch.from_numpy(begins).to(self.device, non_blocking=True)
        scales_there = None if scales is None else torch.from_numpy(scales).to(self.device, non_blocking=True)
        dtype = buffers.values[self._slots[kind][0]].dtype
        arguments = (moves, begins_there, buffers.goals[kind], dtype, scales_there)
        if self._stream is None:
            load_rows_reference(*arguments)
        else:
            from fisedit.runtime.kernels.load_rows.triton import load_rows

            load_rows(*arguments, programs=OWN_PROGRAMS if here else BUS_PROGRAMS)
        return int((sizes * (begins > 0)).sum()) * (1 if scales is not None else dtype.itemsize)

    def _copy_all(self, number: int, goal: Tensor, data: Tensor) -> None:
        goal.copy_(data, non_blocking=True)
        self._count(number, data.numel())

    def _count(self, number: int, nbytes: int) -> None:
        self.bytes_loaded[number] = self.bytes_loaded.get(number, 0) + nbytes

    def _table(self, buffers: Buffers, coming: Coming) -> Tensor:
        """Where the kernels of a call read each view of each sample: int64 ``[views, B]`` on the host."""
        table = newest(coming.source, self.batch, self.wants.views)
        for kind, rows in self._rows_of.items():
            if rows and not coming.reach[kind].in_place:
                table[rows] = [buffers.begins[self.wants.views[row]] for row in rows]
        return torch.from_numpy(table)

    # What moves where

    def _plan(self, kind: Kind, each: Links, depth: int) -> tuple[Moves, np.ndarray]:
        """The pairs of source and goal row, the same for all calls while the same rows were recorded; and how many
        elements they are of each slot and sample, int64 ``[slots, B]``."""
        key = kind, depth, each.names
        if key not in self._moves:
            lists: dict[Any, int] = {}
            pairs: list[list[Tensor]] = []
            chosen = []
            for row, slot in enumerate(self._slots[kind]):
                shape = self.wants.level(slot), self.wants.shapes[slot][0]
                wanted = *shape, tuple(names[row] if names else None for names in each.names)
                if wanted not in lists:
                    lists[wanted] = len(pairs)
                    pairs.append([self._pairs(*shape, each.index(row, n), n) for n in range(self.batch)])
                chosen.append(lists[wanted])
            widths = [self.wants.shapes[slot][1] for slot in self._slots[kind]]
            lengths = np.array([[len(piece) for piece in pairs[of]] for of in chosen], np.int64)
            moves = plan_moves(pairs, chosen, widths, self.batch, self.device)
            self._moves[key] = moves, lengths * np.array(widths, np.int64)[:, None]
        return self._moves[key]

    def _pairs(self, level: Level | None, rows: int, index: Tensor | None, sample: int) -> Tensor:
        """Source and goal rows of one sample, int ``[n, 2]``; ``index``: the rows that an overlay has."""
        wanted = torch.arange(rows)
        if level is not None:
            wanted = self._halos.positions[level][sample % len(self._halos.positions[level])]
        goals = torch.arange(len(wanted))
        if index is None:
            return torch.stack([wanted, goals], 1)
        index = index.cpu()  # [N], padded with R
        found = torch.full((rows,), -1)
        found[index[index < rows]] = torch.arange(len(index))[index < rows]
        return torch.stack([found[wanted], goals], 1)[found[wanted] >= 0]

    # Reading by a thread

    def _read_ahead(self, number: int) -> None:
        """Have a thread read what the device cannot reach, for this call and the next ones."""
        for ahead in range(number, number + AHEAD):
            coming = self._look(ahead)
            for kind in self._slots:
                if coming is None or coming.reach[kind].in_place or coming.reach[kind].by_address:
                    continue
                if (ahead, kind) not in self._reading:
                    if self._thread is None:
                        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fisedit-read")
                    self._reading[ahead, kind] = self._thread.submit(
                        trace.carry(self._read), ahead, kind, coming.source
                    )

    def _read(self, number: int, kind: Kind, source: Source) -> Tensor:
        """The rows of one kind as they lie in the buffers: uint8 on the host, page-locked for a GPU."""
        counted: dict[str, int] = {}
        with trace.span("disk", f"read {kind}, call {number + 1}", args=counted), torch.no_grad():
            on_host, rows = source.on(torch.device("cpu")), {}
            for slot in self._slots[kind]:
                level = self.wants.level(slot)
                rows[slot] = on_host.load(slot, None if level is None else self._halos.index(level))
            layout = Layout.of(rows)
            data, _ = self.tiers.pool.take(layout.nbytes)
            layout.write(data, rows)
            counted["bytes"] = layout.nbytes
            return data


def _begins(value: Tensor) -> list[int]:
    """The address of each sample's rows."""
    return [value.data_ptr() + number * value[0].nbytes for number in range(len(value))]
