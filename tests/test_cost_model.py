"""Masks at every level, tile counts, and what the cost models choose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit.runtime.cost_model import SIDES, CostModel, count_tiles, paper_cost
from fisedit.runtime.geometry import ConvGeometry
from fisedit.runtime.plan import MaskPlan, Table, project_mask


def conv3x3(side: int) -> ConvGeometry:
    return ConvGeometry((side, side), (side, side), (3, 3), (1, 1), (1, 1), (1, 1))


@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 99), halvings=st.integers(0, 3))
def test_project_mask(height: int, width: int, seed: int, halvings: int) -> None:
    """Against loops that halve level by level as stride-2 convolutions do: 9 -> 5 -> 3."""
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < 0.2
    wanted = mask
    for _ in range(halvings):
        h, w = wanted.shape
        smaller = torch.zeros(-(-h // 2), -(-w // 2), dtype=torch.bool)
        for y in range(h):
            for x in range(w):
                smaller[y // 2, x // 2] |= wanted[y, x]
        wanted = smaller
    assert torch.equal(project_mask(mask, tuple(wanted.shape)), wanted)


def test_project_mask_to_other_sizes() -> None:
    """A level that halving does not lead to: proportional, and never losing a position."""
    mask = torch.zeros(10, 9, dtype=torch.bool)
    mask[7, 4] = True
    assert project_mask(mask, (4, 6)).nonzero().tolist() == [[2, 2]]


@given(seed=st.integers(0, 99), tile=st.tuples(st.sampled_from(SIDES), st.sampled_from(SIDES)))
def test_count_tiles(seed: int, tile: tuple[int, int]) -> None:
    mask = torch.rand(13, 17, generator=torch.Generator().manual_seed(seed)) < 0.05
    assert count_tiles(mask, tile) == len({(y // tile[0], x // tile[1]) for y, x in mask.nonzero().tolist()})


def test_the_printed_formula_does_not_adapt() -> None:
    """Read literally, tiles of height or width 2 under a 3x3 kernel cost nothing, whatever the mask."""
    sparse, full = torch.zeros(32, 32, dtype=torch.bool), torch.ones(32, 32, dtype=torch.bool)
    sparse[5, 5] = True
    for mask in (sparse, full):
        assert paper_cost(mask, conv3x3(32), (2, 2)) == 0
        assert CostModel("paper").choose(mask, conv3x3(32)) == (2, 2)
    assert paper_cost(full, conv3x3(32), (8, 4)) == (8 - 2) * (4 - 2) * 4 * 8


def test_the_halo_cost_adapts() -> None:
    """Scattered pixels are cheapest as rows, a full map as one piece, and more area costs more."""
    generator = torch.Generator().manual_seed(0)
    scattered, full = torch.rand(64, 64, generator=generator) < 0.02, torch.ones(64, 64, dtype=torch.bool)
    blob = torch.zeros(64, 64, dtype=torch.bool)
    blob[16:40, 16:40] = True
    model, geometry = CostModel(), conv3x3(64)
    assert model.choose(scattered, geometry) == (1, 1)
    assert min(model.choose(full, geometry)) >= 16
    tile = model.choose(blob, geometry)
    assert (1, 1) < tile < (64, 64)
    costs = [model.halo(mask, geometry, model.choose(mask, geometry)) for mask in (scattered, blob, full)]
    assert costs == sorted(costs)


@pytest.mark.parametrize(("cost", "tile"), [("rows", (1, 1)), ("dense", (7, 9))])
def test_forced_cuts(cost: str, tile: tuple[int, int]) -> None:
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[2, 3] = True
    assert CostModel(cost).choose(mask, conv3x3(7)) == tile


def test_a_level_smaller_than_every_tile_is_taken_whole() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    geometry = ConvGeometry((1, 1), (1, 1), (3, 3), (1, 1), (1, 1), (1, 1))
    assert CostModel("paper").choose(mask, geometry) == (1, 1)


def test_tables_are_built_once_and_shares_add_up() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0:4, 0:2] = True
    plan = MaskPlan(mask, CostModel("rows"))
    assert plan.table(Table("halo", conv3x3(8))) is plan.table(Table("halo", conv3x3(8)))
    assert plan.table(Table("halo", conv3x3(8))).tolist() == [[2, 10, 18, 26, 32, 33, 34]]
    assert (plan.rows((8, 8)), plan.share(), plan.rows((4, 4)), plan.share((1, 1))) == (8, 0.125, 2, 1.0)
