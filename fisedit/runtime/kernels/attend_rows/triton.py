"""Attention of few queries over many keys, which are read where they lie: among the active rows or in the recorded map.

Attention does not ask for the order of its keys, but a merged loop over positions reads each key once, so every key
position looks up its row: one offset that reaches either memory. Keys and values that lie in one piece come by
descriptor, which takes no instructions of the threads that multiply. Where tiles of queries do not fill the GPU evenly,
programs take equal shares of all their keys, one tile after the other (Stream-K, Osama et al. 2023); those that had a
part of one tile combine what they found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fisedit.runtime.kernels.launch import (
    cdiv,
    has_descriptors,
    is_aligned,
    launch,
    multiprocessors,
    next_power_of_2,
    overlaps,
    starts_early,
)
from fisedit.runtime.kernels.share_out import MOST_PARTS, POLLS, share_out

LOG2_E = 1.4426950408889634
MULTIPROCESSORS = 132
"""Of an H100 or H200, for which ``choose_config`` was measured."""
DEEPEST = 15
"""Stages: before its first product, a program runs through all but one."""
PIECE: tl.constexpr = tl.constexpr(16)
"""Rows of a tile that a program combines at a time."""
MOST: tl.constexpr = tl.constexpr(MOST_PARTS)
SHARED_MEMORY = 226 * 1024
"""Bytes that the programs of a multiprocessor can have together."""


@dataclass(frozen=True)
class Config:
    """Tile sizes of a launch: queries and keys; how many programs share the work, 0: each does a tile; a thread's
    registers at most; whether keys and values are put in one piece each before it."""

    m: int
    n: int
    warps: int
    stages: int
    programs: int = 0
    registers: int | None = None
    whole: bool = False

    def __str__(self) -> str:
        limit, whole = f" r{self.registers}" if self.registers else "", " whole" if self.whole else ""
        return f"{self.m}x{self.n} w{self.warps} s{self.stages}{limit} p{self.programs}{whole}"


def choose_config(queries: int, keys: int, head_dim: int, pairs: int, itemsize: int, gathered: bool) -> Config:
    """Tiles for ``queries`` rows over ``keys`` keys, ``gathered`` by a table or not, for each of batch * heads pairs.

    Without warps of their own for loads, products and exponentials, two or more programs on a multiprocessor must fill
    each other's gaps: hence the limits on registers. Tiles of 128 queries read every key from L2 half as often as
    those of 64, which would wait for it. A table costs two stages of the pipeline.
    """
    deep = 5 if gathered else 3
    if itemsize == 4:
        tile = Config(32, 32, 4, 2) if head_dim <= 128 else Config(16, 32, 4, 1)
    elif keys <= 128 and head_dim > 64:
        tile = Config(64, 32, 4, 2) if head_dim > 128 else Config(32, 128, 4, 2)
    elif head_dim > 128:
        tile = Config(64, 64, 8, 3)
    elif keys <= 128:
        tile = Config(64, 128 if keys > 64 else 64, 4, 2)
    elif head_dim > 64:
        tile = Config(64, 64, 4, 3, registers=168)
    elif queries > 64:
        tile = Config(128, 64, 8, deep, registers=128)
    else:
        tile = Config(64, 64, 4, deep, registers=128)
    tile = replace(tile, programs=best_programs(tile, queries, keys, pairs)[0])
    return deepen(tile, queries, pairs, head_dim) if gathered and itemsize == 2 else tile


def deepen(tile: Config, queries: int, pairs: int, head_dim: int) -> Config:
    """A tile whose pipeline is deep enough that no more programs fit into a multiprocessor than each of them gets: one
    more than elsewhere would take longer, and while the kernel before them ends they start where there is room. GPUs
    that do not start them then have less shared memory, too: there a tile stays as it is."""
    if not starts_early():
        return tile
    each = cdiv(tile.programs or cdiv(queries, tile.m) * pairs, MULTIPROCESSORS)
    row = 2 * max(16, next_power_of_2(head_dim))  # bytes in half precision
    own, block = tile.m * row, tile.n * 2 * row + (0 if tile.whole else tile.n * 4)  # queries; keys, values, table
    blocks = (SHARED_MEMORY // (each + 1) - own) // block + 1
    stages = blocks if tile.whole else 2 * blocks - 1  # a block is loaded two stages after its table
    fits = each <= 2 and stages <= DEEPEST and own + blocks * block <= SHARED_MEMORY // each
    return replace(tile, stages=max(tile.stages, stages)) if fits else tile


def partial_bytes(tile: Config, queries: int, pairs: int, head_dim: int, locks: int) -> int:
    """What the parts of tiles take, two of each program: sums of values, and of weights, and maxima."""
    shared = tile.programs > 0 and cdiv(queries, tile.m) * pairs <= locks
    return 2 * tile.programs * tile.m * (max(16, next_power_of_2(head_dim)) + 2) * 4 if shared else 0


def best_programs(tile: Config, queries: int, keys: int, pairs: int) -> list[int]:
    """How many programs may share the work, the best first; 0: each does a tile."""
    most = cdiv(queries, tile.m) * pairs * cdiv(keys, tile.n)
    numbers = [0, *(each * MULTIPROCESSORS for each in (1, 2, 3, 4) if each * MULTIPROCESSORS < most)]
    return sorted(numbers, key=lambda number: cost(replace(tile, programs=number), queries, keys, pairs))


def cost(tile: Config, queries: int, keys: int, pairs: int) -> float:
    """About how many blocks of keys the busiest multiprocessor walks, one after the other.

    To start costs about four blocks, and to begin another tile; to write a part of the sums, two; to read them all,
    four and half a block for each part. A program that has its multiprocessor for itself takes half as long again,
    waiting.
    """
    tiles, blocks, programs = cdiv(queries, tile.m) * pairs, cdiv(keys, tile.n), tile.programs
    share, begins = blocks, 4
    if programs >= 3 * tiles:
        share, begins = cdiv(blocks, min(programs // tiles, MOST_PARTS)), 6
        programs = tiles * cdiv(blocks, share)
    elif programs:
        share, begins = cdiv(tiles * blocks, programs), 10
    each = cdiv(programs or tiles, MULTIPROCESSORS)
    combined = 4 + cdiv(blocks, share) / 2 if programs else 0
    return (each + each % 2 / 2) * (share + begins) + combined


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


@triton.jit
def _store_part(part, sums, top, total, BM: tl.constexpr, D: tl.constexpr):
    row = tl.arange(0, BM)
    tl.store(part + row[:, None] * D + tl.arange(0, D)[None, :], sums)
    tl.store(part + BM * D + row, top)
    tl.store(part + BM * (D + 1) + row, total)


@triton.jit
def _shares(tiles, blocks, programs, polls):
    """How many blocks of keys each program walks, how many a tile counts, and how long to wait for its other parts:
    where programs are three times as many as tiles, each has a part of one; else they go on to the next, and do not
    wait."""
    share, length = tl.cdiv(tiles * blocks, programs), blocks
    if 3 * tiles <= programs:
        share = tl.cdiv(blocks, tl.minimum(programs // tiles, MOST))
        length = tl.cdiv(blocks, share) * share
    return share, length, tl.where(3 * tiles <= programs, polls, 0)


@triton.jit
def _part_of(program, tile, length, share):
    """Where a program's part of a tile lies: its first or its last tile."""
    return 2 * program + (program * share // length != tile).to(tl.int32)


@triton.jit
def _combine(
    partial, first, last, tile, length, share, row, PIECE: tl.constexpr, BM: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Some rows of all parts of a tile, of programs ``first`` to ``last``, in their order. They come from L2: L1 may
    hold what stood there before."""
    top = tl.full((PIECE,), -1.0e30, tl.float32)
    total = tl.zeros((PIECE,), tl.float32)
    sums = tl.zeros((PIECE, D), tl.float32)
    for program in range(first, last + 1, 4):
        for more in tl.static_range(4):  # so many loads of each kind are under way
            part = partial + _part_of(program + more, tile, length, share).to(tl.int64) * (BM * (D + 2))
            there, inside = program + more <= last, part + row[:, None] * D + tl.arange(0, D)[None, :]
            other_sums = tl.load(inside, mask=there, other=0.0, cache_modifier=".cg")
            other = tl.load(part + BM * D + row, mask=there, other=-1.0e30, cache_modifier=".cg")
            other_total = tl.load(part + BM * (D + 1) + row, mask=there, other=0.0, cache_modifier=".cg")
            higher = tl.maximum(top, other)
            fade, grow = tl.exp2(top - higher), tl.exp2(other - higher)
            total = total * fade + other_total * grow
            sums = sums * fade[:, None] + other_sums * grow[:, None]
            top = higher
    return sums, total


@triton.jit
def _store_rows(out, sums, total, row, first, number, stride, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Rows of one head, ``first`` being where row 0 has it."""
    column = tl.arange(0, D)
    sums = sums / tl.maximum(total, 1.0e-30)[:, None]
    good = (row < number)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(out + (first + row * stride)[:, None] + column[None, :], sums.to(out.dtype.element_ty), mask=good)


@triton.jit
def _recorded_rows(
    pointer, recorded, sample, batch_stride, number, row_stride, ADDRESSES: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Where recorded row 0 would be if the table counted it as row ``number``."""
    ITEM: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    if ADDRESSES:
        first = tl.load(recorded + sample).to(pointer.dtype)
    else:
        first = recorded + sample.to(tl.int64) * batch_stride
    return tl.multiple_of(first, ALIGN * ITEM) - number.to(tl.int64) * row_stride


@triton.jit
def _finish_shared(
    out, partial, locks, sums, top, total, program, tile, length, share, polls, row0, place, number, width,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Whether a program had all of a tile; if not, write its part, and the rows of the result that it is to combine."""
    first, last = tile * length // share, (tile * length + length - 1) // share
    if first < last:
        part = partial + _part_of(program, tile, length, share).to(tl.int64) * (BM * (D + 2))
        _store_part(part, sums, top, total, BM, D)
        tl.debug_barrier()
        shares = share_out(locks + tile, program - first, last - first + 1, polls)
        for piece in tl.range(0, BM // PIECE, num_stages=1):
            if (shares >> (piece % (last - first + 1))) & 1:
                some = piece * PIECE + tl.arange(0, PIECE)
                made, weights = _combine(partial, first, last, tile, length, share, some, PIECE, BM, D)
                _store_rows(out, made, weights, row0 + some, place, number, width, HEAD_DIM, D)
    return first == last


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
    down, blocks, program = tl.cdiv(tl.load(count), BM), tl.cdiv(keys, BN), tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if SHARED:
        share, length, polls = _shares(tl.maximum(down * pairs, 1), blocks, tl.num_programs(0), polls)
        unit = program * share
        end = tl.minimum(unit + share, down * pairs * length)
        first_tile, last_tile = unit // length, tl.cdiv(end, length)
    else:
        first_tile, last_tile = 0, (program < down).to(tl.int32)
    for tile in tl.range(first_tile, last_tile, num_stages=1):
        if SHARED:
            pair = tile // down
            row0 = (tile - pair * down) * BM
            begin, stop = tl.maximum(unit - tile * length, 0), tl.minimum(end - tile * length, blocks)
        else:
            pair, row0, begin, stop = tl.program_id(1), program * BM, 0, blocks
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
            there_key = head * HEAD_DIM + _recorded_rows(
                key, recorded_key, sample, recorded_key_batch, number, recorded_key_row, ADDRESSES, ALIGN
            )
            there_value = head * HEAD_DIM + _recorded_rows(
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
            whole = _finish_shared(
                out, partial, locks, sums, top, total, program, tile, length, share, polls, row0, place, number, width,
                HEAD_DIM, D, BM)  # fmt: skip
        if whole:
            _store_rows(out, sums, total, row, place, number, width, HEAD_DIM, D)


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
    down, pairs = cdiv(number, config.m), batch * heads
    shared = config.programs > 0 and down * pairs <= locks.numel()
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
    pdl = {"launch_pdl": True} if overlaps(query) else {}
    launch(_attend, (*grid, 1),
        out, query, *read, recorded_key, recorded_value, table, count, key_count, partial, locks,
        number, keys, pairs, POLLS if grid[0] <= most else 0, heads,
        (head_dim**-0.5 if scale is None else scale) * LOG2_E,
        query.stride(0), query.stride(1), *_strides(key, head_dim), *_strides(value, head_dim),
        *_recorded_strides(recorded_key, width), *_recorded_strides(recorded_value, width),
        table.stride(0) if table is not None and table.shape[0] > 1 else 0,
        HEAD_DIM=head_dim, D=padded, BM=config.m, BN=config.n, TABLE=table is not None, TMA=tma, ADDRESSES=addresses,
        COUNTED=key_count is not None, SHARED=shared, EVEN=key_count is None and keys % config.n == 0,
        ALIGN=_alignment(head_dim, query, key, value, recorded_key, recorded_value),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", PDL=bool(pdl),
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers, **pdl,
    )  # fmt: skip
    return out


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
