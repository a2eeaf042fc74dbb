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


class OtherNames(nn.Module):
    """Arguments under names that say nothing, in another order, and a timestep that is looked up in a table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.text = nn.Embedding(1000, 4), nn.Linear(8, 4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, words: Tensor, level: Tensor, noisy: Tensor, labels: Tensor) -> Tensor:
        shift = self.table(level) + self.text(words.mean(1)) + labels[:, None]
        return self.conv(noisy + shift[:, :, None, None])


def test_roles_are_told_by_shapes_where_names_say_nothing() -> None:
    model = OtherNames().eval()
    unet = fisedit.compile(model)
    words, noisy, labels = torch.randn(2, 5, 8), torch.randn(2, 4, *SIZE), torch.tensor([1, 2])
    mask = torch.zeros(SIZE)
    mask[2:5, 1:6] = 1

    def run(model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [model(words, torch.full((2,), t), noisy, labels) for t in (900, 500)]

    with unet.record() as base:
        recorded = run(unet)
    assert base.timesteps == [900.0, 500.0] and next(iter(base.calls.values())).sample.shape == noisy.shape
    with unet.edit(base, mask):
        edited = run(unet)
    for wanted, *made in zip(run(model), recorded, edited, strict=True):
        for out in made:
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_a_timestep_keeps_its_dtype(dtype: torch.dtype) -> None:
    class Table(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert t.dtype == dtype and t.shape == (1,)
            return x * t.to(x.dtype)[:, None, None, None]

    unet = fisedit.compile(Table().eval())
    with unet.record():
        out = unet(SAMPLE, torch.tensor([3], dtype=dtype))
    torch.testing.assert_close(out, SAMPLE * 3)


def test_what_has_no_sample_or_no_timestep_is_refused() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return x

    unet = fisedit.compile(Plain())
    with pytest.raises(UnsupportedCaptureError, match=r"\(x, other\) is a timestep"), unet.record():
        unet(SAMPLE, torch.ones(1, 320))
    with pytest.raises(UnsupportedCaptureError, match=r"\(x, other\) is a map \[B, C, H, W\]"), unet.record():
        unet(torch.ones(1, 4, 8), 5)
