"""Plan how the keys and values of self-attention are kept: most of what an edit reads, and read whole in every call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

STEPS = 50
"""Of a run whose length is not known yet."""
CALL = 4.0
"""What a sparse call takes at least, in times of what reading the weights takes (docs/performance.md: 4 to 5)."""


@dataclass(frozen=True)
class KeysPlan:
    """``cached``: as they are; ``int8``: in 8 bits; ``active``: not at all. ``reason``: why, for people."""

    kv: Literal["cached", "int8", "active"]
    reason: str


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second from page-locked host memory to the GPU (``bus``), and in the GPU's memory."""

    bus: float
    memory: float

    @staticmethod
    def measure(device: torch.device, nbytes: int = 1 << 26) -> Bandwidth:
        """By copies of ``nbytes``; waits for the GPU."""
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        first, second = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
        found = []
        with torch.cuda.device(device):
            for source in (host, first):
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                for _ in range(2):  # the second one counts
                    events[0].record()
                    second.copy_(source, non_blocking=True)
                    events[1].record()
                events[1].synchronize()
                found.append(nbytes / (events[0].elapsed_time(events[1]) * 1e-3))
        return Bandwidth(found[0], 2 * found[1])  # a copy reads and writes


def plan_keys(nbytes: int, weights: int, budget: int, bandwidth: Bandwidth | None, steps: int = STEPS) -> KeysPlan:
    """The most exact way that no call of an edit waits for.

    Args:
        nbytes: of the keys and values of one step.
        weights: bytes of the model.
        budget: of the tier that they are read from in their place: the GPU's, or the host's on a CPU.
        bandwidth: ``None`` on a CPU, where nothing crosses a bus.
        steps: of the run.
    """
    whole, size = nbytes * steps, f"{nbytes * steps / 2**30:.1f} GiB in {steps} steps"
    room = f"the budget is {budget / 2**30:.1f} GiB"
    if whole <= budget:
        return KeysPlan("cached", f"keys and values take {size}, and {room}")
    if whole / 2 <= budget or bandwidth is None:
        return KeysPlan("int8", f"keys and values take {size}, {room}: half as much in 8 bits")
    moved, call = nbytes / 2 / bandwidth.bus, CALL * weights / bandwidth.memory
    times = f"in 8 bits they take {moved * 1e3:.1f} ms over the bus, and a sparse call about {call * 1e3:.1f} ms"
    if moved <= call:
        return KeysPlan("int8", f"keys and values take {size}, {room}; {times}")
    return KeysPlan("active", f"keys and values take {size}, {room}; {times}: edits see the active rows alone")
