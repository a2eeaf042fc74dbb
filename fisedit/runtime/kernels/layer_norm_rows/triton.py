from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fisedit.runtime.kernels.launch import cdiv, launch, next_power_of_2, overlaps

ELEMENTS = 2048
"""Of a program of 128 threads: one row of up to 2048 channels, or several shorter ones."""


@triton.jit(do_not_specialize=["number"])
def _layer_norm(
    out, rows, weight, bias, count, number, channels, rows_batch, rows_row, eps,
    BM: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    last = tl.load(count)
    if tl.program_id(0) * BM >= last:
        return
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sample = tl.program_id(1).to(tl.int64)
    row, channel = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    real = channel < channels
    good = (row < last)[:, None] & real[None, :]
    at = rows + sample * rows_batch + row[:, None] * rows_row + channel[None, :]
    x = tl.load(at, mask=good, other=0.0).to(tl.float32)  # [BM, D]
    if weight is not None:
        scale = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    x = tl.where(real[None, :], x - tl.sum(x, 1)[:, None] / channels, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 1) / channels + eps)[:, None]
    if weight is not None:
        y *= scale[None, :]
    if bias is not None:
        y += offset[None, :]
    place = (sample * number + row) * channels
    tl.store(out + place[:, None] + channel[None, :], y.to(out.dtype.element_ty), mask=good)


def layer_norm_rows(rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, count: Tensor) -> Tensor:
    """The reference's contract."""
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    batch, number, channels = rows.shape
    padded = next_power_of_2(channels)
    block = max(1, ELEMENTS // padded)
    out = rows.new_empty(batch, number, channels)  # [B, N, C]
    pdl = overlaps(rows)
    launch(_layer_norm, (cdiv(number, block), batch),
        out, rows, weight, bias, count, number, channels, rows.stride(0), rows.stride(1), eps,
        BM=block, D=padded, PDL=pdl, num_warps=4 if padded <= 2048 else 8, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
