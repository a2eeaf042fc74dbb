"""Options are checked when they are made, and what they mean scales with the schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fisedit.config import CacheConfig, CompileConfig, DetectConfig, parse_size
from fisedit.errors import FISEditError, ScheduleTooShortError, UnknownOptionError

NAN = float("nan")
BAD: dict[str, list[Any]] = {
    "steps": [0, -1, 2.0, 2.5, "2", True, NAN, [2], torch.tensor([1, 2])],
    "window": [(1,), (1, 2, 3), (0, 1), (2, 1), (1.0, 2.0), (1, NAN), ("1", "2"), (True, True), "12", 5, {1, 2}],
    "threshold": [1.5, -0.1, NAN, True, "otus", None, np.zeros(3)],
    "smooth": [-1.0, NAN, float("inf"), "1", None, True],
    "dilation": [-1, 0.5, 2.0, "2", None, True, NAN],
    "min_area": [-1, 0.5, "2", True, NAN],
    "control": [1, 0, None, "yes", torch.ones(2)],
    "method": ["guess", None, 3, np.array(["automatic"])],
}


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in BAD.items() for v in values], ids=str)
def test_a_value_that_an_option_does_not_take_is_named(option: str, value: Any) -> None:
    with pytest.raises(UnknownOptionError, match=f"{option}=.*it takes"):
        DetectConfig(**{option: value})


@pytest.mark.parametrize("option", ["kv", "cost", "provider", "dense"])
@pytest.mark.parametrize("value", ["everything", None, 1, np.array(["cached"]), torch.ones(2)], ids=str)
def test_compile_options_too(option: str, value: Any) -> None:
    with pytest.raises(UnknownOptionError, match=f"{option}="):
        CompileConfig(**{option: value})


def test_numbers_of_numpy_are_numbers() -> None:
    config = DetectConfig(steps=np.int64(3), window=[np.int32(1), 2], smooth=np.float32(0.5), dilation=np.uint8(1))
    assert config.resolve(10) == (3, [1, 2])


@pytest.mark.parametrize(
    ("schedule", "steps", "window"),
    [
        (2, 1, (1, 1)),
        (3, 1, (1, 1)),
        *((schedule, 2, (1, 2)) for schedule in (4, 5, 8, 12)),
        (13, 3, (2, 3)),
        (25, 5, (3, 5)),
        (50, 10, (5, 10)),  # the paper's
        (100, 20, (10, 20)),
    ],
)
def test_detection_scales_with_the_schedule(schedule: int, steps: int, window: tuple[int, int]) -> None:
    assert DetectConfig().resolve(schedule) == (steps, window)


@pytest.mark.parametrize("schedule", range(2, 200))
def test_a_sparse_step_is_always_left(schedule: int) -> None:
    steps, (first, last) = DetectConfig().resolve(schedule)
    assert 1 <= first <= last == steps < schedule


@pytest.mark.parametrize("config", [DetectConfig(), DetectConfig(steps=1)])
def test_a_schedule_of_one_step_finds_no_mask(config: DetectConfig) -> None:
    with pytest.raises(ScheduleTooShortError, match="schedule of 1 step .* Give a mask"):
        config.resolve(1)


@pytest.mark.parametrize(
    ("config", "schedule", "message"),
    [
        (DetectConfig(steps=4), 4, "DetectConfig.steps=4.*at most 3: the schedule has 4 steps"),
        (DetectConfig(steps=9), 4, "at most 3"),
        (DetectConfig(window=(1, 2)), 3, r"window=\(1, 2\).*steps 1 to 1"),
        (DetectConfig(steps=2, window=(2, 3)), 9, "steps 1 to 2"),
    ],
)
def test_what_does_not_fit_the_schedule_is_named(config: DetectConfig, schedule: int, message: str) -> None:
    with pytest.raises(FISEditError, match=message) as caught:
        config.resolve(schedule)
    assert isinstance(caught.value, UnknownOptionError)


@pytest.mark.parametrize(
    ("given", "size"), [("8GiB", 2**33), ("1.5 GB", 1_500_000_000), ("20", 20), (7, 7), (None, None), ("3 kib", 3072)]
)
def test_sizes_of_budgets(given: Any, size: Any) -> None:
    assert parse_size("gpu", given) == size


@pytest.mark.parametrize(
    "options",
    [{"gpu": "8 gigs"}, {"host": -1}, {"gpu": True}, {"disk": 3}, {"storage": "int4"}, {"steps": (0, 4)},
     {"steps": (4, 2)}, {"steps": 5}, {"detect_steps": -1}, {"host": "GiB"}],
)  # fmt: skip
def test_what_options_of_caches_do_not_take(options: dict[str, Any]) -> None:
    with pytest.raises(UnknownOptionError, match=next(iter(options))):
        CacheConfig(**options)
