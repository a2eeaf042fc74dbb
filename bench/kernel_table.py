"""Which kernels a call runs, how often and for how long, by PyTorch's profiler."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PROFILE = "call, "
"""In front of the mask, in the names of profiled calls among the results of ``unet.py``."""


@dataclass(frozen=True)
class Launch:
    """One run of a kernel (on a CPU: of an operator): µs from the first one's start, and its own.

    Kernels that start before the one before them ends also count their waiting: what a launch adds to a call is the
    time between its end and that of all before it, see :func:`added`.
    """

    name: str
    start: float
    microseconds: float
    grid: tuple[int, ...] = ()

    @property
    def end(self) -> float:
        return self.start + self.microseconds


@dataclass(frozen=True)
class KernelTime:
    """A kernel of one call: how often it ran, and µs of all its runs."""

    name: str
    calls: int
    microseconds: float


def profile_call(call: Callable[[], Any], device: torch.device) -> list[Launch]:
    """The launches of one call, in their order."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiled:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    found = sorted((event for event in events if event.get("cat") in kinds), key=lambda event: event["ts"])
    begin = found[0]["ts"] if found else 0.0
    return [Launch(e["name"], e["ts"] - begin, e["dur"], tuple(e["args"].get("grid", ()))) for e in found]


def added(launches: Sequence[Launch]) -> Iterator[tuple[Launch, float]]:
    """Each launch, in the order of their starts, and µs that it adds to the call; nothing for the first."""
    last = None
    for launch in sorted(launches, key=lambda launch: launch.start):
        yield launch, 0.0 if last is None else max(0.0, launch.end - last)
        last = launch.end if last is None else max(last, launch.end)


def totals(launches: Sequence[Launch]) -> list[KernelTime]:
    """By kernel, the longest first."""
    times: dict[str, list[float]] = defaultdict(list)
    for launch in launches:
        times[launch.name].append(launch.microseconds)
    kernels = [KernelTime(name, len(each), sum(each)) for name, each in times.items()]
    return sorted(kernels, key=lambda kernel: -kernel.microseconds)


def markdown(kernels: list[KernelTime], most: int = 25) -> str:
    """A Markdown table of the longest, and a line with the rest and the sum."""
    total = sum(kernel.microseconds for kernel in kernels) or 1.0
    rest = kernels[most:]
    shown = kernels[:most]
    if rest:
        others = KernelTime(f"{len(rest)} others", sum(k.calls for k in rest), sum(k.microseconds for k in rest))
        shown = [*shown, others]
    lines = ["| kernel | calls | µs | share |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| `{k.name[:90]}` | {k.calls} | {k.microseconds:.0f} | {k.microseconds / total:.1%} |" for k in shown]
    calls = sum(kernel.calls for kernel in kernels)
    return "\n".join([*lines, f"| all | {calls} | {total:.0f} | |"])
