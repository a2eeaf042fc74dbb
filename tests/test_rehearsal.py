"""What a rehearsal leaves out, and what it tells of its progress. Nothing is launched here: no GPU is needed."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from harness import Harness, masks  # noqa: E402
from published import TINY, arguments, build  # noqa: E402

from fisedit.runtime import kernels  # noqa: E402
from fisedit.runtime import progress as progress_module  # noqa: E402
from fisedit.runtime.calibration import Timings  # noqa: E402
from fisedit.runtime.executor import Memo  # noqa: E402
from fisedit.runtime.kernels.compilers import Compilers  # noqa: E402
from fisedit.runtime.kernels.launch import Rehearsal, rehearse  # noqa: E402
from fisedit.runtime.progress import Progress  # noqa: E402
from fisedit.runtime.row_plan import LevelMasks  # noqa: E402
from fisedit.runtime.tuning import choose, multiply_rows  # noqa: E402

CPU = torch.device("cpu")
Launch = tuple[Any, ...]


class Counted(Progress):
    expected = finished = 0

    def expect(self) -> None:
        self.expected += 1

    def done(self) -> None:
        self.finished += 1


def facts(value: Any) -> Any:
    """What a kernel is compiled for, and launched with, of an argument; not its address."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16
    if hasattr(value, "block_shape"):  # a descriptor
        return tuple(value.shape), tuple(value.strides), tuple(value.block_shape), facts(value.base)
    return value


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    found: list[Launch] = []

    def launch(kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        found.append((kernel, tuple(grid), *map(facts, args), tuple(kwargs.items())))

    for path in Path(kernels.__file__).parent.glob("*/triton.py"):
        monkeypatch.setattr(import_module(f"{kernels.__name__}.{path.parent.name}.triton"), "launch", launch)
    return found


def test_launches_are_left_out_that_others_are_like(
    tmp_path: Path, launched: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a whole call: what is run once is what each layer of that layout would launch."""
    timings, by_layout = Timings.load("cpu", tmp_path), defaultdict[Hashable, list[list[Launch]]](list)

    def compute(given: dict[str, Any], blocks: dict[str, Any]) -> Any:
        assert not blocks  # there are none of few channels
        return choose.run_fastest(multiply_rows.Call(given), timings, lambda way, rows: float(way == "library"))

    def each_time(self: Rehearsal, layout: Hashable, run: Callable[[], Any]) -> Any:
        before = len(launched)
        made = run()
        by_layout[layout].append(launched[before:])
        return made

    progress = Counted()
    monkeypatch.setattr(choose, "ALIGNMENT", 16)  # that of memory of a GPU is always the same
    model = build(TINY, CPU, torch.float32)
    h = Harness(model, arguments(TINY, TINY.size, CPU, torch.float32), provider="triton")
    replays, mask = h.program.replays(), masks(TINY.size)["blob"]
    replay = replays.take(LevelMasks(mask.expand(h.call.batch, -1, -1), replays.levels), h.call.batch, CPU)
    replay.run(h.call.tensors, h.cache, Memo())  # fills its buffers
    monkeypatch.setattr(multiply_rows, "_compute", compute)
    for decide in (False, True):
        assert progress.finished == 0
        with Compilers() as compilers, rehearse(compilers, decide, progress):
            replay._call()
    assert progress.finished == progress.expected >= len({point.rpartition(" ")[0] for point in timings.table}) > 9
    launched.clear()
    with monkeypatch.context() as patched, Compilers() as compilers, rehearse(compilers):
        patched.setattr(Rehearsal, "once", each_time)
        replay._call()
    every, repeated = len(launched), [runs for runs in by_layout.values() if len(runs) > 1]
    assert repeated and all(run == runs[0] for runs in repeated for run in runs)
    launched.clear()
    with Compilers() as compilers, rehearse(compilers):
        replay._call()
    assert len(launched) == every - sum(len(runs[0]) * (len(runs) - 1) for runs in repeated) < every


def test_progress_is_shown_where_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kernels and layers; what is quick shows nothing."""
    shown = []
    for delay in (60.0, 0.0):
        monkeypatch.setattr(progress_module, "DELAY", delay)
        with Progress() as progress, Compilers(progress=progress) as compilers:
            made = [compilers.submit(abs, -number) for number in range(3)]
            progress.expect()
        assert [each.result() for each in made] == [0, 1, 2] and (progress._bar.n, progress._bar.total) == (3, 4)
        shown.append(capsys.readouterr().err)
    assert shown[0] == "" and "compiling and timing kernels for this GPU" in shown[1]


def test_what_is_left_out_has_memory_of_its_own() -> None:
    """Laid out alike; a result that is there twice stays one."""
    rows, moments = torch.empty(2, 3, 8).transpose(0, 1), torch.empty(2, 0, 3, dtype=torch.float64)
    rehearsal, ran = Rehearsal(decide=False), list[str]()

    def run() -> tuple[Tensor, Tensor, Tensor]:
        ran.append("run")
        return rows, rows, moments

    first, second = rehearsal.once("layout", run), rehearsal.once("layout", run)
    assert ran == ["run"] and first[0] is rows and second[0] is second[1] is not rows
    assert [(t.shape, t.stride(), t.dtype) for t in second] == [(t.shape, t.stride(), t.dtype) for t in first]
    assert second[0].data_ptr() != rows.data_ptr()
    assert isinstance(rehearsal.once("one", lambda: rows), Tensor) and isinstance(rehearsal.once("one", run), Tensor)


def test_a_layout_tells_all_that_kernels_are_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "ALIGNMENT", 16)
    rows = torch.zeros(40)
    given: dict[str, Any] = {
        "rows": rows[:32].view(2, 16),
        "count": torch.zeros(1),
        "full": False,
        "norm": {"eps": 1e-5},
    }
    others: list[dict[str, Any]] = [
        {"rows": rows[1:33].view(2, 16)}, {"rows": rows[:32].view(16, 2).t()}, {"rows": rows[:16].view(1, 16)},
        {"rows": rows[:32].view(2, 16).half()}, {"full": True}, {"norm": {"eps": 1e-6}}, {"count": None},
    ]  # fmt: skip
    layouts = [choose.layout_of(given | other) for other in others]
    assert choose.layout_of(given) not in layouts and len(set(layouts)) == len(layouts)
    assert choose.layout_of(given) == choose.layout_of(given | {"rows": torch.zeros(2, 16), "count": torch.ones(1)})
