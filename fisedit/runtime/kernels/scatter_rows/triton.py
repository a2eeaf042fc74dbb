from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit.runtime.kernels.launch import cdiv, launch, next_power_of_2, overlaps
from fisedit.runtime.kernels.row_tile import row_tile


@triton.jit(do_not_specialize=["number", "positions", "index_stride"])
def _scatter(
    out, index, rows, number, positions, channels, index_stride, rows_batch, rows_row,
    PDL: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    sample, row, channel, goal = row_tile(index, number, positions, index_stride, PDL, BM, BC)
    good = (goal < positions)[:, None] & (channel < channels)[None, :]
    values = tl.load(rows + sample * rows_batch + row[:, None] * rows_row + channel[None, :], mask=good)
    tl.store(out + (sample * positions + goal)[:, None] * channels + channel[None, :], values, mask=good)


def scatter_rows(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """See the reference. What pads the index writes nothing."""
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    batch, positions, channels = base.shape
    out = base.clone(memory_format=torch.contiguous_format)
    number = index.shape[1]
    block = min(128, next_power_of_2(channels))
    rows_block = max(1, 2048 // block)
    pdl = overlaps(base)
    launch(_scatter, (cdiv(number, rows_block), cdiv(channels, block), batch),
        out, index, rows, number, positions, channels, index.stride(0) if index.shape[0] > 1 else 0, rows.stride(0),
        rows.stride(1), PDL=pdl, BM=rows_block, BC=block, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
