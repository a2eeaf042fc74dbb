from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit.runtime.kernels.launch import cdiv, launch, next_power_of_2, overlaps


@triton.jit
def _copy(out, rows, first, rows_stride, channels, channel, place, good, inner):
    """Rows of the outputs themselves to their channels of the patches."""
    where = good[:, None] & (channel < channels)[None, :]
    values = tl.load(rows + place[:, None] * rows_stride + channel[None, :], mask=where)
    tl.store(out + place[:, None] * inner + first + channel[None, :], values, mask=where)


@triton.jit(do_not_specialize=["n_in", "n_out", "table_stride"])
def _gather(
    out, rows, recorded, sources, rows2, rows3, count, n_in, n_out, channels, c2, c3, inner, rows_stride,
    recorded_stride, rows2_stride, rows3_stride, table_stride, taps,
    RECORDED: tl.constexpr, ADDRESSES: tl.constexpr, PDL: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    ITEM: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
    sample = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * BM + tl.arange(0, BM)  # output and tap in one
    block = tl.program_id(1)
    channel = block * BC + tl.arange(0, BC)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    number = tl.load(count) * taps
    if tl.program_id(0) * BM >= number:
        return
    blocks = tl.cdiv(channels, BC)
    if rows2 is not None and block >= blocks:  # those behind the taps
        own = place < number // taps
        behind = channel - blocks * BC
        blocks2 = tl.cdiv(c2, BC)
        if block < blocks + blocks2:
            _copy(out, rows2, taps * channels, rows2_stride, c2, behind, sample * n_out + place, own, inner)
        elif rows3 is not None:
            behind -= blocks2 * BC
            _copy(out, rows3, taps * channels + c2, rows3_stride, c3, behind, sample * n_out + place, own, inner)
        return
    good = place < number
    index = tl.load(sources + sample * table_stride + place, mask=good, other=-1)
    offset = (sample * n_in + index) * rows_stride
    if RECORDED:
        if ADDRESSES:
            shift = (tl.load(recorded + sample) - rows.to(tl.int64)) // ITEM
        else:
            shift = (recorded.to(tl.int64) - rows.to(tl.int64)) // ITEM + sample * recorded_stride
        shift = tl.multiple_of(shift, 16 // ITEM)
        offset = tl.where(index < n_in, offset, shift + (index - n_in).to(tl.int64) * channels)
    kept = (channel < channels)[None, :]
    values = tl.load(rows + offset[:, None] + channel[None, :], mask=(index >= 0)[:, None] & kept, other=0.0)
    goal = (sample * n_out + place // taps) * inner + place % taps * channels
    tl.store(out + goal[:, None] + channel[None, :], values, mask=good[:, None] & kept)


def gather_patches(
    rows: Tensor, recorded: Tensor | None, sources: Tensor, count: Tensor,
    rows2: Tensor | None = None, rows3: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See the reference; ``recorded`` may be int64 ``[B]``, the address of each sample's ``[R, C]``.

    With ``rows2`` (and ``rows3``), ``[B, N', C2]``, these follow the taps: ``[B, N', taps * C + C2 + C3]``.
    """
    rows = _plain(rows)
    rows2, rows3 = (None if more is None else _plain(more) for more in (rows2, rows3))
    batch, n_in, channels = rows.shape
    _, n_out, taps = sources.shape
    c2, c3 = (0 if more is None else more.shape[2] for more in (rows2, rows3))
    inner = taps * channels + c2 + c3
    shape = (taps, channels) if rows2 is None else (inner,)
    out = rows.new_empty(batch, n_out, *shape)
    block = min(256, next_power_of_2(channels))
    rows_block = max(1, 2048 // block)
    addresses = recorded is not None and recorded.dtype == torch.int64
    if recorded is not None and not addresses:
        recorded = recorded.contiguous()
    pdl = overlaps(rows)
    blocks = sum(cdiv(size, block) for size in (channels, c2, c3))
    launch(_gather, (cdiv(n_out * taps, rows_block), blocks, batch),
        out, rows, rows if recorded is None else recorded, sources, rows2, rows3, count, n_in, n_out, channels,
        c2, c3, inner, rows.stride(1), recorded.stride(0) if recorded is not None and not addresses else 0,
        0 if rows2 is None else rows2.stride(1), 0 if rows3 is None else rows3.stride(1),
        sources.stride(0) if sources.shape[0] > 1 else 0, taps,
        RECORDED=recorded is not None, ADDRESSES=addresses, PDL=pdl, BM=rows_block, BC=block,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def _plain(rows: Tensor) -> Tensor:
    """Rows whose samples follow one another, each row in one piece."""
    fits = rows.stride(2) == 1 and rows.stride(0) == rows.shape[1] * rows.stride(1)
    return rows if fits else rows.contiguous()
