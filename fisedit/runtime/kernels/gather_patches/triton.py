from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit.runtime.kernels.launch import launch


@triton.jit(do_not_specialize=["n_in", "n_out", "table_stride"])
def _gather(
    out, rows, recorded, sources, count, n_in, n_out, channels, rows_stride, recorded_stride, table_stride, taps,
    RECORDED: tl.constexpr, ADDRESSES: tl.constexpr, PDL: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    ITEM: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
    sample = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * BM + tl.arange(0, BM)  # output and tap in one
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    number = tl.load(count) * taps
    if tl.program_id(0) * BM >= number:
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
    goal = (sample * n_out * taps + place) * channels
    tl.store(out + goal[:, None] + channel[None, :], values, mask=good[:, None] & kept)


def gather_patches(rows: Tensor, recorded: Tensor | None, sources: Tensor, count: Tensor) -> Tensor:
    """See the reference; ``recorded`` may be int64 ``[B]``, the address of each sample's ``[R, C]``."""
    if rows.stride(2) != 1 or rows.stride(0) != rows.shape[1] * rows.stride(1):
        rows = rows.contiguous()
    batch, n_in, channels = rows.shape
    _, n_out, taps = sources.shape
    out = rows.new_empty(batch, n_out, taps, channels)
    block = min(256, triton.next_power_of_2(channels))
    rows_block = max(1, 2048 // block)
    addresses = recorded is not None and recorded.dtype == torch.int64
    if recorded is not None and not addresses:
        recorded = recorded.contiguous()
    pdl = rows.is_cuda and torch.cuda.get_device_capability(rows.device) >= (9, 0)
    launch(_gather, (triton.cdiv(n_out * taps, rows_block), triton.cdiv(channels, block), batch),
        out, rows, rows if recorded is None else recorded, sources, count, n_in, n_out, channels, rows.stride(1),
        recorded.stride(0) if recorded is not None and not addresses else 0,
        sources.stride(0) if sources.shape[0] > 1 else 0, taps,
        RECORDED=recorded is not None, ADDRESSES=addresses, PDL=pdl, BM=rows_block, BC=block,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
