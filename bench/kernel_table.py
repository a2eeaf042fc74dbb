"""Which kernels a call runs, how often and for how long, by PyTorch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class KernelTime:
    """A kernel (on a CPU: an operator) of one call: how often it ran, and µs of all its runs."""

    name: str
    calls: int
    microseconds: float


def profile_call(call: Callable[[], Any], device: torch.device) -> list[KernelTime]:
    """The kernels of one call, the longest first."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiled:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cuda":
        runs = ((e.name, e.time_range.elapsed_us()) for e in profiled.events() if e.device_type == DeviceType.CUDA)
    else:
        runs = ((e.name, e.self_cpu_time_total) for e in profiled.events())
    return _sum(runs)


def _sum(runs: Iterable[tuple[str, float]]) -> list[KernelTime]:
    times: dict[str, list[float]] = defaultdict(list)
    for name, microseconds in runs:
        times[name].append(microseconds)
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
