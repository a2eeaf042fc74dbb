"""What a call does so as not to wait for a GPU: time measured later, schedules read once, tensors told by identity."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit import capture
from fisedit.capture import timestep_value, with_timestep_tensor
from fisedit.errors import InvalidTimestepError
from fisedit.runtime.timing import Span
from fisedit.sameness import Copies, Same


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all tensors that are read, on a device that is waited for."""
    shapes: list[torch.Size] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(capture, "WAITING", ("cpu",))
    monkeypatch.setattr(Tensor, "tolist", lambda self: shapes.append(self.shape) or tolist(self))
    return shapes


@pytest.mark.parametrize(
    "schedule", [torch.tensor([900, 500, 100]), torch.tensor([14.6, 2.5, 0.03])[:3], torch.arange(9)[2:5]]
)
def test_a_schedule_is_read_once(schedule: Tensor, reads: list[torch.Size]) -> None:
    wanted = [value.item() for value in schedule.clone()]
    assert [timestep_value(t) for t in schedule] == wanted
    assert [timestep_value(t.expand(2)) for t in schedule] == wanted
    assert [timestep_value(schedule[i : i + 1]) for i in range(3)] == wanted
    assert len(reads) == 1


def test_a_schedule_that_is_written_to_is_read_again(reads: list[torch.Size]) -> None:
    schedule = torch.tensor([900, 500, 100])
    assert timestep_value(schedule[1]) == 500
    schedule[1] = 499
    assert timestep_value(schedule[1]) == 499 and len(reads) == 2


OTHERS: dict[str, Any] = {
    "a strided schedule": lambda: torch.arange(10)[::2][2],
    "a table": lambda: torch.arange(12).view(3, 4)[1, 0],
    "another dtype": lambda: torch.tensor([4], dtype=torch.int32).view(torch.float32).view(torch.int32)[0],
    "a long one": lambda: torch.arange(20_000)[4],
    "one of its own": lambda: torch.tensor([4.0, 4.0]),
    "a number": lambda: 4,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_timesteps(name: str, reads: list[torch.Size]) -> None:
    assert timestep_value(OTHERS[name]()) == 4


def test_in_inference_mode(reads: list[torch.Size]) -> None:
    with torch.inference_mode():
        schedule = torch.tensor([900, 500])
        assert [timestep_value(t) for t in schedule] == [900, 500]
        schedule[0] = 7
        assert timestep_value(schedule[0]) == 7


@pytest.mark.parametrize("given", [torch.tensor([1, 2]), torch.arange(4)[1:3], [1.0, 2.0], math.nan])
def test_several_timesteps_are_refused(given: Any, reads: list[torch.Size]) -> None:
    with pytest.raises(InvalidTimestepError):
        timestep_value(given)


class Model(torch.nn.Module):
    def forward(self, sample: Tensor, timestep: Any, context: Tensor | None = None) -> Tensor:
        return sample


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (5, torch.tensor(5)),
        (2.5, torch.tensor(2.5, dtype=torch.float64)),
        (torch.tensor([3, 3]), torch.tensor([3, 3])),
        (torch.tensor(7.0), torch.tensor(7.0)),
    ],
)
def test_numbers_become_tensors(given: Any, wanted: Tensor) -> None:
    sample = torch.zeros(2, 4, 8, 8)
    for args, kwargs in (
        ((sample, given), {}),
        ((sample,), {"timestep": given}),
        ((), {"timestep": given, "sample": sample}),
    ):
        args, kwargs = with_timestep_tensor(Model(), args, kwargs)
        bound = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        assert bound["sample"] is sample
        torch.testing.assert_close(bound["timestep"], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("args", [(), (1,), (torch.zeros(1, 4, 8, 8), "now"), (1, 2, 3, 4)])
def test_what_is_no_call_stays_as_it_is(args: tuple[Any, ...]) -> None:
    assert with_timestep_tensor(Model(), args, {}) == (args, {})


def test_the_same_tensor_is_told_without_reading() -> None:
    text = torch.randn(4, 7, 8)
    seen = Same(text[1:3])
    assert seen.holds(text[1:3])
    assert not seen.holds(text[0:2]) and not seen.holds(text) and not seen.holds(text[1:3].clone())
    text[0] = 0  # a write anywhere in its memory
    assert not seen.holds(text[1:3])
    with torch.inference_mode():
        uncounted = torch.zeros(3)
        assert not Same(uncounted).holds(uncounted)


def test_one_copy_of_each_text() -> None:
    text = torch.randn(4, 7, 8)
    copies = Copies(limit=2)
    first = copies.of(text[:2])
    assert torch.equal(first, text[:2]) and first.data_ptr() != text.data_ptr()
    assert copies.of(text[:2]) is first and copies.of(text[:2].clone()) is first
    other = copies.of(text[2:])
    assert other is not first and copies.of(text[2:]) is other and copies.of(text[:2]) is first
    before = first.clone()
    text[0] = 0
    assert torch.equal(first, before) and torch.equal(copies.of(text[:2]), text[:2])
    assert copies.of(text[:2].double()).dtype == torch.float64


def test_a_span_on_a_cpu() -> None:
    span = Span.start(torch.device("cpu"))
    time.sleep(0.02)
    half = span.end(share=0.5)
    assert 0.01 <= half.seconds < 1 and half.seconds == half.seconds


class Event:
    """A CUDA event of a device whose clock is counted by hand."""

    clock, waited = 0.0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.at = Event.clock

    def synchronize(self) -> None:
        Event.waited += 1

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_a_span_on_a_gpu_waits_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    span = Span.start(torch.device("cuda"))
    Event.clock += 30.0  # milliseconds
    span.end(share=1 / 3)
    assert Event.waited == 0
    assert span.seconds == pytest.approx(0.01) and span.seconds == pytest.approx(0.01) and Event.waited == 1
