"""Launch Triton kernels, or only compile them: all that a graph needs, side by side, before its first run."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from fisedit.runtime.progress import Progress

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Rehearsal:
    """A call of a graph that runs none of its kernels, but has them compiled.

    Attributes:
        decide: whether what can be done in several ways is timed now; else the ways to time are compiled.
        news: whether anything was compiled, or is left to be decided.
        skipped: whether a library was to do anything that it did not do.
        seen: what was prepared already, of the ops that are alike.
        progress: is told of each shape of a layer that is to be timed.
        made: of the ops that can be done in several ways, what makes results like theirs. last: the one before.
    """

    decide: bool
    news: bool = False
    skipped: bool = False
    seen: set[Hashable] = field(default_factory=set)
    made: dict[Hashable, Callable[[], Any]] = field(default_factory=dict)
    last: Any = None
    progress: Progress | None = None

    def first(self, form: Hashable) -> bool:
        """Whether ``form`` was not seen before; it is now."""
        known = form in self.seen
        self.seen.add(form)
        return not known

    def once(self, form: Hashable, run: Callable[[], Any]) -> Any:
        """What ``run`` gives; where that was run for the same ``form``, only memory laid out alike. A model's layers
        repeat themselves, and to prepare a launch takes about as long as to make one."""
        if form in self.made:
            return self.made[form]()
        made = run()
        self.made[form] = results_like(made)
        return made


def results_like(made: Tensor | tuple[Tensor, ...]) -> Callable[[], Any]:
    """Makes tensors that lie as those of ``made`` do, without keeping them; one that is there twice stays one."""
    several = isinstance(made, tuple)
    parts: Sequence[Tensor] = made if isinstance(made, tuple) else [made]
    firsts = [next(place for place, other in enumerate(parts) if other is part) for part in parts]
    facts = [(part.shape, part.stride(), part.dtype, part.device) for part in parts]

    def again() -> Any:
        new = [torch.empty_strided(size, step, dtype=dtype, device=device) for size, step, dtype, device in facts]
        return tuple(new[first] for first in firsts) if several else new[0]

    return again


_rehearsal: ContextVar[Rehearsal | None] = ContextVar("fisedit_rehearsal", default=None)
LOADERS = 16
"""Threads that load kernels."""


def launch(kernel: Any, grid: Sequence[int], *args: Any, **kwargs: Any) -> None:
    """Run ``kernel`` for a ``grid``; in a rehearsal, have it compiled instead, and its code loaded if it is already."""
    if _rehearsal.get() is None:
        kernel[tuple(grid)](*args, **kwargs)
        return
    from triton.compiler import CompiledKernel

    made = kernel.run(*args, grid=grid, warmup=True, **kwargs)
    if isinstance(made, CompiledKernel):
        load(made)


def load(kernel: Any) -> None:
    """Have a kernel's code on the current GPU, and what launches it, which Triton 3.6 has a C compiler make."""
    from triton.runtime.errors import OutOfResources

    with suppress(OutOfResources):  # of the GPU: who runs it will see
        _ = kernel.run


def load_all(kernels: Iterable[Any]) -> None:
    """:func:`load` each, side by side: no later mask, whose sizes choose others of them, waits for that."""
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        with ThreadPoolExecutor(LOADERS, initializer=torch.cuda.set_device, initargs=(device,)) as threads:
            list(threads.map(load, kernels))


def cdiv(number: int, by: int) -> int:
    """A quotient, rounded up: ``triton.cdiv`` takes many times as long outside of a kernel."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def overlaps(tensor: Tensor) -> bool:
    """Whether kernels on a tensor's device may start before those before them end (programmatic dependent launch)."""
    return tensor.is_cuda and _overlaps(tensor.device)


@cache
def _overlaps(device: torch.device) -> bool:
    """Each launch asks, and PyTorch would look it up each time."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def has_descriptors(tensor: Tensor) -> bool:
    """Whether tiles of tensors can be read by descriptor on a tensor's device: TMA, or the interpreter's stand-in."""
    return overlaps(tensor) or not tensor.is_cuda


def is_aligned(rows: Tensor) -> bool:
    """Whether a descriptor can be made of ``[..., N, C]``."""
    return rows.stride(-2) * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0


class CachedByGpu(Generic[P, T]):
    """A function that asks of the current GPU, computed once for each GPU and arguments."""

    __wrapped__: Callable[P, T]

    def __init__(self, function: Callable[P, T]) -> None:
        update_wrapper(self, function)
        self._known: dict[Hashable, T] = {}

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> T:
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        key = (gpu, arguments, *named.items())
        if key not in self._known:
            self._known[key] = self.__wrapped__(*arguments, **named)
        return self._known[key]

    def cache_clear(self) -> None:
        self._known.clear()


@CachedByGpu
def starts_early() -> bool:
    """Whether programs of a kernel start where there is room while the one before it ends, on the current GPU; without
    one, on an H100."""
    return not torch.cuda.is_available() or _overlaps(torch.device("cuda", torch.cuda.current_device()))


@CachedByGpu
def specializes() -> bool:
    """Whether warps of a kernel can have tasks of their own on the current GPU, a Hopper; without one, as on an H100.
    That is written in Gluon, which may change with each Triton: these are known to compile it."""
    from triton import __version__

    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == 9
    return hopper and re.match(r"3\.[67]\.", __version__) is not None


@CachedByGpu
def shared_memory(programs: int = 1) -> int:
    """Bytes that so many programs of a multiprocessor of the current GPU can have together, each of which takes one KB
    besides; without a GPU, of an H100."""
    found = 228 * 1024
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_multiprocessor
    return found - 1024 * programs


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 0 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def current() -> Rehearsal | None:
    """The rehearsal that this call belongs to."""
    return _rehearsal.get()


@contextmanager
def rehearse(compilers: Executor, decide: bool = False, progress: Progress | None = None) -> Iterator[Rehearsal]:
    """Launches inside compile on all processors at once and run nothing; all are loaded when the block ends."""
    from triton import AsyncCompileMode

    rehearsal = Rehearsal(decide, progress=progress)
    token = _rehearsal.set(rehearsal)
    try:
        with AsyncCompileMode(compilers) as mode:
            yield rehearsal
            rehearsal.news |= bool(mode.raw_futures)
        load_all([future.result() for future in mode.future_kernels.values()])
    finally:
        _rehearsal.reset(token)


@contextmanager
def for_real() -> Iterator[None]:
    """Launches inside run, in the middle of a rehearsal; what they need is compiled already."""
    token = _rehearsal.set(None)
    try:
        yield
    finally:
        _rehearsal.reset(token)
