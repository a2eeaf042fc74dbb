from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fisedit.runtime.kernels.activate import ACTIVATIONS, activate
from fisedit.runtime.kernels.launch import cdiv, launch, overlaps

CHANNELS = 128
"""Of a program: with 8 rows, each of its 128 threads reads and writes 16 bytes of float16."""


@triton.jit(do_not_specialize=["number"])
def _normalize(
    out, rows, affine, last, number, channels, first_channel, out_channels, rows_batch, rows_row,
    affine_plane, affine_batch, channel_block, ACTIVATION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Rows of one input: its ``channels`` become those from ``first_channel`` on."""
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = channel_block * BC + tl.arange(0, BC)
    good = (row < last)[:, None] & (channel < channels)[None, :]
    at = affine + sample * affine_batch + first_channel + channel
    scale = tl.load(at, mask=channel < channels, other=0.0)
    offset = tl.load(at + affine_plane, mask=channel < channels, other=0.0)
    x = tl.load(rows + sample * rows_batch + row[:, None] * rows_row + channel[None, :], mask=good, other=0.0)
    y = activate(x.to(tl.float32) * scale[None, :] + offset[None, :], ACTIVATION)  # [BM, BC]
    place = (sample * number + row) * out_channels + first_channel
    tl.store(out + place[:, None] + channel[None, :], y.to(out.dtype.element_ty), mask=good)


@triton.jit(do_not_specialize=["number"])
def _normalize_both(
    out, rows, rows2, affine, count, number, c1, c2, rows_batch, rows_row, rows2_batch, rows2_row,
    affine_plane, affine_batch, ACTIVATION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    last = tl.load(count)
    if tl.program_id(0) * BM >= last:
        return
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    block, blocks = tl.program_id(1), tl.cdiv(c1, BC)
    if block < blocks:
        _normalize(out, rows, affine, last, number, c1, 0, c1 + c2, rows_batch, rows_row,
                   affine_plane, affine_batch, block, ACTIVATION, BM, BC)  # fmt: skip
    elif rows2 is not None:
        _normalize(out, rows2, affine, last, number, c2, c1, c1 + c2, rows2_batch, rows2_row,
                   affine_plane, affine_batch, block - blocks, ACTIVATION, BM, BC)  # fmt: skip


def normalize_rows(
    rows: Tensor, rows2: Tensor | None, affine: Tensor, activation: str, count: Tensor, done: bool = False
) -> Tensor:
    """The reference's contract."""
    if done:
        return rows
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    rows2 = rows2 if rows2 is None or rows2.stride(2) == 1 else rows2.contiguous()
    batch, number, c1 = rows.shape
    c2 = rows2.shape[2] if rows2 is not None else 0
    out = rows.new_empty(batch, number, c1 + c2)  # [B, N, C1+C2]
    pdl = overlaps(rows)
    blocks = cdiv(c1, CHANNELS) + cdiv(c2, CHANNELS)
    block = 8 if batch * number <= 2048 else 32
    launch(_normalize_both, (cdiv(number, block), blocks, batch),
        out, rows, rows2, affine, count, number, c1, c2, rows.stride(0), rows.stride(1),
        rows2.stride(0) if rows2 is not None else 0, rows2.stride(1) if rows2 is not None else 0,
        affine.stride(0), affine.stride(1), ACTIVATION=ACTIVATIONS[activation], BM=block, BC=CHANNELS, PDL=pdl,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
