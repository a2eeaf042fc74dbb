"""The Triton kernels that gather and scatter rows, against indexing; run by Triton's interpreter without a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from fisedit.runtime.kernels.gather_rows.triton import gather_rows  # noqa: E402
from fisedit.runtime.kernels.scatter_rows.triton import scatter_rows  # noqa: E402

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def padded_index(masks: int, number: int, positions: int, padding: int) -> Tensor:
    """int64 ``[M, number + padding]``: rows in any order, each once, then what pads."""
    index = torch.full((masks, number + padding), positions)
    for mask in range(masks):
        index[mask, :number] = torch.randperm(positions, generator=torch.Generator().manual_seed(mask))[:number]
    return index.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize(("channels", "number"), [(4, 700), (3, 5), (150, 40)])
def test_rows_of_any_strides(dtype: torch.dtype, masks: int, channels: int, number: int) -> None:
    """Those of a sample ``[B, C, H, W]``, contiguous or channels-last, and slices of wider ones."""
    index = padded_index(masks, number, 30 * 40, 7)
    image = random(2, channels, 30, 40, dtype=dtype)
    views = [
        image.permute(0, 2, 3, 1).flatten(1, 2),
        image.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1, 2),
        random(2, 30 * 40, 3 * channels, dtype=dtype)[..., channels : 2 * channels],
    ]
    for rows in views:
        taken = gather_rows(rows, index)
        assert taken.shape == (2, number + 7, channels) and taken.is_contiguous() and taken.isfinite().all()
        for sample in range(2):
            assert torch.equal(taken[sample, :number], rows[sample, index[sample % masks, :number]])


@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize(("channels", "number"), [(4, 700), (150, 40)])
def test_rows_go_back_where_they_were(masks: int, channels: int, number: int) -> None:
    index = padded_index(masks, number, 1200, 7)
    base, rows = random(2, 1200, channels), random(2, number + 7, channels, seed=1)
    made = scatter_rows(base, index, rows)
    wanted = base.clone()
    for sample in range(2):
        wanted[sample, index[sample % masks, :number]] = rows[sample, :number]
    assert torch.equal(made, wanted)
