"""How long calls take: by the clock on a CPU, by events on a GPU, which are waited for only when somebody asks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch


@dataclass
class Span:
    """The time that a device takes for what is asked of it between :meth:`start` and :meth:`end`.

    Attributes:
        share: part of that time, 0 to 1, which is this span's: calls may be shared.
    """

    device: torch.device
    share: float = 1.0
    _events: list[torch.cuda.Event] = field(default_factory=list)
    _times: list[float] = field(default_factory=list)

    @staticmethod
    def start(device: torch.device) -> Span:
        span = Span(device)
        span._mark()
        return span

    @staticmethod
    def of(seconds: float) -> Span:
        """A span that is over and took so long."""
        return Span(torch.device("cpu"), _times=[0.0, seconds])

    def end(self, share: float = 1.0) -> Span:
        self._mark()
        self.share = share
        return self

    def _mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """The time in seconds. Waits for a GPU the first time, if the span is not over there."""
        if self._events:
            first, last = self._events
            last.synchronize()
            self._times = [0.0, first.elapsed_time(last) * 1e-3]
            self._events = []
        return (self._times[1] - self._times[0]) * self.share
