from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fisedit.runtime.kernels.launch import cdiv, launch, next_power_of_2, overlaps
from fisedit.runtime.kernels.row_tile import row_tile


@triton.jit(do_not_specialize=["number", "positions", "index_stride"])
def _gather_rows(
    out, rows, index, number, positions, channels, index_stride, rows_batch, rows_row, rows_channel,
    PDL: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    sample, row, channel, place = row_tile(index, number, positions, index_stride, PDL, BM, BC)
    place = tl.minimum(place, positions - 1)
    good = (row < number)[:, None] & (channel < channels)[None, :]
    begin = rows + sample * rows_batch
    values = tl.load(begin + place[:, None] * rows_row + channel.to(tl.int64)[None, :] * rows_channel, mask=good)
    tl.store(out + (sample * number + row)[:, None] * channels + channel[None, :], values, mask=good)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """See the reference; rows of any strides. The index of a captured graph is padded even where one mask is shared."""
    batch, positions, channels = rows.shape
    number = index.shape[1]
    out = rows.new_empty(batch, number, channels)  # [B, N, C]
    block = min(128, next_power_of_2(channels))
    rows_block = max(1, 512 // block)
    pdl = overlaps(rows)
    launch(_gather_rows, (cdiv(number, rows_block), cdiv(channels, block), batch),
        out, rows, index, number, positions, channels, index.stride(0) if index.shape[0] > 1 else 0, *rows.stride(),
        PDL=pdl, BM=rows_block, BC=block, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
