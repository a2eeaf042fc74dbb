"""Convolutions in blocks of 2x2 outputs: which are offered, and what such a one reads. That it computes the same is in
``test_fused.py``, and of the kernels in ``test_winograd.py``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fuse_harness import error, fused
from pass_harness import SIZE, Toy, ops
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fisedit.passes import fuse_sums, transform_convolutions
from fisedit.passes.fused import get
from fisedit.passes.lower import lower
from fisedit.passes.slot_uses import slot_uses
from fisedit.runtime.cuda_graph import table_keys
from fisedit.runtime.plan import project_mask
from fisedit.runtime.row_plan import Halos, LevelMasks, RowPlan


class Resampled(Toy):
    """Down to half the size and up again, by a convolution with ``options``, and one of the whole size."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up = nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, **options})
        self.last = nn.Conv2d(16, 8, 3, padding=1)

    def enlarge(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.last(torch.cat([sample, self.up(self.enlarge(self.down(sample)))], 1))


class Sized(Resampled):
    def enlarge(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(6, 8), mode="nearest")


class Bilinear(Resampled):
    """To a third of the size, so that no level has a row for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 8, 3, stride=3, padding=1)
        self.enlarge = Sized.enlarge.__get__(self)


class Transposed(Resampled):
    """Of a map that has zeros between its lines, not each line twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)

    def enlarge(self, x: Tensor) -> Tensor:
        return x


class Shortcut(Resampled):
    """A shortcut of one tap in the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Conv2d(8, 8, 1)

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.up(self.enlarge(self.down(sample))) + self.short(sample)
        return super().body(x, timestep, text)


def in_blocks(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if "block_sources" in node.kwargs]


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform_convolutions, "LEAST", 1)
    monkeypatch.setattr(transform_convolutions, "NARROW", 8)
    monkeypatch.setattr(fuse_sums, "CHUNK", 8)


@pytest.mark.parametrize("model", [Resampled(), Sized()], ids=["factor", "size"])
def test_which_are_offered(model: Resampled) -> None:
    """Those of one tap and at a stride are not; weights are made once; the nine taps stay."""
    gm, results = fused(model.eval())
    found = in_blocks(gm)
    assert results["transform_convolutions"].matched == len(found) == 2
    sums = [node.kwargs["block_sources"].meta["table"].of.kernel for node in found]
    assert sums == [(3, 3), (4, 4)]
    assert all(node.kwargs["block_weight"].meta["stage"] == "weights" for node in found)
    assert error(model, gm) < 1e-5


def test_where_weights_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an upsampled map are no more than nine."""
    monkeypatch.setattr(transform_convolutions, "LEAST", 97)
    gm, results = fused(Resampled().eval())
    reasons = [refusal.reason for refusal in results["transform_convolutions"].refused]
    assert sum(reason.startswith("weights decide") for reason in reasons) == len(in_blocks(gm)) == 1
    monkeypatch.setattr(transform_convolutions, "LEAST", 96)  # 2 x 6 x 8 outputs
    assert len(in_blocks(fused(Resampled().eval())[0])) == 2


def test_few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transform_convolutions, "NARROW", 9)
    gm, results = fused(Resampled().eval())
    reasons = [refusal.reason for refusal in results["transform_convolutions"].refused]
    assert reasons.count("it has few channels") == 2 and not in_blocks(gm)


@pytest.mark.parametrize(
    ("model", "reason", "left"),
    [
        (Bilinear(), "no level", 0),
        (Resampled(kernel_size=5, padding=2), "no 3x3", 1),
        (Shortcut(), "other rows", 2),
        (Transposed(), "its map is not upsampled", 1),
    ],
    ids=["no level", "five taps", "shortcut", "transposed"],
)
def test_others_keep_their_taps(model: Resampled, reason: str, left: int) -> None:
    gm, results = fused(model.eval())
    reasons = [refusal.reason for refusal in results["transform_convolutions"].refused]
    assert any(each.startswith(reason) for each in reasons) and len(in_blocks(gm)) == left
    assert "fisedit.multiply_rows" in ops(gm) and error(model, gm) < 1e-5


def test_recorded_rows_of_inactive_outputs_are_fetched_too() -> None:
    """In a corner, one output of a block is active; the block reads the rows of all four."""
    gm, _ = fused(Resampled().eval())
    uses = slot_uses(gm.graph, Graph()).values()
    executable = lower(gm)
    mask = torch.zeros(1, *SIZE, dtype=torch.bool)
    mask[0, 0, 0] = True
    masks = LevelMasks(mask, {level for key in table_keys(executable) for level in key.levels})
    halos = Halos.of(masks, [geometry for use in uses for geometry in use.geometries])
    plan = RowPlan(table_keys(executable), masks.buckets, 2, torch.device("cpu"))
    plan.write(masks, halos)
    for node, level, read in zip(in_blocks(gm), [(3, 4), SIZE], [3, 8], strict=True):
        table = plan.table(node.kwargs["block_sources"].meta["table"])
        nine = plan.table(get(node, "sources").meta["table"])
        assert isinstance(table, Tensor) and isinstance(nine, Tensor)
        own = plan.rows(level)
        fetched = table[table >= own].unique()
        assert len(fetched) == halos.size(level) == read  # of 2x2 rows, or of 3x3
        assert set(nine[nine >= own].tolist()) < set(fetched.tolist())


@pytest.mark.parametrize(
    ("length", "coarse", "covers"),
    [(96, 48, True), (12, 4, True), (4, 16, True), (7, 3, True), (9, 5, False), (10, 8, False)],
)
def test_whether_active_outputs_lie_in_active_blocks(length: int, coarse: int, covers: bool) -> None:
    """As masks of points and lines have it: at some sizes, a level's lines are not two for each one of the next."""
    generator = torch.Generator().manual_seed(0)
    missing = False
    for _ in range(100):
        mask = torch.rand(length, length, generator=generator) < 1.5 / length
        outputs, own = project_mask(mask, (2 * coarse, 2 * coarse)), project_mask(mask, (coarse, coarse))
        below = own.repeat_interleave(2, 0).repeat_interleave(2, 1)
        missing |= bool((outputs & ~below).any())
    assert missing == (not covers) and transform_convolutions._covers(length, coarse) == covers
