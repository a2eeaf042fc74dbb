from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fisedit.runtime.kernels.launch import launch, next_power_of_2, overlaps


@triton.jit(do_not_specialize=["number"])
def _renew(
    out, rows, rows2, affine, counts, weight, bias, shift, number, c1, c2, size, eps, rows_batch, rows_row,
    rows2_batch, rows2_row, affine_plane, affine_batch, shift_batch, shift_channel,
    TWO: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SHIFT: tl.constexpr, PDL: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One group of one whole sample. Two passes over its rows: means, then squares of what differs from them."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sample = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * size + tl.arange(0, BC)
    good = tl.arange(0, BC) < size
    at = out + sample * (c1 + c2) + channel
    plane = tl.num_programs(1) * (c1 + c2)
    if tl.load(counts + sample) < number:
        known = affine + sample * affine_batch + channel
        tl.store(at, tl.load(known, mask=good), mask=good)
        tl.store(at + plane, tl.load(known + affine_plane, mask=good), mask=good)
        return
    start = rows + sample * rows_batch + channel
    step = tl.zeros((BC,), tl.int64) + rows_row
    if TWO:
        other = rows2 + sample * rows2_batch + channel - c1
        start = tl.where(channel < c1, start, other)
        step = tl.where(channel < c1, step, rows2_row)
    move = tl.zeros((BC,), tl.float32)
    if SHIFT:
        move = tl.load(shift + sample * shift_batch + channel * shift_channel, mask=good, other=0.0).to(tl.float32)
    total = tl.zeros((BM, BC), tl.float32)
    for first in range(0, number, BM):
        row = first + tl.arange(0, BM)
        kept = (row < number)[:, None] & good[None, :]
        x = tl.load(start[None, :] + row[:, None] * step[None, :], mask=kept, other=0.0).to(tl.float32)
        total += tl.where(kept, x + move[None, :], 0.0)
    elements = (number * size).to(tl.float32)
    mean = tl.sum(total) / elements
    total = tl.zeros((BM, BC), tl.float32)
    for first in range(0, number, BM):
        row = first + tl.arange(0, BM)
        kept = (row < number)[:, None] & good[None, :]
        x = tl.load(start[None, :] + row[:, None] * step[None, :], mask=kept, other=0.0).to(tl.float32)
        off = tl.where(kept, x + move[None, :] - mean, 0.0)
        total += off * off
    scale = tl.zeros((BC,), tl.float32) + tl.rsqrt(tl.sum(total) / elements + eps)
    if WEIGHT:
        scale *= tl.load(weight + channel, mask=good, other=0.0).to(tl.float32)
    offset = (move - mean) * scale
    if BIAS:
        offset += tl.load(bias + channel, mask=good, other=0.0).to(tl.float32)
    tl.store(at, scale, mask=good)
    tl.store(at + plane, offset, mask=good)


def renew_affine(
    rows: Tensor,
    rows2: Tensor | None,
    affine: Tensor,
    full: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    counts: Tensor,
) -> Tensor:
    """See the reference; the last dimension of ``rows`` and ``rows2`` is contiguous."""
    if not full:
        return affine
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    rows2 = rows2 if rows2 is None or rows2.stride(2) == 1 else rows2.contiguous()
    batch, number, c1 = rows.shape
    c2 = 0 if rows2 is None else rows2.shape[2]
    size = (c1 + c2) // groups
    out = affine.new_empty(2, batch, c1 + c2)
    other = rows if rows2 is None else rows2
    moved = None if shift is None else shift.expand(batch, 1, c1 + c2)
    columns = next_power_of_2(size)
    pdl = overlaps(rows)
    launch(_renew, (groups, batch),
        out, rows, other, affine, counts, rows if weight is None else weight, rows if bias is None else bias,
        rows if moved is None else moved, number, c1, c2, size, eps, rows.stride(0), rows.stride(1), other.stride(0),
        other.stride(1), affine.stride(0), affine.stride(1), 0 if moved is None else moved.stride(0),
        0 if moved is None else moved.stride(2),
        TWO=rows2 is not None, WEIGHT=weight is not None, BIAS=bias is not None, SHIFT=moved is not None, PDL=pdl,
        BM=max(1, 4096 // columns), BC=columns, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
