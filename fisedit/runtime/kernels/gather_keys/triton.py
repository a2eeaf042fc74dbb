"""Keys and values put in one piece each, for attention by a library, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit.runtime.kernels.launch import cdiv, launch, overlaps


@triton.jit
def _load(
    rows, recorded, index, sample, number, batch, row, recorded_batch, recorded_row, channel, mask,
    ADDRESSES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    ITEM: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
    if ADDRESSES:
        base = (tl.load(recorded + sample) - rows.to(tl.int64)) // ITEM
    else:
        base = (recorded.to(tl.int64) - rows.to(tl.int64)) // ITEM + sample * recorded_batch
    active = index < number
    # One offset reaches either memory; the hint keeps loads 16 bytes wide.
    offset = tl.where(active, sample * batch, base) + tl.where(active, index * row, (index - number) * recorded_row)
    offset = tl.multiple_of(offset, ALIGN)
    return tl.load(rows + offset[:, None] + channel[None, :], mask=mask)


@triton.jit(do_not_specialize=["number", "positions"])
def _gather(
    keys, values, key, value, recorded_key, recorded_value, table, number, positions, width, key_batch, key_row,
    value_batch, value_row, recorded_key_batch, recorded_key_row, recorded_value_batch, recorded_value_row, table_batch,
    ADDRESSES: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr, PDL: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sample = tl.program_id(2).to(tl.int64)
    position, channel = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    good = position < positions
    index = tl.load(table + sample * table_batch + position, mask=good, other=0)
    mask = good[:, None]
    if not EVEN:
        mask = mask & (channel < width)[None, :]
    # Both are under way before either is stored.
    k = _load(key, recorded_key, index, sample, number, key_batch, key_row, recorded_key_batch, recorded_key_row,
              channel, mask, ADDRESSES, ALIGN)  # fmt: skip
    v = _load(value, recorded_value, index, sample, number, value_batch, value_row, recorded_value_batch,
              recorded_value_row, channel, mask, ADDRESSES, ALIGN)  # fmt: skip
    goal = tl.multiple_of((sample * positions + position) * width, ALIGN)[:, None] + channel[None, :]
    tl.store(keys + goal, k, mask=mask)
    tl.store(values + goal, v, mask=mask)


def gather_keys(
    key: Tensor, value: Tensor, recorded_key: Tensor, recorded_value: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """See the reference; recorded rows may be int64 ``[B]``, the address of each sample's contiguous ``[R, C]``."""
    batch, number, width = key.shape
    positions, given = table.shape[1], (key, value, recorded_key, recorded_value)
    keys, values = key.new_empty(2, batch, positions, width)
    addresses = recorded_key.dtype == torch.int64
    strides = [(0, width) if t.dtype == torch.int64 else (t.stride(0), t.stride(1)) for t in given]
    wide = 16 // key.element_size()
    aligned = width % wide == 0 and all(stride % wide == 0 for pair in strides for stride in pair)
    aligned = aligned and all(t.data_ptr() % 16 == 0 for t in given if t.dtype != torch.int64)
    block = min(256, max(64, width & -width))  # without a rest, for heads of 64
    rows_block = 4096 // block
    pdl = overlaps(key)
    launch(_gather, (cdiv(positions, rows_block), cdiv(width, block), batch),
        keys, values, *given, table, number, positions, width, *(stride for pair in strides for stride in pair),
        table.stride(0) if table.shape[0] > 1 else 0,
        ADDRESSES=addresses, EVEN=width % block == 0, ALIGN=wide if aligned else 1, PDL=pdl,
        BM=rows_block, BC=block,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return keys, values
