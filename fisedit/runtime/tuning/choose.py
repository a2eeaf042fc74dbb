"""Run an op in the fastest of its ways: they are timed where a shape is met for the first time, and remembered."""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from triton.runtime.errors import OutOfResources

from fisedit.runtime.calibration import Measure, Timings, grid, points, time_on_gpu
from fisedit.runtime.kernels.launch import current, for_real
from fisedit.runtime.row_plan import SMALLEST

RULE = "rule"
"""The way of an op's own kernel, by its own rule: taken where nothing is known."""
LARGEST_SHARE = 0.9
"""Of a level's positions: with more active rows, a call is expected to run dense."""


class Call(Protocol):
    """An op with its arguments.

    Attributes:
        kind, key: its shape, all but the number of rows: what its timings are kept by.
        number: rows of each sample, padding included.
        positions: of its level.
    """

    kind: str
    key: tuple[str, ...]
    number: int
    positions: int

    def ways(self, number: int) -> Sequence[Hashable]:
        """Those worth timing for about ``number`` rows of each sample; :data:`RULE` is among them."""
        ...

    def run(self, way: Hashable) -> Any: ...

    def rehearse(self, way: Hashable) -> Any:
        """Compile, in a rehearsal, what a way is timed with; something like its result."""
        ...

    def prepare(self, ways: Mapping[int, Hashable]) -> None:
        """Have compiled, in a rehearsal, what other numbers of rows will run: ``ways`` by number."""
        ...

    def stopwatch(self) -> Measure:
        """What times its ways for other numbers of rows as well."""
        ...


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


def run_fastest(call: Call, timings: Timings, measure: Measure | None = None) -> Any:
    """Compute an op; a shape that is met for the first time is timed before, as :func:`choose_way` says.

    In a rehearsal that decides nothing, all its ways are compiled instead.
    """
    rehearsal = current()
    if rehearsal is not None and not rehearsal.decide and (unknown := unknown_ways(call, timings)):
        rehearsal.news = True
        made = {way: call.rehearse(way) for way in dict.fromkeys(way for ways in unknown.values() for way in ways)}
        return made[RULE]
    with for_real():
        way = choose_way(call, timings, measure)
    if rehearsal is not None and rehearsal.decide:
        call.prepare({number: fastest(call, number, timings) for number in numbers(call)})  # no other mask will wait
    return call.run(way)


def choose_way(call: Call, timings: Timings, measure: Measure | None = None) -> Hashable:
    """The fastest way of a call; the rule where nothing is known and can be timed.

    What is not known is timed, except while a CUDA graph is captured: run it once before.

    Args:
        measure: instead of the call's stopwatch.
    """
    settled = timings.settled(call.kind, call.key, call.number)
    if settled is not None:
        return settled
    if ways := unknown_ways(call, timings):
        timings.fill(call.kind, call.key, ways, measure or call.stopwatch())
        timings.save()  # a process that is killed keeps them
    way = fastest(call, call.number, timings)
    if timings.times(call.kind, call.key, call.number):
        timings.settle(call.kind, call.key, call.number, way)
    return way


def fastest(call: Call, number: int, timings: Timings) -> Hashable:
    """The fastest known way; the rule where nothing is known."""
    return timings.best(call.kind, call.key, number, call.ways(number), None, default=RULE)


def unknown_ways(call: Call, timings: Timings) -> dict[int, Sequence[Hashable]]:
    """What is to be timed before a call is computed: ways by numbers of rows; nothing if they are known.

    All numbers of rows that its level can have are among them, so that no other mask meets anything new.
    """
    if timings.settled(call.kind, call.key, call.number) is not None:
        return {}
    if timings.calibrate == "off" or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return {}
    known = timings.times(call.kind, call.key, grid(call.number))
    if all(str(way) in known for way in call.ways(grid(call.number))):
        return {}
    return {number: call.ways(number) for number in numbers(call)}


def numbers(call: Call) -> list[int]:
    """The numbers of rows that are timed: the present, and those of masks for which an edit is sparse."""
    largest = round(LARGEST_SHARE * call.positions)
    return sorted({grid(call.number), *(number for number in points(largest) if number >= SMALLEST)})


def time_way(runs: Sequence[Callable[[], object]]) -> float:
    """µs of a way, by the same call over different copies of what it reads; infinite if the GPU has too little."""
    try:
        return time_on_gpu(*runs, calls=6, replays=3)
    except (OutOfResources, torch.OutOfMemoryError):
        return math.inf
