"""A trace: the file that a viewer loads, spans of threads and of a GPU's streams, and nothing while none is open."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipeline import AFTER, BEFORE, build_tiny_pipeline, square

import fisedit
from fisedit.errors import NestedTraceError, UnwritableTraceError
from fisedit.runtime.trace import NEAR, TRACKS, Marked, Trace, carry, span
from fisedit.tracing import trace_events

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def read(file: Path) -> dict[str, Any]:
    """A trace file, after what every one must be by the Trace Event Format."""
    content = json.loads(file.read_text(encoding="utf-8"))
    assert set(content) == {"traceEvents", "displayTimeUnit", "otherData"} and content["displayTimeUnit"] == "ms"
    for event in content["traceEvents"]:
        assert isinstance(event["name"], str) and isinstance(event["args"], dict)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event["ph"] in ("M", "X")
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
    names = [(e["name"], e["tid"]) for e in content["traceEvents"] if e["ph"] == "M"]
    assert len(set(names)) == len(names) and [n for n, _ in names].count("process_name") == 1
    assert {e["tid"] for e in complete(content)} == {tid for name, tid in names if name == "thread_name"}
    return content


def complete(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in content["traceEvents"] if event["ph"] == "X"]


def rows(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The spans of each row by its name, as the viewer orders them."""
    named = {e["tid"]: e["args"]["name"] for e in content["traceEvents"] if e["name"] == "thread_name"}
    order = {e["tid"]: e["args"]["sort_index"] for e in content["traceEvents"] if e["name"] == "thread_sort_index"}
    assert set(named) == set(order)
    return {named[tid]: [e for e in complete(content) if e["tid"] == tid] for tid in sorted(order, key=order.get)}


def overlap(first: dict[str, Any], then: dict[str, Any]) -> bool:
    return then["ts"] < first["ts"] + first["dur"] - 1e-4  # a tenth of a nanosecond: these are floats


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, Any]]:
    """A base, an edit of it, and the trace of both."""
    folder = tmp_path_factory.mktemp("trace")
    editor = fisedit.EditPipeline(build_tiny_pipeline(folder))
    with fisedit.trace(folder / "trace.json"):
        base = editor.generate(BEFORE, seed=1, num_inference_steps=5)
        edited = editor.edit(base, AFTER)
    editor.edit(base, AFTER)  # after it: leaves no span
    return base, edited, read(folder / "trace.json")


def test_every_call_of_a_run_is_a_span_of_compute_in_its_order(run: Any) -> None:
    base, edited, content = run
    timesteps, detect = base.recording.timesteps, edited.report.detect_steps
    assert 0 < detect < len(timesteps) == 5
    wanted = [f"record t={t:g}" for t in timesteps] + [f"detect t={t:g}" for t in timesteps[:detect]]
    wanted += [f"sparse t={t:g}" for t in timesteps[detect:]]
    spans = rows(content)["compute"]
    assert [span["name"] for span in spans] == wanted
    assert all(span["cat"] == "cpu" and span["args"] == {"samples": 2} for span in spans)


def test_spans_of_a_row_follow_one_another(run: Any) -> None:
    for spans in rows(run[2]).values():
        assert not any(overlap(first, then) for first, then in pairwise(spans))


def test_a_span_is_no_longer_than_what_the_report_says_of_its_call(run: Any) -> None:
    base, edited, content = run
    report = edited.report
    reported = [*report.seconds_recorded, *report.timings["detect"], *report.timings["sparse"]]
    spans = rows(content)["compute"]
    assert all(0 < span["dur"] * 1e-6 <= most + 1e-9 for span, most in zip(spans, reported, strict=True))


def test_the_file_says_where_it_was_made(run: Any) -> None:
    assert {"device", "torch", "date"} <= set(run[2]["otherData"])


def test_calls_that_are_wholly_or_not_at_all_computed(tmp_path: Path) -> None:
    """Edits of one call that are computed differently are a span each."""
    editor = fisedit.EditPipeline(build_tiny_pipeline(tmp_path))
    base = editor.generate(BEFORE, seed=1, num_inference_steps=2)
    last = f"t={base.recording.timesteps[-1]:g}"
    full, none = torch.ones(16, 16, dtype=torch.bool), torch.zeros(16, 16, dtype=torch.bool)
    with fisedit.trace(tmp_path / "trace.json"), pytest.warns(fisedit.FISEditWarning):
        editor.edit(base, [AFTER] * 3, mask=[square(), full, none])
    names = [event["name"] for event in complete(read(tmp_path / "trace.json"))]
    assert len(names) == 6 and names[3:] == [f"sparse {last}", f"dense {last}", f"recorded {last}"]


def test_nothing_is_done_while_no_trace_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", None)
    closed = span("compute", "a step", GPU, {"bytes": 1})
    assert isinstance(closed, nullcontext) and closed is span("load", "another")
    with closed, closed:
        assert Trace.active() is None
    assert carry(read) is read


def test_the_rows_are_in_their_order_and_those_of_others_follow(tmp_path: Path) -> None:
    with fisedit.trace(tmp_path / "trace.json") as trace:
        assert Trace.active() is trace
        for track in ("mine", *reversed(TRACKS), "another"):
            with span(track, f"of {track}"):
                pass
        with trace.span("compute", "by hand", CPU):
            pass
    content = read(tmp_path / "trace.json")
    assert list(rows(content)) == ["compute", "store", "load", "disk", "mine", "another"]
    assert [(e["name"], e["cat"]) for e in rows(content)["compute"]] == [("of compute", "host"), ("by hand", "cpu")]
    (process,) = (e for e in content["traceEvents"] if e["name"] == "process_name")
    assert process["args"] == {"name": "FISEdit"} and process["pid"] == content["traceEvents"][-1]["pid"]


def test_what_a_span_says_may_be_known_at_its_end(tmp_path: Path) -> None:
    said: dict[str, Any] = {}
    with fisedit.trace(tmp_path / "trace.json"), span("disk", "read", args=said):
        said.update(bytes=12, file=Path("maps"))
    assert complete(read(tmp_path / "trace.json"))[0]["args"] == {"bytes": 12, "file": "maps"}


def test_a_span_that_fails_ends_and_so_does_the_trace(tmp_path: Path) -> None:
    said: dict[str, Any] = {"bytes": 1}
    file = tmp_path / "trace.json"
    with pytest.raises(ZeroDivisionError), fisedit.trace(file), span("compute", "fails", args=said):
        raise ZeroDivisionError
    assert Trace.active() is None and said == {"bytes": 1}
    (event,) = complete(read(file))
    assert event["name"] == "fails" and event["args"] == {"bytes": 1, "error": "ZeroDivisionError"}


def test_a_trace_that_fails_before_its_first_span_replaces_no_file(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text("of yesterday")
    with pytest.raises(ZeroDivisionError), fisedit.trace(tmp_path / "trace.json"):
        raise ZeroDivisionError
    assert (tmp_path / "trace.json").read_text() == "of yesterday"
    with fisedit.trace(tmp_path / "trace.json"):
        pass
    assert complete(read(tmp_path / "trace.json")) == []


def test_spans_of_threads_do_not_mix(tmp_path: Path) -> None:
    """Those of a track that overlap have rows of their own, and in each row they are nested or apart."""
    count, threads, together = 50, 4, threading.Barrier(4)

    def work(number: int) -> None:
        together.wait()
        for step in range(count):
            with span("disk", f"outer {step}", args={"thread": number}), span("disk", "inner", args={"in": step}):
                together.wait()

    with fisedit.trace(tmp_path / "trace.json"), ThreadPoolExecutor(threads) as pool:
        list(pool.map(carry(work), range(threads)))
    found = rows(read(tmp_path / "trace.json"))
    assert list(found) == ["disk", "disk 2", "disk 3", "disk 4"]
    assert sum(map(len, found.values())) == 2 * threads * count
    for row in found.values():
        outer, inner = row[::2], row[1::2]
        assert all(event["name"].startswith("outer") for event in outer)
        assert not any(overlap(first, then) for first, then in pairwise(outer))
        for around, within in zip(outer, inner, strict=True):
            assert around["name"] == f"outer {within['args']['in']}" and around["ts"] <= within["ts"]
            assert within["ts"] + within["dur"] <= around["ts"] + around["dur"] + 1e-4
    each = [event["args"]["thread"] for row in found.values() for event in row[::2]]
    assert sorted(each) == sorted(list(range(threads)) * count)


def test_a_thread_takes_part_by_what_is_carried_to_it(tmp_path: Path) -> None:
    def job(name: str) -> bool:
        with span("disk", name):
            return Trace.active() is not None

    with ThreadPoolExecutor(1) as pool:  # one thread, older than the trace and longer-lived
        assert not pool.submit(job, "before").result()
        with fisedit.trace(tmp_path / "trace.json"):
            late = carry(job)
            assert not pool.submit(job, "by itself").result()
            assert pool.submit(carry(job), "carried").result()
        assert not pool.submit(late, "too late").result()
    assert [event["name"] for event in complete(read(tmp_path / "trace.json"))] == ["carried"]


def test_two_threads_may_have_a_trace_each(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def work(name: str) -> None:
        with fisedit.trace(tmp_path / name):
            both.wait()
            with span("compute", name):
                both.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, ["a.json", "b.json"]))
    for name in ("a.json", "b.json"):
        assert [event["name"] for event in complete(read(tmp_path / name))] == [name]


def test_a_trace_inside_another_is_refused(tmp_path: Path) -> None:
    with fisedit.trace(tmp_path / "outer.json") as outer:
        with pytest.raises(NestedTraceError, match=r"inner\.json.*outer\.json"), fisedit.trace("inner.json"):
            pass
        assert Trace.active() is outer
    assert (tmp_path / "outer.json").exists() and not Path("inner.json").exists()


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("gone/trace.json", "No such file"),
        ("folder", "no file"),
        ("", "no file"),
        ("file/trace.json", "Not a directory"),
        (os.devnull, "no file"),
        ("x" * 300, "too long"),
        ("a\0b", "null"),
    ],
    ids=["no folder", "a folder", "nothing", "in a file", "a device", "long", "zero"],
)
def test_a_path_that_cannot_be_written_is_told_before_anything_runs(
    path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    with pytest.raises(UnwritableTraceError, match=says) as caught, fisedit.trace(path):
        pytest.fail("the block ran")
    assert repr(path) in str(caught.value)
    assert sorted(os.listdir()) == ["file", "folder"] and Trace.active() is None


def test_the_file_is_where_the_path_led_when_the_trace_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other").mkdir()
    Path("link.json").symlink_to("trace.json")
    with fisedit.trace("link.json"):
        monkeypatch.chdir("other")
    monkeypatch.chdir(tmp_path)
    assert Path("link.json").is_symlink() and read(Path("trace.json"))
    assert sorted(os.listdir()) == ["link.json", "other", "trace.json"] and not os.listdir("other")


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_goes_away_meanwhile(fails: bool, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    with pytest.raises(KeyError if fails else UnwritableTraceError), fisedit.trace(tmp_path / "made" / "trace.json"):
        with span("compute", "a step"):
            (tmp_path / "made").rmdir()
        if fails:
            raise KeyError  # the first thing that went wrong
    assert Trace.active() is None


def test_overlapping_spans_of_one_thread_have_a_row_each() -> None:
    """Two streams of a GPU that one thread feeds."""
    times = [(0, 4), (1, 3), (2, 6), (4, 5), (6, 7)]
    spans = [Marked("load", f"{start}-{end}", GPU, {}, 1, start, end) for start, end in times]
    content = {"traceEvents": trace_events(spans)}
    found = {name: [event["name"] for event in row] for name, row in rows(content).items()}
    assert found == {"load": ["0-4", "1-3", "4-5", "6-7"], "load 2": ["2-6"]}


class Device:
    """A GPU whose clock, in seconds, is turned by hand; events are those of its only stream."""

    def __init__(self) -> None:
        self.clock, self.waits, self.capturing = 0.0, 0, False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: Any) -> None:
                self.at = device.clock

            def synchronize(self) -> None:
                device.waits += 1

            def elapsed_time(self, other: Event) -> float:
                return float(np.float32((other.at - self.at) * 1e3))

        class Stream:
            def __init__(self, device: torch.device) -> None:
                assert device == GPU

            def synchronize(self) -> None:
                pass

        for name, value in {
            "Event": Event,
            "Stream": Stream,
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda device: None,
            "is_current_stream_capturing": lambda: device.capturing,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    device.install(monkeypatch)
    return device


def steps(trace: Trace, gpu: Device, durations: list[float], between: float = 0.0) -> list[float]:
    """Marks steps that take so many seconds; returns when each began."""
    starts = []
    for number, seconds in enumerate(durations):
        gpu.clock += between
        starts.append(gpu.clock)
        with trace.span("compute", f"step {number}", GPU):
            gpu.clock += seconds
    return starts


def test_spans_of_a_gpu_are_read_when_the_trace_ends(gpu: Device) -> None:
    trace = Trace("test")
    with trace.open():
        starts = steps(trace, gpu, [0.25, 0.5, 0.125], between=1.0)
    assert gpu.waits == 0
    first, *later = trace.spans()
    assert gpu.waits > 0 and all(each.device == GPU for each in (first, *later))
    assert [each.end - each.start for each in (first, *later)] == pytest.approx([0.25, 0.5, 0.125], abs=1e-6)
    assert [each.start - first.start for each in later] == pytest.approx([s - starts[0] for s in starts[1:]], abs=1e-6)
    assert trace.spans() == [first, *later]


def test_an_hour_later_spans_are_still_told_to_a_few_microseconds(gpu: Device) -> None:
    """CUDA tells times as float32, whose steps are a quarter of a millisecond by then."""
    trace, durations = Trace("test"), [50e-6 + 1e-6 * n for n in range(200)]
    steps(trace, gpu, [0.0])  # the reference
    gpu.clock += 3600.0
    starts = steps(trace, gpu, durations, between=NEAR / 50)
    _, *spans = trace.spans()
    assert [span.end - span.start for span in spans] == pytest.approx(durations, abs=1e-6)
    wanted = [start - starts[0] for start in starts]
    assert [span.start - spans[0].start for span in spans] == pytest.approx(wanted, abs=5e-6)
    assert all(first.end <= then.start for first, then in pairwise(spans))


def test_a_gpu_and_the_host_share_a_time(gpu: Device) -> None:
    gpu.clock = 1e4  # its clock began at another time
    trace = Trace("test")
    with trace.span("disk", "host"), trace.span("load", "gpu", GPU):
        gpu.clock += 1e-9
    within, around = trace.spans()
    assert around.start - 1e-3 <= within.start <= around.end and (within.device, around.device) == (GPU, None)


def test_no_events_are_recorded_into_a_graph(gpu: Device) -> None:
    trace = Trace("test")
    gpu.capturing = True
    with pytest.raises(KeyError), trace.span("compute", "captured", GPU):
        raise KeyError
    with trace.span("compute", "captured on a CPU", CPU):
        pass
    assert [each.name for each in trace.spans()] == ["captured on a CPU"]


def test_a_failed_span_of_a_gpu_ends(gpu: Device) -> None:
    trace = Trace("test")
    with pytest.raises(KeyError), trace.span("compute", "fails", GPU):
        gpu.clock += 1.0
        raise KeyError
    (failed,) = trace.spans()
    assert failed.end - failed.start == pytest.approx(1.0) and failed.args == {"error": "KeyError"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_of_a_gpu(tmp_path: Path) -> None:
    """Work on two streams: each span on its row, as long as the work, none waited for before the end."""
    x, side = torch.randn(4096, 4096, device=GPU), torch.cuda.Stream(GPU)
    work: Callable[[], Any] = lambda: [x @ x for _ in range(50)]  # noqa: E731
    work()
    torch.cuda.synchronize()
    with fisedit.trace(tmp_path / "trace.json"):
        with span("compute", "products", GPU):
            work()
        with torch.cuda.stream(side), span("load", "copy", GPU):
            x.to("cpu")
        done = torch.cuda.Event(enable_timing=True)
        with span("compute", "again", GPU):
            work()
            done.record()
        assert not done.query()
    found = rows(read(tmp_path / "trace.json"))
    assert [event["name"] for event in found["compute"]] == ["products", "again"]
    assert not overlap(*found["compute"])
    assert all(event["dur"] > 1e3 for event in found["compute"])  # µs: 3 T multiply-accumulates take longer
    assert found["load"][0]["ts"] < found["compute"][1]["ts"] + found["compute"][1]["dur"]
