"""Host memory for recorded values: page-locked where a GPU copies from and to it, in slabs that are used again."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisedit.warnings import PageableMemoryWarning, warn

SMALL = 1 << 16
"""Bytes up to which a slab is not worth huge pages."""


def slab_size(nbytes: int) -> int:
    """``nbytes`` rounded up by an eighth at most, so that the sizes of slabs come again."""
    step = max(4096, (1 << max(nbytes - 1, 1).bit_length()) // 16)
    return max(-(-nbytes // step) * step, step)


@dataclass(eq=False)
class Slab:
    """A piece of host memory. ``pending``: events of copies that may still read or write it."""

    memory: mmap.mmap
    nbytes: int
    pinned: bool
    pending: list[torch.cuda.Event] = field(default_factory=list)

    def wait(self) -> None:
        """Wait for the copies from and to it."""
        for event in self.pending:
            event.synchronize()
        self.pending.clear()


@dataclass
class HostPool:
    """Slabs by size: those of a recording that was dropped serve the next one, for pages cost time to make.

    It never holds more than was once used at the same time.

    Args:
        pin: whether slabs are page-locked, so that a GPU reads and writes them beside its computing.
    """

    pin: bool
    used: int = 0
    idle: int = 0
    most: int = 0
    _idle: dict[int, list[Slab]] = field(default_factory=lambda: defaultdict(list))
    _lock: threading.RLock = field(default_factory=threading.RLock)  # a finalizer may come at any point

    def take(self, nbytes: int) -> tuple[Tensor, Slab]:
        """Memory uint8 ``[nbytes]``, and its slab. It goes back to the pool when the last view of it is gone.

        Raises:
            MemoryError: the machine has none left.
        """
        size = slab_size(nbytes)
        with self._lock:
            slab = self._idle[size].pop() if self._idle.get(size) else None
            self.idle -= size if slab is not None else 0
        if slab is None:
            slab = self._make(size)
        slab.wait()
        view = memoryview(slab.memory)
        # The tensor's storage holds the view: when no tensor needs the memory any more, the view goes, and tells.
        weakref.finalize(view, self._give_back, slab).atexit = False
        with self._lock:
            self.used += size
            self.most = max(self.most, self.used)
            while self.used + self.idle > self.most:
                self._drop_one()
        return torch.frombuffer(view, dtype=torch.uint8, count=nbytes), slab

    def trim(self) -> None:
        """Give slabs that nobody uses back to the machine."""
        with self._lock:
            while self.idle:
                self._drop_one()
            self.most = self.used

    def _drop_one(self) -> None:
        size = next(size for size, slabs in self._idle.items() if slabs)
        self.idle -= size
        self._idle[size].pop().wait()

    def _give_back(self, slab: Slab) -> None:
        with self._lock:
            self.used -= slab.nbytes
            self.idle += slab.nbytes
            self._idle[slab.nbytes].append(slab)

    def _make(self, nbytes: int) -> Slab:
        try:
            memory = mmap.mmap(-1, nbytes)
        except OSError as error:
            raise MemoryError(f"no {nbytes / 2**20:.0f} MiB of host memory left ({error})") from error
        if nbytes > SMALL and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        slab = Slab(memory, nbytes, pinned=False)
        if self.pin:
            torch.frombuffer(memory, dtype=torch.uint8).fill_(0)  # several threads touch the pages: locking uses one
            if (reason := _lock_pages(memory)) is None:
                slab.pinned = True
                # Before the memory goes: the address may come again, and cannot be locked twice.
                weakref.finalize(slab, _unlock_pages, memory).atexit = False
            else:
                self.pin = False
                warn(
                    f"The host's memory could not be page-locked ({reason}); recorded values that lie there are "
                    "copied through ordinary memory, which is slower. Raise the limit (ulimit -l) or lower "
                    "CacheConfig.host.",
                    PageableMemoryWarning,
                )
        return slab


def _lock_pages(memory: mmap.mmap) -> str | None:
    """Page-lock memory for all GPUs; why not, if that fails."""
    runtime: Any = torch.cuda.cudart()
    begin = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    error = runtime.cudaHostRegister(begin, len(memory), 0)
    if int(error) == 0:
        return None
    with suppress(RuntimeError):  # CUDA keeps the error for whoever asks next: that is here, not somewhere else
        torch.zeros(1, device="cuda")
    return f"CUDA error {int(error)}"


def _unlock_pages(memory: mmap.mmap) -> None:
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(torch.frombuffer(memory, dtype=torch.uint8).data_ptr())


def available_host_memory() -> int:
    """Bytes of memory that programs can still take."""
    import os

    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pages = getattr(os, "sysconf", lambda name: 0)("SC_PHYS_PAGES") or 2**21
        return pages * 4096 // 2
