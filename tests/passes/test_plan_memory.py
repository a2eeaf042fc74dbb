"""Buffers and the order of ops: counts, the graph before and after, numerics, what is left alone, idempotence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from pass_harness import SIZE, Toy, captured, inputs
from torch import Tensor, nn
from torch.fx import GraphModule

from fisedit.capture import bind_call, capture
from fisedit.passes import ir, pipeline
from fisedit.passes.base import PassLog, PassResult, run_passes
from fisedit.passes.infer_shapes import UnknownShape, infer_shapes
from fisedit.passes.insert_cache_loads import loaded_slots
from fisedit.passes.insert_cache_stores import insert_cache_stores
from fisedit.passes.ir import aten
from fisedit.passes.lifetimes import order_of
from fisedit.passes.lower import lower
from fisedit.passes.plan_memory import all_rows, memory_line, plan_memory, planned_bytes, predict_peak
from fisedit.runtime.cache.store import StepCache
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.executor import Store
from fisedit.runtime.plan import MaskPlan


class Narrow(Toy):
    """A wide layer between narrow ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.back, self.early = nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1), nn.Conv2d(8, 8, 1)

    def widely(self, x: Tensor) -> Tensor:
        return self.back(F.silu(self.wide(x)))


class Early(Narrow):
    """Computed before the wide layer of what lives to the end, read behind it."""

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        early = sample.sin()
        return self.widely(sample) * early + sample


class EarlyProduct(Narrow):
    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        other = sample.sin()
        early = self.early(other)
        return self.widely(sample) * early + other


class Consumed(Narrow):
    """What is computed early reads what nobody else does, which would have to wait."""

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        early = self.wide(sample.cos())
        wide = self.wide(sample)
        return self.back((wide + wide.sin()) * early)


class Late(Narrow):
    """A wide value is read at last by what makes a narrow one of it, long after the reader before."""

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        wide = self.wide(sample)
        other = wide.sin().cos().sin()
        return self.back(other) + self.back(wide)


class Alone(Toy):
    """Nothing dies before something of its shape is made."""

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return sample.sin()


def edited(model: nn.Module, fuse: bool = False) -> GraphModule:
    """The edit graph, not planned."""
    gm, _ = captured(model.eval(), *pipeline.edit_passes("cached", fuse=fuse)[:-1])
    return gm


def planned(gm: GraphModule) -> PassResult:
    log = PassLog("test")
    run_passes(gm, [plan_memory], log)
    return log.records[0].result


def names(gm: GraphModule) -> list[str]:
    return [node.name for node in order_of(gm.graph)]


def run(model: nn.Module, gm: GraphModule, mask: Tensor) -> Tensor:
    dense, _ = captured(model)
    insert_cache_stores(dense, loaded_slots(gm.graph))
    call = bind_call(model, (), inputs())
    stored: dict[Store, Tensor] = {}
    lower(dense).run(call.tensors, keep=stored.update)
    source = StepCache(call.batch, {store.slot: value for store, value in stored.items()})
    (out,) = lower(gm).run(call.tensors, plan=MaskPlan(mask, CostModel()), source=source)
    return out


def peak(gm: GraphModule) -> int:
    return predict_peak(gm.graph, all_rows(gm.graph).active)


MASKS = {"all": torch.ones(SIZE, dtype=torch.bool), "some": torch.eye(*SIZE, dtype=torch.bool)}
# Values that take over a buffer, and what the most that lives at once is made of: channels of all rows.
MOVED = {Early: (1, 8 + 8 + 32 + 32, 8 + 32 + 32), Late: (3, 32 + 32 + 32, 8 + 32 + 32)}


@pytest.mark.parametrize("build", MOVED)
def test_the_peak_falls(build: type[Toy]) -> None:
    matched, before, after = MOVED[build]
    model = build().eval()
    plain, gm = edited(model), edited(model)
    row = 2 * 48 * 4  # samples, positions, bytes
    assert peak(gm) == before * row
    assert planned(gm).matched == matched
    assert peak(gm) == after * row <= planned_bytes(gm.graph, {SIZE: 48})
    assert predict_peak(gm.graph, {SIZE: 12}) * 4 == peak(gm)
    assert sorted(names(gm)) == sorted(names(plain)) and names(gm) != names(plain)
    for mask in MASKS.values():
        assert torch.equal(run(model, gm, mask), run(model, plain, mask))
    text = ir.print_graph(gm.graph)
    assert planned(gm).matched == matched and ir.print_graph(gm.graph) == text


def test_golden() -> None:
    gm = edited(Early().eval())
    planned(gm)
    lines = ir.print_graph(gm.graph).splitlines()
    assert_expected_inline(
        "\n".join(line for line in lines if "rows[" in line),
        """\
%gather_rows_default: rows[2, N(6x8), 8] = fisedit.gather_rows(%reshape_default_1, %table_default)  # buffer 0
%linear_default: rows[2, N(6x8), 32] = aten.linear(%gather_rows_default, %flatten_using_ints, @wide.bias)  # wide, buffer 1
%silu_default: rows[2, N(6x8), 32] = aten.silu(%linear_default)  # buffer 2
%linear_default_1: rows[2, N(6x8), 8] = aten.linear(%silu_default, %flatten_using_ints_1, @back.bias)  # back, buffer 3
%sin_default: rows[2, N(6x8), 8] = aten.sin(%gather_rows_default)  # buffer 4
%mul_tensor: rows[2, N(6x8), 8] = aten.mul.Tensor(%linear_default_1, %sin_default)  # buffer 5
%add_tensor: rows[2, N(6x8), 8] = aten.add.Tensor(%mul_tensor, %gather_rows_default)  # buffer 3
%scatter_rows_default: rows[2, N(6x8), 8] = fisedit.scatter_rows(%cache_load_default, %table_default_1, %add_tensor)  # buffer 6""",  # noqa: E501
    )


LEFT: dict[str, Callable[[], GraphModule]] = {
    "its input would live longer": lambda: edited(Consumed()),
    "a product asks for the weights of the next": lambda: edited(EarlyProduct(), fuse=True),
    "random numbers": lambda: with_op(edited(Early()), aten.sin.default, aten.rand_like.default),
    "a side effect between": lambda: with_op(edited(Early()), aten.silu.default, aten.silu_.default),
    "nothing else": lambda: edited(Alone()),
}


def with_op(gm: GraphModule, old: Any, new: Any) -> GraphModule:
    (node,) = gm.graph.find_nodes(op="call_function", target=old)
    node.target = new
    return gm


@pytest.mark.parametrize("why", LEFT)
def test_the_order_that_stays(why: str) -> None:
    gm = LEFT[why]()
    before = names(gm)
    planned(gm)
    assert names(gm) == before


def test_a_product_that_asks_for_nothing_moves() -> None:
    """Not fused."""
    gm = edited(EarlyProduct())
    before = names(gm)
    planned(gm)
    assert names(gm) != before


def test_nothing_to_take_over() -> None:
    gm = edited(Alone())
    assert planned(gm).matched == 0
    buffers = [node.meta["buffer"] for node in order_of(gm.graph) if "buffer" in node.meta]
    assert len(buffers) == len(set(buffers)) == 3  # the gathered rows, their sines, the map they are written into


@pytest.mark.parametrize("fuse", [False, True])
def test_a_unet(fuse: bool) -> None:
    """Nothing idles that could be elsewhere: no op is moved."""
    gm = captured_unet(fuse)
    before = names(gm)
    result = planned(gm)
    assert names(gm) == before and result.matched == (109 if fuse else 144) and not result.refused


def captured_unet(fuse: bool) -> GraphModule:
    model = models.one_level()
    gm = capture(model, bind_call(model, (), models.arguments(model, (8, 8)))).module
    run_passes(gm, pipeline.canonical_passes(), PassLog("canonical"))
    gm = GraphModule(gm, ir.copy_graph(gm.graph))
    run_passes(gm, pipeline.edit_passes("cached", fuse=fuse)[:-1], PassLog("edit"))
    return gm


def test_an_unknown_op_is_refused() -> None:
    """Not planned, and nothing else changes."""
    gm = with_op(edited(Early()), aten.sin.default, aten.nonzero.default)  # how many there are, only the data tells
    before = ir.print_graph(gm.graph)
    result = planned(gm)
    assert result.matched == 0 and [refusal.node for refusal in result.refused] == ["sin_default"]
    assert ir.print_graph(gm.graph) == before
    assert "not planned (the shape of sin_default is unknown: " in memory_line(gm.graph)
    with pytest.raises(UnknownShape, match="sin_default"):
        infer_shapes(gm.graph, all_rows(gm.graph))
