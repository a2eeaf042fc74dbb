"""Timings are measured once, kept for this machine only, and answered from the table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit.errors import UnknownOptionError
from fisedit.runtime.calibration import (
    VARIABLE,
    Candidate,
    Choice,
    Machine,
    Timings,
    copies_beyond_l2,
    grid,
    points,
    time_on_gpu,
)

KEY = (320, 320, 9, "float16", True)


class Stopwatch:
    """Measurements made up: ``microseconds[candidate]`` a row; counts how often it is asked."""

    def __init__(self, **microseconds: float) -> None:
        self.microseconds = microseconds
        self.asked: list[tuple[Candidate, int]] = []

    def __call__(self, candidate: Candidate, rows: int) -> float:
        self.asked.append((candidate, rows))
        return self.microseconds[str(candidate)] * rows


@given(rows=st.integers(1, 1 << 20))
def test_the_grid_is_geometric(rows: int) -> None:
    point = grid(rows)
    assert grid(point) == point and point in points()
    assert max(point, rows) / min(point, rows) <= 2**0.25 + 0.5 / min(point, rows)


def test_points_ascend_by_the_square_root_of_two() -> None:
    all_points = points(1 << 20)
    assert all_points[0] == 1 and all_points[-1] == 1 << 20
    factors = [b / a for a, b in zip(all_points[14:], all_points[15:], strict=False)]
    assert all(abs(factor - math.sqrt(2)) < 0.01 for factor in factors)


def test_each_point_is_measured_once(tmp_path: Path) -> None:
    timings, watch = Timings.load("cpu", tmp_path), Stopwatch(rows=3.0, tile=2.0)
    assert timings.best("conv", KEY, 500, ["rows", "tile"], watch) == "tile"
    assert watch.asked == [("rows", 512), ("tile", 512)]
    assert timings.best("conv", KEY, 530, ["tile", "rows"], watch) == "tile"
    assert timings.best("conv", KEY, 530, ["rows"], watch) == "rows"  # the fastest of those that are asked for
    assert len(watch.asked) == 2
    timings.best("conv", (*KEY, 1), 500, ["rows"], watch)
    timings.best("linear", KEY, 500, ["rows"], watch)
    timings.best("conv", KEY, 1100, ["rows"], watch)
    assert watch.asked[2:] == [("rows", 512), ("rows", 512), ("rows", 1024)]


def test_the_next_points_need_no_measuring(tmp_path: Path) -> None:
    timings, watch = Timings.load("cpu", tmp_path), Stopwatch(rows=3.0, tile=2.0)
    timings.put("conv", KEY, 512, "rows", 1.0)
    timings.put("conv", KEY, 512, "tile", 2.0)
    assert [timings.best("conv", KEY, rows, ["rows", "tile"], watch) for rows in (362, 512, 724)] == ["rows"] * 3
    assert watch.asked == []
    assert timings.best("conv", KEY, 1024, ["rows", "tile"], watch) == "tile"
    assert timings.best("conv", KEY, 724, ["rows", "tile"], watch) == "rows"  # the smaller one's


def test_where_nothing_can_be_measured_the_default_answers(tmp_path: Path) -> None:
    timings = Timings.load("cpu", tmp_path)
    assert timings.best("conv", KEY, 64, ["rows", "tile"], None, default="tile") == "tile"
    timings.best("conv", KEY, 64, ["rows", "tile"], Stopwatch(rows=1.0, tile=2.0))
    assert timings.best("conv", KEY, 64, ["rows", "tile"], None, default="tile") == "rows"


def test_a_new_candidate_is_measured_beside_the_known(tmp_path: Path) -> None:
    timings, watch = Timings.load("cpu", tmp_path), Stopwatch(rows=3.0, dense=1.0)
    timings.best("conv", KEY, 64, ["rows"], watch)
    assert timings.best("conv", KEY, 64, ["rows", "dense"], watch) == "dense"
    assert watch.asked == [("rows", 64), ("dense", 64)]


def test_what_cannot_run_is_not_chosen(tmp_path: Path) -> None:
    timings = Timings.load("cpu", tmp_path)
    assert timings.best("conv", KEY, 64, ["huge", "rows"], Stopwatch(huge=math.inf, rows=1.0)) == "rows"
    timings.save()
    assert Timings.load("cpu", tmp_path).time("conv", KEY, 64, "huge") == math.inf


def test_candidates_may_be_tuples(tmp_path: Path) -> None:
    timings = Timings.load("cpu", tmp_path)
    slow, fast = ("tile", (8, 8), 4), ("tile", (16, 8), 4)
    assert timings.best("conv", KEY, 9, [slow, fast], lambda candidate, rows: 1.0 if candidate == fast else 2.0) == fast
    timings.save()
    kept = Timings.load("cpu", tmp_path, calibrate="off")
    assert kept.best("conv", KEY, 9, [slow, fast], Stopwatch(), default=slow) == fast


def test_without_measuring_the_default_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    timings, watch = Timings.load("cpu", tmp_path), Stopwatch(rows=1.0, tile=2.0)
    assert timings.best("conv", KEY, 64, ["rows", "tile"], watch) == "rows"
    assert timings.best("conv", KEY, 64, ["rows", "tile"], watch, default="tile") == "tile"
    assert watch.asked == []
    timings.save()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "always")
    with pytest.raises(UnknownOptionError, match="always"):
        Timings.load("cpu")


def test_choices_are_collected(tmp_path: Path) -> None:
    timings, watch = Timings.load("cpu", tmp_path), Stopwatch(rows=3.0, tile=2.0)
    with timings.collect() as choices:
        timings.best("conv", KEY, 60, ["rows", "tile"], watch)
        with timings.collect() as inner:
            timings.best("conv", KEY, 60, ["rows"], watch)
    timings.best("conv", KEY, 60, ["rows"], watch)
    assert choices == [Choice("conv", KEY, 60, "tile", {"rows": 192.0, "tile": 128.0})]
    assert [choice.chosen for choice in inner] == ["rows"]
    off = Timings.load("cpu", tmp_path, calibrate="off")
    with off.collect() as choices:
        off.best("conv", KEY, 60, ["rows", "tile"], watch, default="tile")
    assert choices == [Choice("conv", KEY, 60, "tile", {})]


def test_prediction_is_linear_between_points(tmp_path: Path) -> None:
    timings = Timings.load("cpu", tmp_path)
    assert timings.predict("conv", KEY, 100) is None
    timings.put("conv", KEY, 64, "rows", 30.0)
    timings.put("conv", KEY, 64, "tile", 10.0)
    timings.put("conv", KEY, 128, "tile", 20.0)
    timings.put("conv", KEY, 91, "huge", math.inf)  # nothing ran there
    assert [timings.predict("conv", KEY, rows) for rows in (8, 64, 96, 128, 256)] == [10.0, 10.0, 15.0, 20.0, 40.0]
    assert timings.predict("linear", KEY, 64) is None


def test_the_table_is_kept(tmp_path: Path) -> None:
    timings = Timings.load("cpu", tmp_path / "made" / "here")
    timings.best("conv", KEY, 64, ["rows", "tile"], Stopwatch(rows=1.0, tile=2.0))
    timings.save()
    again = Timings.load("cpu", tmp_path / "made" / "here")
    assert again.table == timings.table and again.times("conv", KEY, 64) == {"rows": 64.0, "tile": 128.0}
    watch = Stopwatch()
    assert again.best("conv", KEY, 64, ["rows", "tile"], watch) == "rows" and watch.asked == []


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    one, other = Timings.load("cpu", tmp_path), Timings.load("cpu", tmp_path)
    one.put("conv", KEY, 64, "rows", 1.0)
    other.put("conv", KEY, 64, "tile", 2.0)
    one.save()
    other.save()
    assert Timings.load("cpu", tmp_path).times("conv", KEY, 64) == {"rows": 1.0, "tile": 2.0}
    assert len(list(tmp_path.iterdir())) == 1  # nothing half-written is left


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"machine": 1}', "another machine", "another form"])
def test_files_that_are_not_ours_are_ignored(tmp_path: Path, damage: str) -> None:
    timings = Timings.load("cpu", tmp_path)
    timings.put("conv", KEY, 64, "rows", 1.0)
    timings.save()
    assert timings.path is not None
    whole = json.loads(timings.path.read_text())
    if damage == "another machine":
        whole["machine"]["pytorch"] = "1.0"
        damage = json.dumps(whole)
    elif damage == "another form":
        whole["microseconds"] = {"conv": {"rows": "fast"}}
        damage = json.dumps(whole)
    timings.path.write_text(damage)
    assert Timings.load("cpu", tmp_path).table == {}
    timings.put("conv", KEY, 64, "rows", 3.0)
    timings.save()
    assert Timings.load("cpu", tmp_path).time("conv", KEY, 64, "rows") == 3.0


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    timings = Timings.load("cpu", tmp_path / "file")
    timings.put("conv", KEY, 64, "rows", 1.0)
    timings.save()
    assert timings.time("conv", KEY, 64, "rows") == 1.0


def test_the_cache_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    timings = Timings.load("cpu")
    assert timings.path is not None and timings.path.parent == tmp_path / "fisedit" / "timings"


def test_machines_are_told_apart() -> None:
    here = Machine.of("cpu")
    assert here.pytorch == torch.__version__ and here.fisedit != "none"
    other = Machine("NVIDIA H100 80GB HBM3", "2.11.0", "3.6.0", "0.1.0")
    assert other.file_name == "NVIDIA-H100-80GB-HBM3-torch2.11.0-triton3.6.0-fisedit0.1.0-3.json"
    assert other.file_name != here.file_name


def test_copies_on_a_cpu_are_the_tensors_themselves() -> None:
    weight, bias = torch.zeros(3), torch.zeros(2)
    ((first, second),) = copies_beyond_l2(weight, bias)
    assert first is weight and second is bias


if torch.cuda.is_available():

    def test_times_on_a_gpu_grow_with_the_work() -> None:
        small, large = (torch.zeros(n << 20, device="cuda") for n in (64, 512))
        copies = copies_beyond_l2(torch.zeros(1 << 20, device="cuda"))
        assert len(copies) > 1 and copies[0][0].data_ptr() != copies[1][0].data_ptr()
        assert time_on_gpu(lambda: small.add_(1)) * 4 < time_on_gpu(lambda: large.add_(1))


def test_between_two_numbers_only_the_fastest_are_measured() -> None:
    """Of either neighbor, however often their work is split; the others are noted as out of the question."""
    measured: list[tuple[str, int]] = []
    speeds = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 5.0}

    def measure(candidate: object, rows: int) -> float:
        measured.append((str(candidate), rows))
        name = str(candidate)[0]
        return rows * (6 - speeds[name] if rows == 64 else speeds[name])  # the order turns around

    timings = Timings(Machine.of("cpu"))
    ways = {rows: [f"{name} /{rows}" for name in speeds] for rows in (32, 45, 64, 91, 128, 181)}
    timings.fill("product", (), ways, measure)
    between = {rows: sorted(name[0] for name, n in measured if n == rows) for rows in ways}
    assert between[32] == between[64] == between[128] == list("abcde")
    assert between[45] == between[91] == list("abcde")  # a, b, c of one side, and c, d, e of the other
    assert between[181] == list("abc")
    assert timings.time("product", (), 181, "e /181") == math.inf
    assert timings.best("product", (), 181, ways[181], measure) == "a /181"
    assert len(measured) == 5 * 5 + 3


def test_a_choice_is_remembered_until_something_is_measured() -> None:
    timings = Timings(Machine.of("cpu"))
    timings.settle("product", ("a",), 100, "fast")
    assert timings.settled("product", ("a",), 97) == "fast"  # the same point of the grid
    assert timings.settled("product", ("a",), 300) is None and timings.settled("product", ("b",), 100) is None
    with timings.collect():
        assert timings.settled("product", ("a",), 100) is None  # explain() wants every choice made anew
    timings.put("product", ("b",), 8, "slow", 1.0)
    assert timings.settled("product", ("a",), 100) is None
