"""Which tiles of a product the programs of its kernels have; run by Triton's interpreter without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fisedit.runtime.kernels.multiply_rows.steps import tile_at, working_tile, working_tiles  # noqa: E402

TILE = 16


@triton.jit
def _list_working(out, per, n_out, batch, BM: tl.constexpr):
    total = working_tiles(per, n_out, batch, BM)
    tl.store(out, total)
    for number in range(total):
        tl.store(out + 1 + number, working_tile(number, per, n_out, batch, BM))


@triton.jit
def _list_tiles(out, across):
    tile_m, tile_n = tile_at(tl.program_id(0), tl.program_id(1), across)
    at = out + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(at, tile_m)
    tl.store(at + 1, tile_n)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize(("per", "n_out"), [(1, 1), (1, 16), (7, 8), (16, 16), (17, 32), (33, 40), (20, 90), (90, 90)])
def test_tiles_with_work_are_those_that_hold_rows(batch: int, per: int, n_out: int) -> None:
    """Each once and in order, also one that two samples share."""
    rows = [sample * n_out + row for sample in range(batch) for row in range(per)]
    wanted = sorted({row // TILE for row in rows})
    out = torch.full((len(wanted) + 2,), -1, dtype=torch.int32, device=DEVICE)
    _list_working[(1,)](out, per, n_out, batch, TILE)
    assert out.tolist() == [len(wanted), *wanted, -1]


@pytest.mark.parametrize("across", [0, 1])
def test_programs_beside_each_other_share_rows_or_weights(across: int) -> None:
    grid = (3, 4)
    out = torch.full((12, 2), -1, dtype=torch.int32, device=DEVICE)
    _list_tiles[grid](out, across)
    tiles = [tuple(tile) for tile in out.tolist()]
    assert tiles == [(number // 3, number % 3) if across else (number % 3, number // 3) for number in range(12)]
