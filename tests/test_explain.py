"""Choices as text, and the cuts of convolutions that are explained are those that are made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import arguments, one_level

import fisedit
from fisedit.config import CompileConfig
from fisedit.explanation import attention_of, explain, product_of
from fisedit.passes.fused import get
from fisedit.passes.ir import PRODUCTS, args, is_op
from fisedit.passes.ir import fisedit as ops
from fisedit.program import Program
from fisedit.runtime import kernels
from fisedit.runtime.calibration import Choice, Timings
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.explain import CallChoice, explain_choices, tile_choices
from fisedit.runtime.geometry import ConvGeometry
from fisedit.runtime.plan import MaskPlan, Table
from fisedit.runtime.tuning.attend_rows import Attention
from fisedit.runtime.tuning.product import Product

CONV = ConvGeometry((16, 16), (16, 16), (3, 3), (1, 1), (1, 1), (1, 1))
SHORTCUT = ConvGeometry((16, 16), (16, 16), (1, 1), (1, 1), (0, 0), (1, 1))


def test_layers_alike_share_a_line() -> None:
    conv = Choice("conv", (320, 320), 461, "rows", {"rows": 9.0, "tile": 12.5, "dense": 140.0})
    linear = Choice("linear", (320, "geglu"), 461, "library", {"library": 4.0})
    text = explain_choices([conv, linear, conv], "µs", CallChoice(0.05, False, 2.0, 15.1))
    assert text.splitlines() == [
        "5.0% active: the edit runs sparse (expected: sparse 2.00 ms, dense 15.10 ms)",
        "  2 x conv 320 320        461 rows: rows 9 µs; against tile 12.5, dense 140",
        "  1 x linear 320 geglu    461 rows: library 4 µs, the only candidate",
        "all 3 layers: 22 µs",
    ]


def test_what_cannot_run_and_what_was_not_measured() -> None:
    few = Choice("conv", (1,), 8, "a", dict(zip("abcdef", (1, 2, 3, 4, 5, 6), strict=True)))
    broken = Choice("conv", (2,), 8, "a", {"a": 1.0, "b": float("inf")})
    unknown = Choice("conv", (3,), 8, "a", {})
    lines = explain_choices([few, broken, unknown], "µs").splitlines()
    assert lines[0].endswith(": a 1 µs; against b 2, c 3, d 4, 2 more")
    assert lines[1].endswith(": a 1 µs; against b left out")
    assert lines[2].endswith(": a (nothing was measured)")
    assert len(lines) == 3  # no sum without every part of it


def test_a_dense_call_says_so() -> None:
    assert explain_choices([], "µs", CallChoice(0.8, True)) == "80.0% active: the edit runs dense"


def test_explained_cuts_are_those_of_the_plan() -> None:
    for share, cost in ((0.02, "halo"), (0.4, "halo"), (1.0, "halo"), (0.1, "paper"), (0.1, "dense")):
        mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(1)) < share
        mask[0, 0] = True
        plan = MaskPlan(mask, CostModel(cost))  # type: ignore[arg-type]
        for geometry in (CONV, SHORTCUT):
            plan.table(Table("neighbors", geometry))
            tile = plan.tiles[geometry]
            wanted = "rows" if tile == (1, 1) else "dense" if tile == (16, 16) else f"tiles of {tile[0]}x{tile[1]}"
            (choice,) = tile_choices([geometry], mask, plan.cost_model)
            assert (choice.chosen, choice.rows) == (wanted, int(mask.sum()))
            if cost == "halo" and geometry is CONV:
                assert choice.costs[choice.chosen] == min(choice.costs.values())


MASK = torch.zeros(8, 8, dtype=torch.bool)
MASK[2:5, 3:6] = True


@pytest.fixture(scope="module")
def unet() -> fisedit.CompiledUNet:
    """A small model, captured by one recorded call."""
    model = one_level()
    compiled = fisedit.compile(model)
    assert compiled.explain(MASK).startswith("Nothing is captured yet")
    with torch.no_grad(), compiled.record():
        compiled(**arguments(model, (8, 8)))
    return compiled


def test_a_compiled_model_explains_its_edits(unet: fisedit.CompiledUNet) -> None:
    """Every convolution of the reference graph."""
    lines = unet.explain(MASK).splitlines()
    assert lines[0] == "14.1% active: the edit runs sparse"
    convolutions = sum(isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3) for m in unet.modules())
    assert lines[-1].startswith(f"all {convolutions} layers: ")
    assert sum(int(line.split(" x ")[0]) for line in lines[1:-1]) == convolutions


def test_tiles_are_explained_on_the_gpu_of_the_model(
    unet: fisedit.CompiledUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which ones there are depends on the GPU that is the current one."""
    captured = next(iter(unet._live.programs.values())).captured
    first, *others = captured.signature.tensors
    on_gpu = replace(captured.signature, tensors=((*first[:3], "cuda:1"), *others))
    program = Program(replace(captured, signature=on_gpu), CompileConfig(provider="triton", dense="eager"))
    current, asked = [0], list[int]()

    @contextmanager
    def device(given: int) -> Iterator[None]:
        current.append(given)
        yield
        current.pop()

    def expect(self: Timings, *_: Any) -> dict[Any, float]:
        asked.append(current[-1])
        return {}

    monkeypatch.setattr(kernels, "why_not_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(Timings, "expect", expect)
    explain(program, MASK, CostModel(), Timings.load("cpu", tmp_path))
    assert set(asked) == {1} and current == [0]


def test_a_fused_graph_is_explained_by_its_timings(unet: fisedit.CompiledUNet, tmp_path: Path) -> None:
    """The shapes that are looked up are those that running products are kept by."""
    program = Program(next(iter(unet._live.programs.values())).captured, CompileConfig(provider="triton"))
    timings = Timings.load("cpu", tmp_path)
    lines = explain(program, MASK, CostModel(), timings).splitlines()
    products = [node for node in program.graphs["edit"].graph.nodes if is_op(node, *PRODUCTS)]
    attentions = [node for node in program.graphs["edit"].graph.nodes if is_op(node, ops.attend_rows.default)]
    attentions = [node for node in attentions if args(node)[5] is not None]  # over a recorded map, not over text
    *lines, memory = lines
    assert attentions and sum(int(line.split(" x ")[0]) for line in lines[1:]) == len(products) + len(attentions)
    assert all(line.endswith(": rule (nothing was measured)") for line in lines[1:])
    assert re.fullmatch(r"memory of a call: 0\.\d\d MiB of values, 0\.\d\d in all", memory)

    node = next(node for node in products if get(node, "sources") is not None and get(node, "residual") is not None)
    product = product_of(node, torch.float32, False)
    assert product == Product(9, 2, (16, 0, 0), 16, torch.float32, "bias residual normalize")
    assert product_of(node, torch.float32, True).fused == "bias residual"  # its norm needs it first
    node = next(node for node in products if "norm_weight" in node.kwargs)
    assert product_of(node, torch.float32, True).fused == "bias layer_norm"
    timings.put(product, 12, "rule", 7.0)
    timings.put(product, 12, "library", 4.0)
    text = explain(program, MASK, CostModel(), timings)
    assert "convolution of 9 taps 2 x 16 to 16 float32 bias residual normalize" in text
    assert ": library 4 µs; against rule 7" in text

    attention = attention_of(attentions[0], torch.float32)
    assert attention == Attention(2, 8, 2, 64, torch.float32)
    slower, way, *_ = attention.ways(12)
    timings.put(attention, 12, slower, 9.0)
    timings.put(attention, 12, way, 3.0)
    text = explain(program, MASK, CostModel(), timings)
    assert "self-attention 2 x 8 heads of 2, 64 keys float32" in text
    assert f": {way} " in text and f"against {slower} 9" in text
