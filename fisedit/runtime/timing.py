"""How long calls take: by the clock on a CPU, by events on a GPU, which are waited for only when somebody asks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

Moment = torch.cuda.Event | float
"""A point in time: an event of a GPU, or seconds by the clock."""


def now(device: torch.device) -> Moment:
    """The moment when a device is done with what was asked of it so far: on a GPU, on its current stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def wait_for(given: Iterable[Any]) -> None:
    """Wait for the GPUs on which tensors among the arguments of a call lie."""
    for device in {value.device for value in given if isinstance(value, torch.Tensor) and value.is_cuda}:
        torch.cuda.synchronize(device)


def seconds_between(first: Moment, last: Moment) -> float:
    """The time between two moments of one device, in seconds. Waits for a GPU that has not come to the last."""
    if isinstance(first, float) and isinstance(last, float):
        return last - first
    assert isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event)
    last.synchronize()
    return first.elapsed_time(last) * 1e-3


@dataclass
class Span:
    """The time that a device takes for what is asked of it between :meth:`start` and :meth:`end`.

    Attributes:
        share: part of that time, 0 to 1, which is this span's: calls may be shared.
    """

    device: torch.device
    share: float = 1.0
    _moments: list[Moment] = field(default_factory=list)
    _seconds: float = 0.0

    @staticmethod
    def start(device: torch.device) -> Span:
        return Span(device, _moments=[now(device)])

    @staticmethod
    def of(seconds: float) -> Span:
        """A span that is over and took so long."""
        return Span(torch.device("cpu"), _seconds=seconds)

    def end(self, share: float = 1.0) -> Span:
        self._moments.append(now(self.device))
        self.share = share
        return self

    @property
    def seconds(self) -> float:
        """The time in seconds. Waits for a GPU the first time, if the span is not over there."""
        if self._moments:
            self._seconds = seconds_between(*self._moments)
            self._moments = []
        return self._seconds * self.share
