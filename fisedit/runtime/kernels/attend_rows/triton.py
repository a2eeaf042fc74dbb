"""Attention of few queries over many keys, which are read where they lie: among the active rows or in the recorded map.

Attention does not ask for the order of its keys, but a merged loop over positions reads each key once, so every key
position looks up its row: one offset that reaches either memory. Keys and values that lie in one piece come by
descriptor, which takes no instructions of the threads that multiply. Where tiles of queries do not fill the GPU evenly,
programs take equal shares of all their keys, one tile after the other (Stream-K, Osama et al. 2023); those that had a
part of one tile combine what they found.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fisedit.runtime.kernels.activate import PTX
from fisedit.runtime.kernels.attend_rows.config import GROUP, Config, choose_config, partial_bytes
from fisedit.runtime.kernels.attend_rows.parts import PIECE, finish_shared, place_of, recorded_rows, store_rows, work_of
from fisedit.runtime.kernels.launch import (
    cdiv,
    has_descriptors,
    is_aligned,
    launch,
    multiprocessors,
    next_power_of_2,
    overlaps,
)
from fisedit.runtime.kernels.share_out import POLLS

LOG2_E = 1.4426950408889634


@triton.jit
def _load(
    first, index, row_stride, column, inside, HEAD_DIM: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows of one head, zeros past the end and in the padding of the head; ``first``: where row 0 is, of each or all.

    The hint keeps loads 16 bytes wide. Offsets have 32 bits: fewer steps, and a head's rows are no further apart.
    """
    offset = tl.multiple_of(index * row_stride, ALIGN)
    if first.dtype.is_ptr() and first.type.is_block():
        at = first[:, None] + (offset[:, None] + column[None, :])
    else:
        at = first + (offset[:, None] + column[None, :])
    if EVEN and HEAD_DIM == D:
        return tl.load(at)
    elif EVEN:
        return tl.load(at, mask=(column < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == D:
        return tl.load(at, mask=inside[:, None], other=0.0)
    else:
        return tl.load(at, mask=inside[:, None] & (column < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _attend_keys(
    queries, key, value, table, recorded_key, recorded_value, key_row, value_row, recorded_key_row, recorded_value_row,
    place, channel, number, first, last, keys, scale,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TABLE: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weighted sum of values, row maxima in units of log2, and row sums, over keys ``first`` to ``last``; by
    descriptor, from row ``place`` and ``channel`` on."""
    column = tl.arange(0, D)
    # Finite, so that rows without keys do not subtract infinities.
    top = tl.full((BM,), -1.0e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, D), tl.float32)
    for start in tl.range(first, last, BN):
        position = start + tl.arange(0, BN)
        inside = position < keys
        if TABLE:
            if EVEN:
                index = tl.load(table + position)
            else:
                index = tl.load(table + position, mask=inside, other=0)
            active = index < number
            key_first, key_step = tl.where(active, key, recorded_key), tl.where(active, key_row, recorded_key_row)
            value_first = tl.where(active, value, recorded_value)
            value_step = tl.where(active, value_row, recorded_value_row)
        elif not TMA:
            index = position
            key_first, key_step, value_first, value_step = key, key_row, value, value_row
        if TMA:
            k = key.load([place + start, channel])  # in the padding of a head, queries are zeros
        else:
            k = _load(key_first, index, key_step, column, inside, HEAD_DIM, D, EVEN, ALIGN)  # [BN, D]
        logits = tl.dot(queries, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
        if not EVEN:
            logits = tl.where(inside[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1) * scale)
        weights = tl.exp2(logits * scale - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        top = higher
        if TMA:
            v = value.load([place + start, channel])
        else:
            v = _load(value_first, index, value_step, column, inside, HEAD_DIM, D, EVEN, ALIGN)  # [BN, D]
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision=PRECISION)
    return sums, top, total


@triton.jit(do_not_specialize=["number", "keys", "pairs", "polls"])
def _attend(
    out, query, key, value, recorded_key, recorded_value, table, count, key_count, partial, locks,
    number, keys, pairs, polls, heads, scale, query_batch, query_row, key_batch, key_head, key_row,
    value_batch, value_head, value_row, recorded_key_batch, recorded_key_row, recorded_value_batch,
    recorded_value_row, table_batch,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TABLE: tl.constexpr,
    TMA: tl.constexpr, ADDRESSES: tl.constexpr, COUNTED: tl.constexpr, SHARED: tl.constexpr, EVEN: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    work, first_tile, last_tile, polls = work_of(tl.load(count), pairs, keys, polls, BM, BN, SHARED)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for tile in tl.range(first_tile, last_tile, num_stages=1):
        pair, row0, begin, stop = place_of(tile, work, BM, SHARED)
        sample = pair // heads
        head, wide = pair - sample * heads, sample.to(tl.int64)
        row, column = row0 + tl.arange(0, BM), tl.arange(0, D)
        own_query = query + tl.multiple_of(wide * query_batch + head * HEAD_DIM, ALIGN)
        queries = _load(own_query, row, query_row, column, row < number, HEAD_DIM, D, False, ALIGN)  # [BM, D]
        own_key, own_value = key, value
        if not TMA:
            own_key += tl.multiple_of(wide * key_batch + head * key_head, ALIGN)
            own_value += tl.multiple_of(wide * value_batch + head * value_head, ALIGN)
        there_key, there_value, own_table, own_keys = recorded_key, recorded_value, table, keys
        if TABLE:
            own_table = table + sample * table_batch
            there_key = head * HEAD_DIM + recorded_rows(
                key, recorded_key, sample, recorded_key_batch, number, recorded_key_row, ADDRESSES, ALIGN
            )
            there_value = head * HEAD_DIM + recorded_rows(
                value, recorded_value, sample, recorded_value_batch, number, recorded_value_row, ADDRESSES, ALIGN
            )
        if COUNTED:
            own_keys = tl.minimum(keys, tl.load(key_count + sample))
        sums, top, total = _attend_keys(
            queries, own_key, own_value, own_table, there_key, there_value, key_row, value_row, recorded_key_row,
            recorded_value_row, sample * keys, head * HEAD_DIM, number, begin * BN, tl.minimum(stop * BN, own_keys),
            own_keys, scale, HEAD_DIM, D, BM, BN, TABLE, TMA, EVEN, ALIGN, PRECISION)  # fmt: skip
        width = heads * HEAD_DIM
        place = wide * number * width + head * HEAD_DIM
        whole = True
        if SHARED:
            whole = finish_shared(
                out, partial, locks + tile, sums, top, total, program, tile, work[2], work[3], polls, tl.arange(0, BM),
                column, tl.arange(0, PIECE), column, row0, place, number, width, BM * (D + 2), HEAD_DIM, D, BM,
            )  # fmt: skip
        if whole:
            store_rows(out, sums, total, row, column, place, number, width, HEAD_DIM)


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recorded_key: Tensor | None,
    recorded_value: Tensor | None,
    table: Tensor | None,
    count: Tensor,
    key_count: Tensor | None,
    locks: Tensor,
    heads: int,
    scale: float | None,
    config: Config | None = None,
) -> Tensor:
    """The reference's contract, for float32, float16 and bfloat16 and heads of up to 256 channels.

    Args:
        config: tile sizes; ``None`` chooses them. Each program does a tile where ``locks`` are too few for more. With
            ``whole``, keys and values are contiguous ``[B, R, h*d]``, and there is no table.
    """
    query, key, value = (rows if rows.stride(-1) == 1 else rows.contiguous() for rows in (query, key, value))
    batch, number, width = query.shape
    head_dim = width // heads
    keys = table.shape[1] if table is not None else key.shape[-2]
    config = config or choose_config(number, keys, head_dim, batch * heads, query.element_size(), table is not None)
    align = _alignment(head_dim, query, key, value, recorded_key, recorded_value)
    if config.specialized and not (PTX.value and table is not None and align > 1 and query.element_size() == 2):
        config = replace(config, m=GROUP, specialized=False)  # by warps that all do the same
    down, pairs = cdiv(number, config.m), batch * heads
    shared = config.programs > 0 and down * pairs * config.parts <= locks.numel()
    most = 2 * multiprocessors(query.device)  # run at the same time, see deepen
    grid = (min(config.programs, down * pairs * cdiv(keys, config.n)), 1) if shared else (down, pairs)
    out = query.new_empty(batch, number, width)  # [B, N, h*d]
    padded = max(16, next_power_of_2(head_dim))
    size = partial_bytes(config, number, pairs, head_dim, locks.numel()) // 4
    partial = query.new_empty(size, dtype=torch.float32)
    addresses = recorded_key is not None and recorded_key.dtype == torch.int64
    assert table is None or not config.whole, "keys in one piece need no table"
    # The few keys of a text are there sooner by their addresses.
    tma = config.whole and has_descriptors(query) and is_aligned(key) and is_aligned(value)
    read = [key, value]
    if tma:
        read = [TensorDescriptor.from_tensor(rows.flatten(0, 1), [config.n, padded]) for rows in read]  # [B*R, h*d]
    pdl = overlaps(query)
    recorded = *_recorded_strides(recorded_key, width), *_recorded_strides(recorded_value, width)
    strides = query.stride(0), query.stride(1), *_strides(key, head_dim), *_strides(value, head_dim), *recorded
    numbers = number, keys, pairs, POLLS if grid[0] <= most else 0, heads
    kernel, options = _kernel_of(config, table, tma, key_count, query)
    launch(kernel, (*grid, 1),
        out, query, *read, recorded_key, recorded_value, table, count, key_count, partial, locks, *numbers,
        (head_dim**-0.5 if scale is None else scale) * LOG2_E, *strides,
        table.stride(0) if table is not None and table.shape[0] > 1 else 0,
        HEAD_DIM=head_dim, D=padded, BN=config.n, ADDRESSES=addresses, SHARED=shared,
        EVEN=key_count is None and keys % config.n == 0, ALIGN=align, PDL=pdl, num_warps=config.warps, **options,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def _kernel_of(
    config: Config, table: Tensor | None, tma: bool, key_count: Tensor | None, query: Tensor
) -> tuple[Any, dict[str, Any]]:
    """The kernel of a tile, and what it takes besides what both do."""
    if config.specialized:
        from fisedit.runtime.kernels.attend_rows.specialized import LOADERS, REGISTERS, attend_specialized

        return attend_specialized, {"STAGES": config.stages, "LOADERS": LOADERS, **REGISTERS}
    precision = "ieee" if query.dtype == torch.float32 else "tf32"
    return _attend, {
        "BM": config.m, "TABLE": table is not None, "TMA": tma, "COUNTED": key_count is not None,
        "PRECISION": precision, "num_stages": config.stages, "maxnreg": config.registers,
    }  # fmt: skip


def _strides(tensor: Tensor, head_dim: int) -> tuple[int, int, int]:
    """Elements from one sample, head and row to the next."""
    if tensor.dim() == 4:
        return tensor.stride(0), tensor.stride(1), tensor.stride(2)
    return tensor.stride(0), head_dim, tensor.stride(1)


def _recorded_strides(recorded: Tensor | None, width: int) -> tuple[int, int]:
    if recorded is None or recorded.dtype == torch.int64:
        return 0, width
    return recorded.stride(0), recorded.stride(1)


def _alignment(head_dim: int, *tensors: Tensor | None) -> int:
    """How many elements every row of every head is a multiple of, from any tensor to any: 16 bytes' worth, or 1."""
    given = [tensor for tensor in tensors if tensor is not None and tensor.dtype != torch.int64]
    elements = 16 // given[0].element_size()
    strides = [t.stride(i) for t in given for i in range(t.dim() - 1) if t.shape[i] > 1]
    aligned = all(number % elements == 0 for number in [head_dim, *strides])
    return elements if aligned and all(tensor.data_ptr() % 16 == 0 for tensor in given) else 1
