"""What the arguments of a call may hold: tensors and values. What could change unseen is refused, never frozen."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fisedit
from fisedit.errors import RecordingMismatchError, UnsupportedCaptureError

SIZE = (8, 8)
SAMPLE = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(0))


class Hooked(nn.Module):
    """A model whose options are used by its forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, options: dict[str, Any]) -> Tensor:
        for value in options.values():
            if callable(value):
                x = value(x)
            elif isinstance(value, Tensor):
                x = x * value
        return self.conv(x)


def run(model: nn.Module, options: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(SAMPLE, 5, options)


class Scale:
    def __init__(self) -> None:
        self.value = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.value


@pytest.mark.parametrize(
    "value",
    [Scale(), lambda x: x * 2, torch.nn.functional.silu, torch.Generator(), np.ones(2), {1, 2}, object()],
    ids=lambda value: type(value).__name__,
)
def test_objects_that_may_change_unseen_are_refused(value: Callable[..., Tensor]) -> None:
    unet = fisedit.compile(Hooked().eval())
    options = {"patch": [value]} if not callable(value) else {"patch": value}
    with pytest.raises(UnsupportedCaptureError, match="options_patch.* may change without being seen"), unet.record():
        run(unet, options)
    assert run(unet, options).shape == SAMPLE.shape  # outside a session they are the model's own affair


class Mode(enum.Enum):
    FIRST = 1
    SECOND = 2


@pytest.mark.parametrize(
    ("recorded", "edited"),
    [(1, 2), (0.5, 0.25), ("a", "b"), (Mode.FIRST, Mode.SECOND), (torch.float32, torch.float16), (np.float32(1), None)],
    ids=str,
)
def test_values_are_compared(recorded: Any, edited: Any) -> None:
    unet = fisedit.compile(Hooked().eval())
    with unet.record() as base:
        run(unet, {"value": recorded})
    with unet.edit(base, torch.ones(SIZE)):
        run(unet, {"value": recorded})
    with pytest.raises(RecordingMismatchError, match="options_value"), unet.edit(base, torch.ones(SIZE)):
        run(unet, {"value": edited})


def test_names_that_read_alike_stay_apart() -> None:
    model = Hooked().eval()
    options = {"a-b": torch.tensor(2.0), "a b": torch.tensor(0.5), "a_b": torch.tensor(3.0)}
    unet = fisedit.compile(model)
    with unet.record() as base:
        torch.testing.assert_close(run(unet, options), run(model, options))
    other = {**options, "a b": torch.tensor(0.25)}
    with unet.edit(base, torch.ones(SIZE)):
        torch.testing.assert_close(run(unet, other), run(model, other))
