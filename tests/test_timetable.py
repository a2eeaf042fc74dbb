"""What depends on the timestep alone is computed for many timesteps at once, and as the stage itself computes it."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
from harness import Harness
from torch import Tensor, nn
from toy_sampler import SIZE, corner, run

import fisedit
from fisedit.runtime.executor import Executable, Memo
from fisedit.runtime.timetable import AHEAD, KEPT, Packing, Row, Timetable, run_stage

TIMESTEPS = [981.0, 500.0, 0.7281, 1.0]


def with_labels() -> nn.Module:
    """Class labels are added to the embedding of the timestep: an input of that stage besides it."""
    return models.one_level(class_embed_type="timestep")


@pytest.mark.parametrize("build", [with_labels, pytest.param(models.sdxl, marks=pytest.mark.nightly)])
def test_rows_are_what_the_stage_gives(build: Callable[[], nn.Module]) -> None:
    model = build()
    arguments = models.arguments(model, (8, 12))
    if build is with_labels:
        arguments["class_labels"] = torch.tensor([3.0, 4.0])
    h = Harness(model, arguments)
    executable = h.program.executable("edit")
    stage, memo = executable.before["timestep"], Memo(timetable=Timetable(TIMESTEPS))
    assert memo.timetable is not None
    for timestep in TIMESTEPS:
        memo.timetable.now = timestep
        inputs = {**h.call.tensors, "timestep": torch.full((2,), timestep)}
        executable.prepare(inputs, memo)
        row = executable.timestep_row(inputs, memo)
        assert row is not None
        wanted = stage.module(*[executable.fetch(i, stage, inputs, None, None, memo) for i in stage.inputs])
        for value, alone in zip(row.packing.unpack(row.data), wanted, strict=True):
            torch.testing.assert_close(value, alone, rtol=1e-5, atol=1e-6)


def test_every_call_has_its_own_timestep() -> None:
    """Timesteps that are come to twice, of two dtypes: with nothing changed, sparse calls give what was recorded."""
    unet = fisedit.compile(models.one_level())
    call = models.arguments(unet, SIZE)
    schedule = (900, 700.25, 700.25, 3, 3, 700.25)
    with unet.record() as base:
        recorded = run(unet, call, schedule)
    with unet.edit(base, corner()):
        outputs = run(unet, call, schedule)
    for out, wanted in zip(outputs, recorded, strict=True):
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    assert (recorded[0] - recorded[3]).abs().max() > 1e-3  # the timestep does tell


class Counted:
    """Makes rows that hold their timestep, and remembers for which it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[float]] = []

    def __call__(self, timesteps: Tensor) -> list[Row]:
        self.asked.append(timesteps[:, 0].tolist())
        packing, rows = Packing.pack([timesteps])
        return [Row(packing, row) for row in rows]

    def check(self, timetable: Timetable, timestep: float, others: list[tuple[Tensor, int]], batch: int = 2) -> None:
        timetable.now = timestep
        row = timetable.row(torch.full((batch,), timestep), others, self)
        assert row.packing.unpack(row.data)[0].tolist() == [timestep] * batch


@pytest.mark.parametrize("order", [1, -1])
def test_long_schedules_are_cut(order: int) -> None:
    """A thousand timesteps, up or down: each is computed once, some at a time, and not all are kept."""
    schedule = [float(t) for t in range(1000, 0, -1)]
    timetable, made = Timetable(schedule), Counted()
    for timestep in schedule[::order]:
        made.check(timetable, timestep, [])
    assert sorted(t for block in made.asked for t in block) == sorted(schedule)
    assert max(map(len, made.asked)) == AHEAD and len(timetable._rows) <= KEPT


def test_what_else_changes_makes_rows_anew() -> None:
    schedule = [4.0, 3.0, 2.0, 1.0]
    timetable, made = Timetable(schedule), Counted()
    condition = torch.zeros(2)
    made.check(timetable, 4, [(condition, 0)])
    made.check(timetable, 3, [(condition, 0)])
    assert made.asked == [schedule]
    made.check(timetable, 3, [(condition, 1)])  # written to: only the one that is wanted, in case it goes on like that
    made.check(timetable, 2, [(torch.zeros(2), 1)])
    assert made.asked[1:] == [[3.0], [2.0]]
    made.check(timetable, 2, [(condition, -1)])
    made.check(timetable, 2, [(condition, -1)])  # writes to it are not counted
    assert made.asked[3:] == [[2.0], [2.0]]


def test_rows_of_each_number_of_samples() -> None:
    timetable, made = Timetable([2.0, 1.0]), Counted()
    made.check(timetable, 2, [])
    made.check(timetable, 2, [], batch=4)
    made.check(timetable, 1, [])
    assert made.asked == [[2.0, 1.0]] * 2


def test_tensors_of_all_kinds_in_a_row() -> None:
    values = [torch.randn(3, 5), torch.randn(3, 2, 1, 7).half(), torch.tensor([True, False, True]), torch.arange(3)]
    packing, rows = Packing.pack(values)
    for number, row in enumerate(rows):
        for value, wanted in zip(packing.unpack(row), values, strict=True):
            assert torch.equal(value, wanted[number]) and value.is_contiguous() and value.data_ptr() % 2 == 0


def test_a_stage_that_takes_no_batch() -> None:
    """What cannot be done for many timesteps at once is done one by one."""

    def stage(scale: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        return (timestep * scale if timestep[0].item() > 1 else timestep,)

    timesteps = torch.tensor([[3.0], [1.0]]).expand(2, 2)
    rows = run_stage(stage, [torch.tensor(10.0), timesteps[0]], 1, timesteps)
    assert [row.packing.unpack(row.data)[0].tolist() for row in rows] == [[30.0, 30.0], [1.0, 1.0]]


@pytest.fixture(scope="module")
def small() -> Harness:
    model = models.one_level()
    return Harness(model, models.arguments(model, (8, 12)))


def begun(h: Harness) -> tuple[Executable, Memo]:
    """The edit graph, and the memo of an edit that has begun."""
    executable, memo = h.program.executable("edit"), Memo(timetable=Timetable([500.0], now=500.0))
    assert executable.prepare(h.call.tensors, memo)
    return executable, memo


def test_moved_weights_are_noticed(small: Harness) -> None:
    """Within an edit, whichever weight it is; nothing is done as long as none is moved."""
    executable, memo = begun(small)
    for name in ("conv_in.weight", "mid_block.resnets.0.time_emb_proj.bias"):
        weight = small.model.get_parameter(name)
        before, row = executable.constants, executable.timestep_row(small.call.tensors, memo)
        assert not executable.prepare(small.call.tensors, memo) and executable.constants is before
        assert executable.timestep_row(small.call.tensors, memo) is row
        weight.data = weight.data.clone()  # as Module.to does it
        assert executable.prepare(small.call.tensors, memo) and executable.constants is not before
        assert memo.constants is executable.constants
        assert executable.timestep_row(small.call.tensors, memo) is not row


def test_weights_moved_between_edits_are_noticed(small: Harness) -> None:
    """Even if the memory where they were is still in use."""
    executable, _ = begun(small)
    weight = small.model.get_parameter("conv_in.weight")
    before, kept = executable.constants, weight.detach()
    weight.data = kept.clone()
    begun(small)
    assert executable.constants is not before


def test_edits_share_rows_of_the_timestep_alone(small: Harness) -> None:
    rows = []
    for _ in range(2):
        executable, memo = begun(small)
        rows.append(executable.timestep_row(small.call.tensors, memo))
    assert rows[0] is rows[1]


def test_a_memo_belongs_to_one_graph_at_a_time(small: Harness) -> None:
    executable, memo = begun(small)
    other = small.program.executable("edit", store=True)
    assert other.prepare(small.call.tensors, memo) and memo.constants is other.constants
    assert executable.prepare(small.call.tensors, memo) and not executable.prepare(small.call.tensors, memo)
