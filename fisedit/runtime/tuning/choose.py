"""Run an op in the fastest of its ways: they are timed where a shape is met for the first time, and remembered."""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from triton.runtime.errors import OutOfResources

from fisedit.runtime.calibration import Measure, Shape, Timings, time_on_gpu
from fisedit.runtime.kernels.launch import Rehearsal, current, for_real

ALIGNMENT = 256
"""Bytes: libraries choose kernels by what addresses are multiples of, up to so many; Triton compiles for 16."""
SAVE_EVERY = 2.0
"""Seconds at least between two times that the table is written: it is written whole, after hundreds of layers."""
RULE = "rule"
"""The way of an op's own kernel, by its own rule: taken where nothing is known."""


class Call(Protocol):
    """An op with its arguments.

    Attributes:
        given: the arguments by name.
        shape: all but the number of rows.
        number: rows of each sample, padding included.
        numbers: all that it can be in a sparse edit, for which the ways are timed together.
    """

    given: Mapping[str, Any]

    @property
    def shape(self) -> Shape: ...

    @property
    def number(self) -> int: ...

    @property
    def numbers(self) -> tuple[int, ...]: ...

    @property
    def form(self) -> Hashable:
        """What compiled kernels depend on, and the numbers of rows."""
        ...

    def variant(self, way: Hashable) -> Hashable:
        """Of the ways that the same compiled kernels run, always the same one."""
        ...

    def run(self, way: Hashable) -> Any: ...

    def rehearse(self, way: Hashable) -> Any:
        """Compile, in a rehearsal, what a way is timed with; something like its result."""
        ...

    def prepare(self, ways: Iterable[Hashable]) -> None:
        """Have compiled, in a rehearsal, what other numbers of rows will run."""
        ...

    def stopwatch(self, front: Front | None) -> Measure:
        """What times its ways for other numbers of rows as well, between other kernels; ``front`` is the op before."""
        ...


@dataclass(frozen=True)
class Front:
    """The op in front of another one, what it made, and what is known of its ways."""

    call: Call
    made: Any
    timings: Timings

    def way(self, number: int) -> Hashable:
        """How it is computed for so many rows."""
        return fastest(self.timings.expect(self.call.shape, number))


def timings_of(device: torch.device) -> Timings:
    """The timings of a device, which are saved when the process ends."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _loaded(device)


@cache
def _loaded(device: torch.device) -> Timings:
    timings = Timings.load(device)
    atexit.register(timings.save)
    return timings


def run_fastest(call: Call, timings: Timings, measure: Measure | None = None, others: Sequence[Call] = ()) -> Any:
    """Compute an op; a shape that is met for the first time is timed before, as :func:`choose_way` says.

    In a rehearsal that decides nothing, all its ways are compiled instead.

    Args:
        others: what computes the same in ways that take other numbers of rows.
    """
    rehearsal, calls = current(), [call, *others]
    if rehearsal is None:
        chosen, way = choose_call(calls, timings, measure)
        return chosen.run(way)
    layout = tuple(layout_of(each.given) for each in calls)
    made = rehearsal.once(layout, lambda: _rehearse(rehearsal, calls, timings, measure))
    rehearsal.last = Front(call, made, timings)
    return made


def _rehearse(rehearsal: Rehearsal, calls: Sequence[Call], timings: Timings, measure: Measure | None) -> Any:
    unknown, progress = [unknown_ways(call, timings) for call in calls], rehearsal.progress
    if any(unknown) and not rehearsal.decide:
        rehearsal.news = True
        made = [_compile(rehearsal, call, ways) for call, ways in zip(calls, unknown, strict=True) if ways]
        return made[0]
    with for_real():
        chosen, way = choose_call(calls, timings, measure, rehearsal.last)
    for ways in unknown:
        if ways and progress is not None:
            progress.done()
    for call in calls if rehearsal.decide else ():
        if rehearsal.first(call.form):  # no other mask will wait
            call.prepare({call.variant(fastest(timings.expect(call.shape, number))) for number in call.numbers})
    return chosen.run(way)


def _compile(rehearsal: Rehearsal, call: Call, unknown: Mapping[int, Sequence[Hashable]]) -> Any:
    """Ways that are to be timed; something like their result."""
    if rehearsal.progress is not None and rehearsal.first((call.shape, call.numbers)):
        rehearsal.progress.expect()
    variants = list(dict.fromkeys(call.variant(way) for ways in unknown.values() for way in ways))
    made = [call.rehearse(way) for way in (variants if rehearsal.first(call.form) else variants[:1])]
    return made[0]


def choose_call(
    calls: Sequence[Call], timings: Timings, measure: Measure | None = None, front: Front | None = None
) -> tuple[Call, Hashable]:
    """Of calls that compute the same the fastest, and its way: the first one where nothing is known of it."""
    ways = [choose_way(call, timings, measure, front) for call in calls]
    times = [timings.time(call.shape, call.number, way) for call, way in zip(calls, ways, strict=True)]
    known = [math.inf if time is None else time for time in times]
    best = known.index(min(known)) if times[0] is not None else 0
    return calls[best], ways[best]


def choose_way(call: Call, timings: Timings, measure: Measure | None = None, front: Front | None = None) -> Hashable:
    """The fastest way of a call; the rule where nothing is known and can be timed.

    What is not known is timed, except while a CUDA graph is captured: run it once before.

    Args:
        measure: instead of the call's stopwatch. front: the op before.
    """
    settled = timings.settled(call.shape, call.number)
    if settled is not None:
        return settled
    if unknown_ways(call, timings):
        timings.fill(call.shape, call.numbers, measure or call.stopwatch(front))
        timings.save(SAVE_EVERY)  # a process that is killed keeps them
    expected = timings.expect(call.shape, call.number)
    way = fastest(expected)
    if expected:
        timings.settle(call.shape, call.number, way)
    return way


def fastest(expected: Mapping[Hashable, float]) -> Hashable:
    """Of what ways are expected to take; the rule where nothing is known."""
    return min(expected, key=expected.__getitem__) if expected else RULE


def unknown_ways(call: Call, timings: Timings) -> dict[int, list[Hashable]]:
    """What is to be timed before a call is computed: ways by numbers of rows; nothing if they are known.

    All numbers that its level can be padded to are among them, so that no other mask meets anything new.
    """
    if timings.settled(call.shape, call.number) is not None:
        return {}
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return {}
    return timings.unknown(call.shape, call.numbers)


def form_of(given: Mapping[str, Any], of_tensor: Callable[[torch.Tensor], Hashable] = lambda t: t.dtype) -> Hashable:
    """Arguments, of whose tensors nothing counts but what ``of_tensor`` gives."""

    def form(value: Any) -> Hashable:
        if isinstance(value, torch.Tensor):
            return of_tensor(value)
        return form_of(value, of_tensor) if isinstance(value, dict) else value

    return tuple([(name, form(value)) for name, value in given.items()])


def layout_of(given: Mapping[str, Any]) -> Hashable:
    """Arguments with how their tensors lie in memory: all that launches depend on, but for values and addresses."""
    return form_of(given, lambda t: (t.dtype, t.shape, t.stride(), t.data_ptr() % ALIGNMENT))


def time_way(runs: Sequence[Callable[[], object]]) -> float:
    """µs of a way, by the same call over different copies of what it reads; infinite if the GPU has too little."""
    try:
        return time_on_gpu(*runs, calls=6, replays=3)
    except (OutOfResources, torch.OutOfMemoryError):
        return math.inf
