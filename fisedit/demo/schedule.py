"""What the three training stages share: a clock that sets the learning rate, printed progress, averaged weights."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn


class Clock:
    """Ends a stage after a given time and sets the learning rate by the share of it that is spent.

    The rate rises linearly over the first `warmup_steps`, then falls to 2 % along a half cosine, so that a stage
    of any length ends annealed. All ranks must ask the same clock: `step` takes rank 0's reading.
    """

    def __init__(
        self, minutes: float, learning_rate: float, warmup_steps: int = 200, max_steps: int | None = None
    ) -> None:
        self.seconds, self.learning_rate = minutes * 60, learning_rate
        self.warmup_steps, self.max_steps = warmup_steps, max_steps
        self.started = time.monotonic()
        self.steps = 0
        self._last = (self.started, 0)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def running(self) -> bool:
        """Whether time and steps are left."""
        return self.elapsed < self.seconds and (self.max_steps is None or self.steps < self.max_steps)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Counts a step and sets the optimizer's learning rate for it."""
        self.steps += 1
        done = min(1.0, self.elapsed / self.seconds)
        share = min(1.0, self.steps / self.warmup_steps) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * share

    def report(self, stage: str, batch: int, **values: float | Tensor) -> None:
        """Prints time, steps, samples per second since the last report and the given values."""
        now = time.monotonic()
        rate = (self.steps - self._last[1]) * batch / max(now - self._last[0], 1e-9)
        self._last = (now, self.steps)
        shown = "  ".join(f"{name} {float(value):.4f}" for name, value in values.items())
        print(f"[{stage}] {self.elapsed:6.0f} s  step {self.steps}  {rate:.0f} samples/s  {shown}", flush=True)


def autocast(device: torch.device) -> torch.autocast:
    """Returns bfloat16 autocast on a GPU; on the CPU it is switched off."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves the running average of a model's weights a share `1 - decay` towards its present ones."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
