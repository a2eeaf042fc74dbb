"""Timings are measured once, kept for this machine only, and answered from the table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fisedit.errors import UnknownOptionError
from fisedit.runtime.calibration import (
    VARIABLE,
    Candidate,
    Choice,
    Machine,
    Timings,
    copies_beyond_l2,
    time_on_gpu,
)

KEY = (320, 320, 9, "float16", True)


@dataclass(frozen=True)
class Layer:
    """A shape whose candidates are the same for all numbers of rows."""

    names: tuple[Candidate, ...] = ("rows", "tile")
    kind: str = "conv"
    key: tuple[Any, ...] = KEY

    def ways(self, rows: int) -> Sequence[Candidate]:
        return self.names


LAYER = Layer()


class Stopwatch:
    """Measurements made up: ``microseconds[candidate]`` a row; counts how often it is asked."""

    def __init__(self, **microseconds: float) -> None:
        self.microseconds = microseconds
        self.asked: list[tuple[Candidate, int]] = []

    def __call__(self, candidate: Candidate, rows: int) -> float:
        self.asked.append((candidate, rows))
        return self.microseconds[str(candidate)] * rows


def test_each_candidate_is_measured_once(tmp_path: Path) -> None:
    timings, watch = Timings.load("cpu", tmp_path), Stopwatch(rows=3.0, tile=2.0, dense=1.0)
    timings.fill(LAYER, [512], watch)
    timings.fill(LAYER, [512], watch)
    assert watch.asked == [("rows", 512), ("tile", 512)]
    assert timings.unknown(LAYER, [512, 1024]) == {1024: ["rows", "tile"]}
    more = Layer(("dense", "tile"))
    assert timings.unknown(more, [512]) == {512: ["dense"]}  # a new one beside the known
    timings.fill(more, [512], watch)
    timings.fill(Layer(("rows",), key=(*KEY, 1)), [512], watch)
    timings.fill(Layer(("rows",), kind="linear"), [512], watch)
    assert watch.asked[2:] == [("dense", 512), ("rows", 512), ("rows", 512)]


def test_what_was_measured_is_expected(tmp_path: Path) -> None:
    timings = Timings.load("cpu", tmp_path)
    timings.put(LAYER, 64, "rows", 6.4)
    timings.put(LAYER, 64, "an older candidate", 0.1)
    assert timings.expect(LAYER, 64) == {"rows": 6.4}
    assert timings.expect(LAYER, 96) == {}


def test_what_cannot_run_is_not_expected_to(tmp_path: Path) -> None:
    timings, layer = Timings.load("cpu", tmp_path), Layer(("huge", "rows"))
    timings.fill(layer, [64], Stopwatch(huge=math.inf, rows=1.0))
    assert timings.expect(layer, 64) == {"rows": 64.0}
    timings.save()
    again = Timings.load("cpu", tmp_path)
    assert again.time(layer, 64, "huge") == math.inf and again.unknown(layer, [64]) == {}


def test_candidates_may_be_tuples(tmp_path: Path) -> None:
    slow, fast = ("tile", (8, 8), 4), ("tile", (16, 8), 4)
    timings, layer = Timings.load("cpu", tmp_path), Layer((slow, fast))
    timings.fill(layer, [8], lambda candidate, rows: 1.0 if candidate == fast else 2.0)
    timings.save()
    assert Timings.load("cpu", tmp_path, calibrate="off").expect(layer, 8) == {slow: 2.0, fast: 1.0}


def test_measuring_may_be_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    timings, watch = Timings.load("cpu", tmp_path), Stopwatch(rows=1.0, tile=2.0)
    timings.fill(LAYER, [64], watch)
    assert watch.asked == [] and timings.unknown(LAYER, [64]) == {} and timings.expect(LAYER, 64) == {}
    timings.save()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "always")
    with pytest.raises(UnknownOptionError, match="always"):
        Timings.load("cpu")


def test_choices_are_collected(tmp_path: Path) -> None:
    timings = Timings.load("cpu", tmp_path)
    timings.fill(LAYER, [64], Stopwatch(rows=3.0, tile=2.0))
    with timings.collect() as choices:
        timings.settle(LAYER, 64, "tile")
        with timings.collect() as inner:
            timings.settle(LAYER, 500, "rows")
    timings.settle(LAYER, 64, "tile")
    assert choices == [Choice("conv", KEY, 64, "tile", {"rows": 192.0, "tile": 128.0})]
    assert inner == [Choice("conv", KEY, 500, "rows", {})]


def test_the_table_is_kept(tmp_path: Path) -> None:
    timings = Timings.load("cpu", tmp_path / "made" / "here")
    timings.fill(LAYER, [64], Stopwatch(rows=1.0, tile=2.0))
    timings.save()
    again = Timings.load("cpu", tmp_path / "made" / "here")
    assert again.table == timings.table and again.times(LAYER, 64) == {"rows": 64.0, "tile": 128.0}


def test_a_table_that_was_just_written_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written at first, not again within the time, and then with all that came meanwhile."""
    clock = [100.0]
    monkeypatch.setattr("fisedit.runtime.calibration.time.monotonic", lambda: clock[0])
    timings = Timings.load("cpu", tmp_path)
    for rows, seconds, known in ((64, 0.0, [64]), (128, 1.9, [64]), (256, 0.2, [64, 128, 256])):
        clock[0] += seconds
        timings.put(LAYER, rows, "rows", 1.0)
        timings.save(every=2.0)
        kept = Timings.load("cpu", tmp_path)
        assert [number for number in (64, 128, 256) if kept.time(LAYER, number, "rows")] == known
    timings.put(LAYER, 512, "rows", 1.0)
    timings.save()
    assert Timings.load("cpu", tmp_path).time(LAYER, 512, "rows") == 1.0


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    one, other = Timings.load("cpu", tmp_path), Timings.load("cpu", tmp_path)
    one.put(LAYER, 64, "rows", 1.0)
    other.put(LAYER, 64, "tile", 2.0)
    one.save()
    other.save()
    assert Timings.load("cpu", tmp_path).times(LAYER, 64) == {"rows": 1.0, "tile": 2.0}
    assert len(list(tmp_path.iterdir())) == 1  # nothing half-written is left


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"machine": 1}', "another machine", "another form"])
def test_files_that_are_not_ours_are_ignored(tmp_path: Path, damage: str) -> None:
    timings = Timings.load("cpu", tmp_path)
    timings.put(LAYER, 64, "rows", 1.0)
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
    timings.put(LAYER, 64, "rows", 3.0)
    timings.save()
    assert Timings.load("cpu", tmp_path).time(LAYER, 64, "rows") == 3.0


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    timings = Timings.load("cpu", tmp_path / "file")
    timings.put(LAYER, 64, "rows", 1.0)
    timings.save()
    assert timings.time(LAYER, 64, "rows") == 1.0


def test_the_cache_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    timings = Timings.load("cpu")
    assert timings.path is not None and timings.path.parent == tmp_path / "fisedit" / "timings"


def test_machines_are_told_apart() -> None:
    here = Machine.of("cpu")
    assert here.pytorch == torch.__version__ and here.fisedit != "none"
    other = Machine("NVIDIA H100 80GB HBM3", "2.11.0", "3.6.0", "0.1.0")
    assert other.file_name == "NVIDIA-H100-80GB-HBM3-torch2.11.0-triton3.6.0-fisedit0.1.0-11.json"
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


def test_a_choice_is_remembered_until_something_is_measured() -> None:
    timings = Timings(Machine.of("cpu"))
    timings.settle(LAYER, 100, "fast")
    assert timings.settled(LAYER, 100) == "fast"
    assert timings.settled(LAYER, 300) is None and timings.settled(Layer(kind="linear"), 100) is None
    with timings.collect():
        assert timings.settled(LAYER, 100) is None  # explain() wants every choice made anew
    timings.put(Layer(kind="linear"), 8, "slow", 1.0)
    assert timings.settled(LAYER, 100) is None
