"""Tiers of memory for recorded values: what lies where, what moves when memory fills, and what was done.

The order of tiers is the GPU, the host (page-locked for a GPU), the disk. A new block takes the first tier that has
room, or where blocks that matter less can make room: ``keys`` are read whole in every call and stay on the GPU
longest; of ``maps`` only few rows cross the bus; ``queries`` are only read while a mask is sought.
"""

from __future__ import annotations

import itertools
import shutil
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fisedit.errors import CacheWriteError
from fisedit.runtime.cache.block import Block, Kind, Layout, Tier
from fisedit.runtime.cache.disk import own_folder, write_tensors
from fisedit.runtime.cache.host import HostPool, Slab, available_host_memory
from fisedit.runtime.cache.keys import Bandwidth
from fisedit.runtime.trace import carry, span
from fisedit.warnings import CacheSpaceWarning, warn

Place = Literal["gpu", "host", "disk"]
PRIORITY: dict[Kind, int] = {"queries": 0, "maps": 1, "keys": 2, "small": 3}
"""What moves first when a tier is full. ``small`` never moves."""
SHARE = {"gpu": 0.6, "host": 0.5}
"""Of the memory that is free, or holds recorded values, when a recording begins: the budgets by default."""
BUS, CLOCK = 55e9, 1.755e9
"""Bytes a second of the bus, and cycles of the GPU's clock, of an H100: to imitate slower ones."""
WRITING = 3
"""Blocks that wait for the disk at once; a recording that is ahead by more waits."""


@dataclass(frozen=True)
class Budgets:
    """Bytes for recorded values on the GPU and the host, a folder for the rest; ``None``: by what is free, no disk."""

    gpu: int | None = None
    host: int | None = None
    disk: Path | None = None


@dataclass(eq=False)
class Ring:
    """GPU memory that recorded values pass through on their way to the host: used again when its copy is over.

    Whoever takes a piece whose copy is not over makes the compute stream wait for it, not the host: a recording that
    is faster than the bus is slowed down to it, and needs no more memory.
    """

    depth: int
    began: int = 0  # by the clock of reads: blocks last read before are other recordings'
    pieces: dict[int, list[tuple[Tensor, torch.cuda.Event]]] = field(default_factory=dict)

    def take(self, nbytes: int, tiers: Tiers) -> Tensor:
        pieces = self.pieces.setdefault(nbytes, [])
        if len(pieces) < self.depth:
            return tiers.allocate(nbytes)
        data, done = pieces.pop(0)
        torch.cuda.current_stream(tiers.device).wait_event(done)
        return data

    def give_back(self, data: Tensor, done: torch.cuda.Event) -> None:
        self.pieces[data.numel()].append((data, done))


class Tiers:
    """The memory for the recordings of one compiled model on one device.

    Args:
        budgets: what may be used.
        device: where the model computes. On a CPU its memory is the host's.
    """

    def __init__(self, budgets: Budgets, device: torch.device) -> None:
        self.device, self.budgets = device, budgets
        self.on_gpu = device.type == "cuda"
        self.order: list[Place] = ["gpu", "host"] if self.on_gpu else ["host"]
        self.order += ["disk"] if budgets.disk is not None else []
        self.pool = HostPool(pin=self.on_gpu)
        self.bus: float | None = None
        self.moved: Counter[tuple[Kind, Place, Place]] = Counter()
        self.notes: list[str] = []
        self._told: set[str] = set()
        self._limits: dict[Place, int] = {}
        self._blocks: dict[int, weakref.ref[Block]] = {}
        self._clock = itertools.count(1)
        self._lock = threading.RLock()
        self._stores: torch.cuda.Stream | None = None
        self._folder: Path | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._writing: list[Future[None]] = []
        self._disk_failure: str | None = None

    @cached_property
    def bandwidth(self) -> Bandwidth | None:
        """Of the bus to the GPU and of its memory, measured once; ``None`` on a CPU."""
        return Bandwidth.measure(self.device) if self.on_gpu else None

    # What is where

    def limit(self, place: Place) -> int:
        """The budget of a tier in bytes, what it holds included; the disk has none."""
        if place == "disk":
            return 1 << 62
        if place not in self._limits:
            given = self.budgets.gpu if place == "gpu" else self.budgets.host
            self._limits[place] = given if given is not None else round(SHARE[place] * self._free(place))
        return self._limits[place]

    def _free(self, place: Place) -> int:
        if place == "host":
            return available_host_memory() + self.pool.used + self.pool.idle
        free, _ = torch.cuda.mem_get_info(self.device)
        free += self.held("gpu")
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def blocks(self) -> list[Block]:
        """All blocks that are alive, those that were made first in front."""
        found = [(number, ref()) for number, ref in list(self._blocks.items())]
        for number, block in found:
            if block is None:
                self._blocks.pop(number, None)
        return [block for _, block in found if block is not None]

    def held(self, place: Place) -> int:
        """Bytes of recorded values in a tier."""
        return sum(block.nbytes for block in self.blocks() if place_of(block.tier) == place and block.lost is None)

    def hold(self, blocks: Iterable[Block]) -> None:
        """Let blocks stay where they are, for they will be read, until :meth:`let_go`."""
        with self._lock:
            for block in blocks:
                block.readers, block.used = block.readers + 1, next(self._clock)

    def let_go(self, blocks: Iterable[Block]) -> None:
        with self._lock:
            for block in blocks:
                block.readers -= 1
                if (block.file is not None or block.lost is not None) and not block.readers:
                    block.data = block.slab = block.ready = None

    def ring(self, nbytes: int) -> Ring:
        """What a recording passes values through that makes ``nbytes`` a call: two pieces of each, or one if the
        budget is small."""
        self._disk_failure = None  # it may have room again, and so may others
        self._limits.clear()
        self._told.clear()
        room = self.limit("gpu") - self.held("gpu") if self.on_gpu else 0
        return Ring(2 if 2 * nbytes <= room / 2 else 1, next(self._clock))

    # Placing and moving

    def store(self, kind: Kind, values: Mapping[str, Tensor], ring: Ring) -> Block:
        """Keep copies of values of one kind, on the tier that has room; on the GPU without waiting for it.

        What no tier takes is lost: the block says so, and a warning does, once.
        """
        with self._lock:
            self._warn_of_losses()
            layout, block, failed = Layout.of(values), None, set[Place]()
            put = {"gpu": self._on_gpu, "host": self._on_host, "disk": self._on_disk}
            while block is None and (place := self._choose(kind, layout.nbytes, ring.began, failed)) is not None:
                block = put[place](kind, layout, values, ring)
                failed.add(place)
            if block is None:
                block = Block(kind, layout, "pageable", None, lost=self._why_lost())
            block.used = number = next(self._clock)
            self._blocks[number] = weakref.ref(block)
            return block

    def _choose(self, kind: Kind, nbytes: int, began: int, failed: set[Place]) -> Place | None:
        """The first tier with room for a new block, after others have made it."""
        if kind == "small" and not failed:
            return self.order[0]
        for place in self.order:
            if place in failed or (place == "disk" and self._disk_failure is not None):
                continue
            if self._make_room(place, nbytes, PRIORITY[kind], began):
                return place
        return None

    def _make_room(self, place: Place, nbytes: int, priority: int, began: int = 0) -> bool:
        missing = self.held(place) + nbytes - self.limit(place)
        if missing <= 0:
            return True
        if nbytes > self.limit(place):
            return False
        victims: list[Block] = []
        for block in self._victims(place, priority, began):
            if missing <= 0:
                break
            victims.append(block)
            missing -= block.nbytes
        return missing <= 0 and all(self._move_down(block, place) for block in victims)

    def _victims(self, place: Place, priority: int, began: int = 0) -> list[Block]:
        """Blocks that may leave a tier for one of ``priority``: those that matter less, and as much if they were last
        read before ``began``. In front what matters least, of that what was read longest ago."""
        here = [b for b in self.blocks() if place_of(b.tier) == place and not b.readers and b.lost is None]
        less = [b for b in here if PRIORITY[b.kind] - (b.used < began) < priority and b.kind != "small"]
        return sorted(less, key=lambda block: (PRIORITY[block.kind], block.used))

    def _move_down(self, block: Block, place: Place) -> bool:
        """Move a block to the next tier that takes it; whether one did."""
        for goal in self.order[self.order.index(place) + 1 :]:
            if goal == "disk" and block.mapped is None and self._disk_failure is None:
                if place == "gpu" and not self._move_to_host(block):
                    return False
                self._move_to_disk(block)
            elif goal == "host" and self._make_room("host", block.nbytes, PRIORITY[block.kind]):
                if not self._move_to_host(block):
                    continue
            else:
                continue
            self.moved[block.kind, place, goal] += block.nbytes
            return True
        return self._drop_copy(block, place)

    def spill(self) -> int:
        """Move all that may leave the GPU to other tiers; the bytes that left. For when its memory ran out."""
        with self._lock:
            before = self.held("gpu")
            for block in self._victims("gpu", PRIORITY["small"]):
                self._move_down(block, "gpu")
            if self._stores is not None:
                self._stores.synchronize()
            self._limits["gpu"] = min(self.limit("gpu"), self.held("gpu"))
            torch.cuda.empty_cache()
            left = before - self.held("gpu")
            self.notes.append(f"the GPU's memory ran out: {left / 2**20:.0f} MiB moved off it")
            return left

    # The GPU and the host

    @property
    def stores(self) -> torch.cuda.Stream:
        """The stream of copies to the host."""
        if self._stores is None:
            self._stores = torch.cuda.Stream(self.device)
        return self._stores

    def _on_gpu(self, kind: Kind, layout: Layout, values: Mapping[str, Tensor], ring: Ring) -> Block | None:
        try:
            data = self.allocate(layout.nbytes)
        except torch.OutOfMemoryError:
            return None
        layout.write(data, values)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))
        return Block(kind, layout, "gpu", data, ready=ready)

    def allocate(self, nbytes: int) -> Tensor:
        """Memory uint8 ``[nbytes]`` of the device; recorded values make room, if there is none.

        Raises:
            torch.OutOfMemoryError: there is none even then.
        """
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            self.spill()
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _on_host(self, kind: Kind, layout: Layout, values: Mapping[str, Tensor], ring: Ring) -> Block | None:
        if (taken := self._take(layout.nbytes)) is None:
            return None
        data, slab = taken
        tier: Tier = "pinned" if slab.pinned else "pageable"
        if not self.on_gpu:
            layout.write(data, values)
            return Block(kind, layout, tier, data, slab)
        staging = self._staging(ring, layout.nbytes)
        if staging is None:  # copied at once, value by value: slower, but it needs no memory
            for slot, view in layout.views(data).items():
                view.copy_(values[slot])
            return Block(kind, layout, tier, data, slab)
        layout.write(staging, values)
        ready = self._copy(staging, data, slab, f"store {kind}")
        ring.give_back(staging, ready)
        return Block(kind, layout, tier, data, slab, ready=ready)

    def _take(self, nbytes: int) -> tuple[Tensor, Slab] | None:
        """Host memory; ``None`` if the machine has none left, whatever the budget: no more is asked for then."""
        try:
            return self.pool.take(nbytes)
        except MemoryError as error:
            self.notes.append(str(error))
            self._limits["host"] = min(self.limit("host"), self.held("host"))
            return None

    def _staging(self, ring: Ring, nbytes: int) -> Tensor | None:
        try:
            return ring.take(nbytes, self)
        except torch.OutOfMemoryError:
            return None

    def _copy(self, source: Tensor, data: Tensor, slab: Slab, name: str) -> torch.cuda.Event:
        """Copy from the GPU to the host beside what is computed; the event of its end."""
        computed, ready = torch.cuda.Event(), torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stores):
            self.stores.wait_event(computed)
            with span("store", name, self.device, {"bytes": source.numel()}):
                data.copy_(source, non_blocking=True)
            self.slow_down(source.numel())
            ready.record()
        source.record_stream(self.stores)
        slab.pending.append(ready)
        return ready

    def slow_down(self, nbytes: int) -> None:
        """Imitate a bus of ``bus`` bytes a second after a copy of ``nbytes`` on the current stream (for benches)."""
        if self.bus is not None:
            torch.cuda._sleep(round(nbytes * (1 / self.bus - 1 / BUS) * CLOCK))

    def _move_to_host(self, block: Block) -> bool:
        """Move a block off the GPU, if the host has memory; whether it had."""
        if (taken := self._take(block.nbytes)) is None:
            return False
        data, slab = taken
        with block.lock:
            assert block.data is not None
            source = block.data
            if block.ready is not None:
                torch.cuda.current_stream(self.device).wait_event(block.ready)
            block.ready = self._copy(source, data, slab, f"move {block.kind}")
            block.data, block.slab, block.tier = data, slab, "pinned" if slab.pinned else "pageable"
        return True

    # The disk

    def _on_disk(self, kind: Kind, layout: Layout, values: Mapping[str, Tensor], ring: Ring) -> Block | None:
        block = self._on_host(kind, layout, values, ring)
        if block is not None:
            self._move_to_disk(block)
            return block
        block = Block(kind, layout, "disk", None)  # no memory to keep it in until it is written
        return block if self._write_file(block, values) is None else None

    def _move_to_disk(self, block: Block) -> None:
        """Have a block written to a file by the writer thread; it is read from memory until it is there."""
        self._writing = [job for job in self._writing if not job.done()]
        while len(self._writing) >= WRITING:
            self._writing.pop(0).result()
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="fisedit-disk")
        block.tier = "disk"  # counted there from now on
        self._writing.append(self._writer.submit(carry(self._write), weakref.ref(block)))

    def _write(self, of: weakref.ref[Block]) -> None:
        block = of()
        if block is None:
            return
        failure = self._write_file(block, block.values())
        with block.lock:
            block.lost = failure
            if not block.readers:
                block.data = block.slab = block.ready = None

    def _write_file(self, block: Block, values: Mapping[str, Tensor]) -> str | None:
        """Write a block's values to a file; why not, if that fails."""
        try:
            path = self._new_file()
            with span("disk", f"write {block.kind}", args={"bytes": block.nbytes}):
                checksum = write_tensors(path, values, lasting=False)
        except CacheWriteError as error:
            self._disk_failure = self._disk_failure or str(error)
            return str(error)
        weakref.finalize(block, path.unlink, missing_ok=True)
        block.file, block.checksum = path, checksum
        return None

    def _why_lost(self) -> str:
        budgets = ", ".join(f"{place} {self.limit(place) / 2**30:.1f} GiB" for place in self.order if place != "disk")
        reason = self._disk_failure or f"the budgets are used up ({budgets}{'' if self.budgets.disk else ', no disk'})"
        self._warn_of_losses(reason)
        return reason

    def _warn_of_losses(self, reason: str | None = None) -> None:
        """Warn once of each reason why values were lost; in the thread that records, not in the writer's."""
        reason = reason or self._disk_failure
        if reason is not None and reason not in self._told:
            self._told.add(reason)
            self.notes.append(reason)
            warn(
                f"Recorded values found no place: {reason}. The image is not affected, but the recording is partial "
                "and cannot be edited. Raise the budgets (CacheConfig), give a disk folder with room, or record fewer "
                "steps (CacheConfig.steps).",
                CacheSpaceWarning,
            )

    def _new_file(self) -> Path:
        """A file in a folder of this process; only the writer thread asks for one."""
        assert self.budgets.disk is not None
        if self._folder is None:
            self._folder = own_folder(self.budgets.disk)
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder / f"block-{next(self._clock):08d}.safetensors"

    def finish(self, blocks: Iterable[Block] = ()) -> None:
        """Wait until the blocks of a recording lie where they were sent."""
        for job in list(self._writing):
            job.result()
        self._warn_of_losses()
        for block in blocks:
            if block.ready is not None and place_of(block.tier) != "gpu":
                block.values()

    # Saved bases

    def adopt(self, kind: Kind, values: Mapping[str, Tensor], began: int) -> Block:
        """A block of values that lie mapped in a saved file, from which they are read. For a GPU they are copied to
        the first tier that has room, if one has; what is ``small`` always is, to where the model computes.

        Args:
            began: when the load did, see :class:`Ring`.
        """
        block = Block(kind, Layout.of(values), "disk", None, mapped=values)
        with self._lock:
            failed: set[Place] = set()
            while block.data is None and (self.on_gpu or kind == "small"):
                if (place := self._choose(kind, block.nbytes, began, failed)) in (None, "disk"):
                    break
                self._allocate_copy(block, place)
                failed.add(place)
            block.readers, block.used = 1, next(self._clock)  # it stays there while it is filled, without the lock
            self._blocks[block.used] = weakref.ref(block)
        if block.data is not None:
            block.layout.write(block.data, values)
        self.let_go([block])
        return block

    def _allocate_copy(self, block: Block, place: Place) -> None:
        """Give a block memory of the GPU or the host, if there is some."""
        if place == "gpu":
            with suppress(torch.OutOfMemoryError):
                block.data, block.tier = self.allocate(block.nbytes), "gpu"
        elif (taken := self._take(block.nbytes)) is not None:
            block.data, block.slab = taken
            block.tier = "pinned" if block.slab.pinned else "pageable"

    def _drop_copy(self, block: Block, place: Place) -> bool:
        """Free the memory of a block that can be read from a saved file; whether it can."""
        if block.mapped is None:
            return False
        with block.lock:
            block.data, block.slab, block.ready, block.tier = None, None, None, "disk"
        self.moved[block.kind, place, "disk"] += block.nbytes
        return True

    # What it did

    def describe(self) -> str:
        """Budgets, what they hold, and what was moved, as text."""
        lines = []
        for place in self.order:
            limit = "" if place == "disk" else f" of {self.limit(place) / 2**20:.0f}"
            lines.append(f"{place}: {self.held(place) / 2**20:.0f}{limit} MiB")
        lines += [f"moved {kind} {a} -> {b}: {n / 2**20:.0f} MiB" for (kind, a, b), n in sorted(self.moved.items())]
        return "\n".join(lines + self.notes)


def place_of(tier: Tier) -> Place:
    """The budget that a tier counts to."""
    return "host" if tier == "pinned" or tier == "pageable" else tier
