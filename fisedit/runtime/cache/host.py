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

    Args:
        pin: whether slabs are page-locked, so that a GPU reads and writes them beside its computing.
    """

    pin: bool
    used: int = 0
    _idle: dict[int, list[Slab]] = field(default_factory=lambda: defaultdict(list))
    _lock: threading.RLock = field(default_factory=threading.RLock)  # a finalizer may come at any point

    @property
    def idle(self) -> int:
        """Bytes of slabs that wait to be used again."""
        return sum(size * len(slabs) for size, slabs in self._idle.items())

    def take(self, nbytes: int) -> tuple[Tensor, Slab]:
        """Memory uint8 ``[nbytes]``, and its slab. It goes back to the pool when the last view of it is gone.

        Raises:
            MemoryError: the machine has none left.
        """
        with self._lock:
            slab = self._idle[nbytes].pop() if self._idle.get(nbytes) else None
        if slab is None:
            slab = self._make(nbytes)
        slab.wait()
        view = memoryview(slab.memory)
        # The tensor's storage holds the view: when no tensor needs the memory any more, the view goes, and tells.
        weakref.finalize(view, self._give_back, slab).atexit = False
        with self._lock:
            self.used += nbytes
        return torch.frombuffer(view, dtype=torch.uint8, count=nbytes), slab

    def trim(self) -> None:
        """Give slabs that nobody uses back to the machine."""
        with self._lock:
            slabs = [slab for of_size in self._idle.values() for slab in of_size]
            self._idle.clear()
        for slab in slabs:
            slab.wait()

    def _give_back(self, slab: Slab) -> None:
        with self._lock:
            self.used -= slab.nbytes
            self._idle[slab.nbytes].append(slab)

    def _make(self, nbytes: int) -> Slab:
        try:
            memory = mmap.mmap(-1, max(nbytes, 1))
        except OSError as error:
            raise MemoryError(f"no {nbytes / 2**20:.0f} MiB of host memory left ({error})") from error
        if nbytes > SMALL and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        slab = Slab(memory, nbytes, pinned=False)
        if self.pin and nbytes:
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
