"""What ran when: spans that library code marks for the trace that is open, if one is.

``with span("load", "step 12", device, {"bytes": n}): ...`` costs one look-up of a context variable while no trace is
open. :func:`fisedit.trace` opens one and writes it to a file.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

import torch

from fisedit.runtime.timing import Moment, now, seconds_between

P = ParamSpec("P")
R = TypeVar("R")

TRACKS = ("compute", "store", "load", "disk")
"""The rows of a trace in their order; others may follow."""
NEAR = 4.0
"""Seconds from its reference within which a GPU's clock is good to half a microsecond, see :class:`_Clock`."""
HOST = torch.device("cpu")

_active: ContextVar[Trace | None] = ContextVar("fisedit_trace", default=None)
_NOTHING: AbstractContextManager[None] = nullcontext()


def span(
    track: str, name: str, device: torch.device | None = None, args: dict[str, Any] | None = None
) -> AbstractContextManager[None]:
    """Mark what is done inside the block, if a trace is open; see :meth:`Trace.span`."""
    trace = Trace.active()
    return _NOTHING if trace is None else trace.span(track, name, device, args)


def carry(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` for another thread to call: its spans go to the trace that is open here, now.

    A thread begins without a trace. What it is given to do is carried, one by one:
    ``pool.submit(carry(read), path)``, or ``queue.put(carry(job))``.
    """
    trace = Trace.active()
    if trace is None:
        return function

    @functools.wraps(function)
    def carried(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _active.set(trace)
        try:
            return function(*args, **kwargs)
        finally:
            _active.reset(token)

    return carried


@dataclass(frozen=True)
class Marked:
    """A span of a trace.

    Attributes:
        track: the row it belongs to. device: whose time it is, ``None`` for the host's.
        args: what else is known of it. thread: the thread that asked for it.
        start, end: seconds since the trace was opened.
    """

    track: str
    name: str
    device: torch.device | None
    args: dict[str, Any]
    thread: int
    start: float = 0.0
    end: float = 0.0


class Trace:
    """The spans that are marked while it is open, by all threads that work for it.

    Args:
        name: what the user calls it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._opened = time.perf_counter()
        self._closed = False
        self._marks: list[tuple[Marked, Moment, Moment]] = []  # threads only append, which needs no lock
        self._clocks: dict[torch.device | None, _Clock] = {}

    @staticmethod
    def active() -> Trace | None:
        """The trace that is open in this thread or task."""
        trace = _active.get()
        return None if trace is None or trace._closed else trace

    @contextmanager
    def open(self) -> Iterator[None]:
        """Have the calls inside the block mark their spans here."""
        token = _active.set(self)
        try:
            yield
        finally:
            self._closed = True  # for threads that go on
            _active.reset(token)

    @contextmanager
    def span(
        self, track: str, name: str, device: torch.device | None = None, args: dict[str, Any] | None = None
    ) -> Iterator[None]:
        """Mark what is asked of a device inside the block, also if it fails.

        On a GPU that is what its current stream does between the block's beginning and end. Nobody waits for it.

        Args:
            track: the row to show it in: one of :data:`TRACKS`, or another.
            device: ``None`` for what the host does.
            args: numbers and words to show with it; the block may still add to them.
        """
        where, failed = device or HOST, {}
        if where.type == "cuda":
            if torch.cuda.is_current_stream_capturing():  # the events would become a part of the graph
                yield
                return
            if where not in self._clocks:
                self._clocks[where] = _Clock.of(where, self._opened)
        first = now(where)
        try:
            yield
        except BaseException as error:
            failed = {"error": type(error).__name__}
            raise
        finally:
            marked = Marked(track, name, device, {**(args or {}), **failed}, threading.get_ident())
            self._marks.append((marked, first, now(where)))

    def spans(self) -> list[Marked]:
        """All spans that are over, in the order they were closed. Waits for GPUs that are not done with them."""
        host, clocks = _Clock(self._opened, 0.0), {device: replace(clock) for device, clock in self._clocks.items()}
        spans = []
        for marked, first, last in list(self._marks):
            clock = clocks.get(marked.device, host)
            start, end = clock.read(first), clock.read(last)
            spans.append(replace(marked, start=start, end=max(start, end)))
        return spans


@dataclass
class _Clock:
    """Tells when a moment was, by the time between it and a reference.

    CUDA gives that time in milliseconds as float32: ten minutes away it is 60 µs coarse. So the reference moves along.

    Attributes:
        reference: a moment. seconds: when it was, in seconds since the trace was opened.
    """

    reference: Moment
    seconds: float

    @staticmethod
    def of(gpu: torch.device, opened: float) -> _Clock:
        """A clock whose reference is now: on a stream of its own, so that no work is waited for."""
        stream = torch.cuda.Stream(gpu)
        with torch.cuda.stream(stream):
            reference = now(gpu)
        stream.synchronize()
        return _Clock(reference, time.perf_counter() - opened)

    def read(self, moment: Moment) -> float:
        """When a moment was, in seconds since the trace was opened. Waits for a GPU that has not come to it."""
        passed = seconds_between(self.reference, moment)
        if passed > NEAR:
            self.reference, self.seconds, passed = moment, self.seconds + passed, 0.0
        return self.seconds + passed
