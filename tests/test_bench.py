"""The bench scripts run on any machine, and count work rightly."""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import each_kernel
import in_call
import kernel_cases
import pytest
import storage_quality
import tile_model
import torch
import typer
import unet
from kernel_table import PROFILE, KernelTime, Launch, markdown, profile_call, totals
from masks import blob, family, occupancy
from published import MODELS, TINY, arguments, build
from roofline import Work, count_work, peak_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fisedit
from fisedit.capture import bind_call
from fisedit.runtime.calibration import Timings
from fisedit.runtime.executor import Memo
from fisedit.runtime.tuning import choose
from fisedit.runtime.tuning.product import LIBRARY, Product, candidates, estimate

BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.nightly
def test_unet_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small model on a CPU: every figure is there, three counters agree, an edit gives the dense output."""
    output = tmp_path / "unet.json"
    unet.main(
        models="", dtype=None, steps=3, repeats=1, ragged_masks=1, output=output, ways="compiled",
        profile=["blob 5%"], variant=["dense_above=0.1"], max_autotune=0.0, quick=False, tiny=True,
    )  # fmt: skip
    found = json.loads(output.read_text())
    assert found["environment"]["dtype"] == "float32" and found["environment"]["date"]
    tiny = found["tiny"]
    assert len(set(tiny["dense MACs"].values())) == 1
    assert tiny["dense"].keys() == {"compiled"}
    assert [row["mask"] for row in tiny["rows"]] == ["blob 5%", "blob 15%", "ragged, 1 masks"]
    for row in tiny["rows"]:
        assert row["error_dense"] < 1e-6 and row["error"] < 1e-5 and row["ratio"] == row["dense"] / row["ours"]
        assert row["work"]["macs"] <= row["macs"] < row["macs_dense"]
    assert tiny["call, blob 5%"]["launches"][0]["microseconds"] > 0
    for row, found in zip(tiny["rows"], tiny["variants"], strict=True):
        assert set(found["ms"]) == {"default", "dense", "dense_above=0.1"} and found["ms"]["default"] == row["ours"]
        assert found["regret"] == row["ours"] / min(found["ms"].values())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny |")]
    assert len(lines) == 3 and lines[0].startswith("| tiny | blob 5% | 4.9% |")


@pytest.mark.nightly
def test_the_ways_to_call_the_dense_model_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "unet.json"
    unet.main(
        models="", dtype="bfloat16", steps=3, repeats=1, output=output, ways="record,outside", max_autotune=0.0,
        edits=False, tiny=True,
    )  # fmt: skip
    printed, tiny = capsys.readouterr().out, json.loads(output.read_text())["tiny"]
    assert tiny.keys() == {"dense", "first loop, seconds", "dense error"}
    assert 1e-3 < tiny["dense error"] < 1e-1 and f"\nerror of the dense model: {tiny['dense error']:.1e}\n" in printed
    assert all(f"\n{way}: " in printed for way in ("compiled", "record", "outside")) and "|" not in printed


@pytest.mark.nightly
def test_masked_work_is_what_a_packed_call_executes() -> None:
    """Convolutions as rows: the count from the dense graph, the package's, and PyTorch's counter around a call, and
    around the making of the timestep's embeddings, which come from a table."""
    ours = fisedit.compile(build(TINY, "cpu", torch.float32), cost="rows")
    call, mask = arguments(TINY, (6, 10), "cpu", torch.float32), blob((6, 10), 0.2)
    counted, counted_apart = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with ours.record() as base:
            for timestep in (2, 1):
                ours(**call | {"timestep": timestep})
        with ours.edit(base, mask) as edit:
            ours(**call | {"timestep": 2})
            with counted:
                ours(**call | {"timestep": 1})
        program = next(iter(ours._live.programs.values()))
        executable, memo = program.executable("edit"), Memo()
        tensors = bind_call(ours, (), call | {"timestep": 1}).tensors
        executable.prepare(tensors, memo)
        with counted_apart:
            executable.timestep_row(tensors, memo)
    graph = program.captured.module.graph
    work = count_work(graph, mask)
    executed = counted.get_total_flops() // 2 + counted_apart.get_total_flops() // 2
    assert edit.report().macs_sparse == work.macs == executed > counted.get_total_flops() // 2
    dense = count_work(graph)
    assert dense.recorded == 0 < work.recorded and work.bytes < dense.bytes
    everything = count_work(graph, torch.ones(6, 10, dtype=torch.bool))
    assert everything.recorded == 0
    assert everything.activations < dense.activations  # the text's keys and values are made once per edit


def test_floors() -> None:
    peak = peak_of("NVIDIA H100 80GB HBM3")
    assert peak is not None and peak_of("AMD EPYC") is None
    assert Work(macs=int(peak.macs)).floor(peak) == pytest.approx(1.0)
    assert Work(weights=int(peak.bytes), recorded=int(peak.bytes)).floor(peak) == pytest.approx(2.0)
    assert Work(1, 2, 3, 4) + Work(1, 1, 1, 1) == Work(2, 3, 4, 5)


def test_the_ragged_family_is_as_stated() -> None:
    masks = family((96, 96))
    shares = torch.stack([mask.float().mean() for mask in masks])
    assert len(masks) == 24 and abs(float(shares.mean()) - 0.23) < 0.01
    for got, wanted in zip(occupancy(masks), (0.23, 0.28, 0.36, 0.49), strict=True):
        assert abs(got - wanted) < 0.015


def test_published_sizes() -> None:
    """Parameters of the released checkpoints, in millions."""
    from diffusers import UNet2DConditionModel

    for name, millions in (("SD1.5", 859.5), ("SD2.1", 865.9), ("SDXL", 2567.5)):
        with torch.device("meta"):
            model = UNet2DConditionModel(**MODELS[name].config)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_kernel_table() -> None:
    found = profile_call(lambda: torch.ones(3) + 1, torch.device("cpu"))
    assert [one.name for one in found if one.name in ("aten::add", "aten::ones")] == ["aten::ones", "aten::add"]
    assert all(launch.microseconds > 0 for launch in found) and len(totals([*found, *found])) <= len(found)
    text = markdown([KernelTime("a", 3, 60.0), KernelTime("b", 1, 30.0), KernelTime("c", 1, 10.0)], most=1).splitlines()
    assert text[2:] == ["| `a` | 3 | 60 | 60.0% |", "| `2 others` | 2 | 40 | 40.0% |", "| all | 5 | 100 | |"]


def test_options_of_variants() -> None:
    assert unet.parse_options("cost=rows,dense_above=0.5") == {"cost": "rows", "dense_above": 0.5}


def test_kernel_bench(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    each_kernel.main(
        shares="0.3", ragged_share=0.0, dtype="float16", output=tmp_path / "kernels.json", tiny=True, regret=False
    )
    found = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    assert {one["op"] for one in found} == {*kernel_cases.OPS, kernel_cases.BLOCKS}
    assert all(one["microseconds"] > 0 for one in found)
    assert "| fold_group_norms | 61 norms of 128 channels |" in capsys.readouterr().out


def test_neighbor_sources_are_a_convolutions() -> None:
    """The bench's own table, in the reference kernel: the convolution's outputs at the active positions."""
    active, channels = blob((6, 7), 0.3), 3
    image, weight = torch.randn(2, channels, 6, 7), torch.randn(5, channels, 3, 3)
    rows = image.flatten(2).transpose(1, 2)  # [B, R, C]
    level, reference = kernel_cases.Level(6, channels), kernel_cases.load_kernels("reference")
    case = kernel_cases.Cases(reference, level, active, image.device, "float32")
    recorded = rows.masked_fill(active.flatten()[:, None], float("nan"))  # what is active is not read there
    out = case.multiply(
        rows[:, active.flatten()], weight.permute(0, 2, 3, 1).flatten(1), recorded=recorded,
        sources=kernel_cases.neighbor_sources(active), bias=torch.zeros(5),
    )()  # fmt: skip
    wanted = torch.nn.functional.conv2d(image, weight, padding=1)[..., active].transpose(1, 2)
    torch.testing.assert_close(out, wanted)


def test_the_measured_way_beside_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of a product is timed at the case's own number of rows; text attention has only one."""
    active, level = blob((8, 8), 0.5), kernel_cases.Level(8, 64)
    kernels = {op: getattr(importlib.import_module(f"fisedit.runtime.tuning.{op}"), op)
               for op in ("multiply_rows", "attend_rows")}  # fmt: skip
    cases = kernel_cases.Cases(kernels, level, active, active.device, "float16")
    asked: list[int] = []

    def time_way(runs: list[Any]) -> float:
        asked.append(len(runs))
        return 10.0 - len(asked)  # the last is the fastest

    monkeypatch.setattr(choose, "time_way", time_way)
    monkeypatch.setattr(choose, "choose_way", lambda call, timings: choose.RULE)
    linear, text = cases.linear(256, 1280), cases.text_attention()
    assert all(len(set(each_kernel.configurations(op))) > 5 for op in each_kernel.TILES)
    spent = each_kernel.Timed(linear.op, linear.shape, 8, "blob", linear.rows, 50.0, None, None, 0.0, 0.0)
    one = each_kernel.with_best_way(spent, linear, active.device)
    assert (one.chosen, one.best, one.best_config) == (9.0, 10.0 - len(asked), "library") and len(asked) > 7
    assert each_kernel.with_best_way(spent, text, active.device) is spent


def test_regret_of_kernels() -> None:
    def timed(op: str, microseconds: float, best: float | None, chosen: float | None = None) -> each_kernel.Timed:
        spent = each_kernel.Timed(op, "shape", 96, "blob", 8, microseconds, None, None, 0.0, 0.0)
        return replace(spent, chosen=chosen, best=best, best_config="64x64")

    rows = [timed("multiply_rows", 10.0, 10.0), timed("multiply_rows", 30.0, 22.0), timed("attend_rows", 5.0, None)]
    found = "1.250 of the best in all, at worst 1.36 (shape, 8 rows: 64x64)"
    assert each_kernel.regrets(rows) == [f"multiply_rows, 2 cases: {found}", f"blob, 2 cases: {found}"]
    tuned = [timed("attend_rows", 50.0, 10.0, chosen=11.0), timed("attend_rows", 50.0, 10.0, chosen=10.0)]
    found = "1.050 of the best in all, at worst 1.10 (shape, 8 rows: 64x64)"
    assert each_kernel.regrets(tuned)[0] == f"attend_rows, 2 cases: {found}"
    other = [rows[0], replace(rows[1], mask="ragged")]
    assert [line.partition(" of")[0] for line in each_kernel.regrets(other)[1:]] == [
        "blob, 1 cases: 1.000", "ragged, 1 cases: 1.364"
    ]  # fmt: skip
    assert each_kernel.configurations("normalize_rows") == []


def test_tile_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU that is just as the model says; and one where a tile is the fastest for all rows but the last."""
    product = Product(9, 2, (320, 0, 0), 320, torch.float16, "bias")
    timings = Timings.load("cpu", tmp_path)
    tile = candidates(product, 256)[0]
    for rows in (64, 128, 256):
        for way in {tile, *candidates(product, rows)}:
            timings.put(product, rows, way, estimate(way, product, rows))
        timings.put(product, rows, LIBRARY, 1e3)
    timings.save()
    assert timings.path is not None
    tile_model.main(timings.path)
    head, _, _, _, *ratios, further, _, _, _, _ = capsys.readouterr().out.splitlines()
    assert head.startswith("3 products at a number of rows") and head.endswith(
        "takes +0% of them on average, off by 0%"
    )
    assert len(ratios) == 3 and all(line.endswith("| 6 | 0.0% | 0.0% | 0.0% |") for line in ratios)
    assert further.startswith("| a bucket further | ")
    for rows, time, library in ((64, 1.0, 1e3), (128, 1.0, 1e3), (256, 3.0, 0.5)):
        timings.put(product, rows, tile, time)
        timings.put(product, rows, LIBRARY, library)
    assert sorted(tile_model.a_bucket_further(list(tile_model.read(timings.table)))) == [1.0, 6.0]
    assert tile_model.line("nothing", []) == "| nothing | 0 | | | |"


def test_in_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Launches that start early count from the end of those in front; PyTorch's products are passed over."""

    def layer(kind: str, way: str, timed: float, fused: str = "bias") -> dict[str, Any]:
        costs = {way: timed, "library": 99.0}
        return {"kind": kind, "key": ["2 x 64 to 64", "float16", fused], "rows": 64, "chosen": way, "costs": costs}

    tile, text = "64x64x64 w4 s4 /1", "bias heads of 64, 77 keys"
    layers = [layer("linear", tile, 3.0), layer("linear", "library", 5.0), layer("self-attention", "cudnn", 7.0),
              layer("linear", f"{tile} specialized in turns", 4.0), layer("linear", f"{tile} specialized", 2.0),
              layer("linear", tile, 3.0), layer("linear", f"{tile} specialized", 2.0, text),
              layer("linear", tile, 1.0, text)]  # fmt: skip
    times = [Launch("copy", 0.0, 1.0), Launch("_multiply", 0.5, 4.5), Launch("nvjet", 5.0, 5.0),
             Launch("multiply_in_turns", 9.0, 5.0), Launch("multiply_specialized", 9.5, 3.0),
             Launch("_multiply", 13.0, 5.0), Launch("multiply_attend_specialized", 18.0, 3.0),
             Launch("_multiply_attend", 21.0, 1.0)]  # fmt: skip
    profile = {"layers": layers, "launches": [asdict(launch) for launch in reversed(times)]}
    environment = {"device": "a GPU", "device type": "cuda", "torch": "2", "diffusers": "0", "date": "today"}
    path = tmp_path / "unet.json"

    def run(found: dict[str, Any]) -> str:
        path.write_text(json.dumps({"environment": environment, "SD": found}))
        in_call.main(path, most=12)
        return capsys.readouterr().out

    out = run({"dense": {}, f"{PROFILE}blob 5%": profile})
    assert "SD, blob 5%: 6 products by kernels of ours, 15 µs as timed, +1 within the call" in out
    assert (
        "| linear, 2 x 64 to 64, bias heads of 64, 77 keys | 64 | 64x64x64 w4 s4 /1 specialized | 1 | 2.0 | 3.0" in out
    )
    assert "| linear, 2 x 64 to 64, bias | 64 | 64x64x64 w4 s4 /1 | 2 | 3.0 | 4.0 | +2 |" in out
    assert "| 64x64x64 w4 s4 /1 specialized in turns | 1 | 4.0 | 4.0 | +0 |" in out
    assert "| 64x64x64 w4 s4 /1 specialized | 1 | 2.0 | 0.0 | -2 |" in out and out.endswith("today\n")
    none = run({f"{PROFILE}blob 5%": {"layers": [], "launches": []}})
    assert "0 products" in none and "|" not in none
    with pytest.raises(typer.BadParameter, match="SD, blob 5%: 5 launches of products do not fit 6 layers"):
        run({f"{PROFILE}blob 5%": {**profile, "launches": profile["launches"][1:]}})
    with pytest.raises(typer.BadParameter, match="no profile"):
        run({"dense": {}})


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="needs Triton's assembler")
def test_loops_are_short_and_spill_nothing() -> None:
    """As compiled for an H100: addresses that the compiler takes for unaligned make them several times as long, and
    what is loaded there is not pipelined through shared memory."""
    found = compiled("(128x128x64|, 64x128) w[48] .*([0-9]|p264)$")
    assert list(found) == ["heads of 64", "heads of 40", "convolution", "linear", "gated", "normalized"]
    for kind, (_, loop, _, _, registers, spilled, shared) in found.items():
        assert 40 < loop < (700 if kind.startswith("heads") else 300) and registers <= 255 and 64 < shared <= 227
        assert spilled == 0


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="needs Triton's assembler")
def test_warps_that_multiply_load_nothing() -> None:
    """As compiled for an H100, by Gluon: their loop waits for a step, multiplies it, and says that it may go. Around
    theirs, those that attend spill a few numbers; they wait twice for four products."""
    found = compiled("(64x64x64 .*|of 64, 192x128 .* p132) specialized$")
    _, loop, _, waits, registers, spilled, shared = found.pop("heads of 64")
    assert 300 < loop < 500 and registers == 128 and 128 <= shared <= 227 and spilled < 100 and waits == 2
    assert list(found) == ["convolution", "linear", "gated", "normalized", "attending"]
    for kind, (_, loop, _, waits, registers, spilled, shared) in found.items():
        least = 2 * 77 * 64 * 2 / 1024 + 5 * 16 if kind == "attending" else 128  # KB: a head's text, and five steps
        assert 20 < loop < 80 and waits == 1 and registers <= 168 and least <= shared <= 227 and spilled == 0


def compiled(only: str) -> dict[str, list[int]]:
    """What ``kernel_code.py --tiles`` prints of each kind of kernel: instructions, registers, bytes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "kernel_code.py", "--tiles", "--only", only]
    done = subprocess.run(command, cwd=BENCH, env=environment, capture_output=True, text=True, check=True)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "`" in line]
    return {name.split(",")[0]: [int(number) for number in numbers] for name, *numbers in rows}


@pytest.mark.nightly
def test_what_storage_costs(tmp_path: Path) -> None:
    """Exact edits are themselves; 8 bits are near them, and nearer than edits that see no recorded keys."""
    output = tmp_path / "storage.json"
    storage_quality.main(edits=1, steps=4, size=64, guidance=5.0, seed=1, device="cpu", output=output)
    found = json.loads(output.read_text())
    assert found["exact"]["psnr"] == [100.0] and found["exact"]["common"] == [1.0]
    (keys,), (every,), (active,) = (found[n]["psnr"] for n in ("keys in 8 bits", "all in 8 bits", "active keys"))
    assert keys > 40 > active and every > 35
    assert found["exact"]["bytes"] > found["keys in 8 bits"]["bytes"] > 2 * found["all in 8 bits"]["bytes"]
