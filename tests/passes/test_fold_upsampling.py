"""Upsampling folded into the convolution behind it: each parity of outputs has a kernel of four taps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fuse_harness import error, fused
from pass_harness import SIZE, Toy, ops
from torch import Tensor, nn
from torch.fx import Graph

from fisedit.passes.fold_upsampling import _covers
from fisedit.passes.ir import fisedit
from fisedit.passes.lower import lower
from fisedit.passes.slot_uses import slot_uses
from fisedit.runtime.cuda_graph import table_keys
from fisedit.runtime.plan import project_mask
from fisedit.runtime.row_plan import Halos, LevelMasks, RowPlan

FOLDED = fisedit.multiply_upsampled_rows.default


class Upsampled(Toy):
    """Down to half the size and up again, by a convolution with ``options``."""

    def __init__(self, bias: bool = True, **options: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up = nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, **options}, bias=bias)
        self.last = nn.Conv2d(16, 8, 1)

    def enlarge(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    def after(self, x: Tensor) -> Tensor:
        return x

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.last(torch.cat([sample, self.after(self.up(self.enlarge(self.down(sample))))], 1))


class Sized(Upsampled):
    def enlarge(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(6, 8), mode="nearest")


@pytest.mark.parametrize("model", [Upsampled(), Upsampled(bias=False), Sized()], ids=["factor", "no bias", "size"])
def test_a_convolution_of_four_taps_for_each_parity(model: Upsampled) -> None:
    gm, results = fused(model.eval())
    assert results["fold_upsampling"].matched == 1
    (node,) = gm.graph.find_nodes(op="call_function", target=FOLDED)
    assert node.kwargs["parities"].meta["stage"] == "weights"
    assert error(model, gm) < 1e-5


def test_recorded_rows_of_dropped_outputs_are_fetched_too() -> None:
    """In a corner, one of four outputs is active and reads its own row alone; the other three read recorded ones."""
    gm, _ = fused(Upsampled().eval())
    uses = slot_uses(gm.graph, Graph()).values()
    executable = lower(gm)
    mask = torch.zeros(1, *SIZE, dtype=torch.bool)
    mask[0, 0, 0] = True
    masks = LevelMasks(mask, {level for key in table_keys(executable) for level in key.levels})
    halos = Halos.of(masks, [geometry for use in uses for geometry in use.geometries])
    plan = RowPlan(table_keys(executable), masks.buckets, 2, torch.device("cpu"))
    plan.write(masks, halos)
    (node,) = gm.graph.find_nodes(op="call_function", target=FOLDED)
    table = plan.table(node.kwargs["coarse_sources"].meta["table"])
    own, fetched = plan.rows((3, 4)), halos.size((3, 4))
    assert isinstance(table, Tensor) and own <= int(table.max()) < own + fetched
    assert len(table[table >= own].unique()) == fetched == 3  # each its own row


class Activated(Upsampled):
    def after(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Larger(Upsampled):
    """Three times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 8, 3, stride=3, padding=1)

    def enlarge(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(6, 8), mode="nearest")


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Activated(), "something follows"), (Larger(), "no 3x3"), (Upsampled(kernel_size=5, padding=2), "no 3x3")],
    ids=["activated", "three times", "five taps"],
)
def test_others_keep_their_taps(model: Upsampled, reason: str) -> None:
    gm, results = fused(model.eval())
    (refusal,) = results["fold_upsampling"].refused
    assert refusal.reason.startswith(reason) and "fisedit.multiply_upsampled_rows" not in ops(gm)
    assert error(model, gm) < 1e-5


@pytest.mark.parametrize(
    ("length", "coarse", "covers"),
    [(96, 48, True), (12, 4, True), (4, 16, True), (7, 3, True), (9, 5, False), (10, 8, False)],
)
def test_whether_active_outputs_lie_over_active_rows(length: int, coarse: int, covers: bool) -> None:
    """As masks of points and lines have it: at some sizes, a level's lines are not two for each one of the next."""
    generator = torch.Generator().manual_seed(0)
    missing = False
    for _ in range(100):
        mask = torch.rand(length, length, generator=generator) < 1.5 / length
        outputs, own = project_mask(mask, (2 * coarse, 2 * coarse)), project_mask(mask, (coarse, coarse))
        below = own.repeat_interleave(2, 0).repeat_interleave(2, 1)
        missing |= bool((outputs & ~below).any())
    assert missing == (not covers) and _covers(length, coarse) == covers
