"""Which blocks of keys a program walks, and how those that had parts of one tile of queries combine what they found.

Rows and columns come as numbers, in the layout of what is computed for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fisedit.runtime.kernels.share_out import MOST_PARTS, share_out

PIECE: tl.constexpr = tl.constexpr(16)
"""Rows of a tile that a program combines at a time."""
MOST: tl.constexpr = tl.constexpr(MOST_PARTS)


@triton.jit
def shares_of(tiles, blocks, programs, polls):
    """How many blocks of keys each program walks, how many a tile counts, and how long to wait for its other parts:
    where programs are three times as many as tiles, each has a part of one; else they go on to the next, and do not
    wait."""
    share, length = tl.cdiv(tiles * blocks, programs), blocks
    if 3 * tiles <= programs:
        share = tl.cdiv(blocks, tl.minimum(programs // tiles, MOST))
        length = tl.cdiv(blocks, share) * share
    return share, length, tl.where(3 * tiles <= programs, polls, 0)


@triton.jit
def work_of(active, pairs, keys, polls, TILE: tl.constexpr, BN: tl.constexpr, SHARED: tl.constexpr):
    """What a program does, for :func:`place_of`; its first tile and the one behind its last; how long to wait."""
    down, blocks, program = tl.cdiv(active, TILE), tl.cdiv(keys, BN), tl.program_id(0)
    work, first_tile, last_tile = (0, 0, 0, 0, down, blocks), 0, (program < down).to(tl.int32)
    if SHARED:
        share, length, polls = shares_of(tl.maximum(down * pairs, 1), blocks, tl.num_programs(0), polls)
        unit = program * share
        end = tl.minimum(unit + share, down * pairs * length)
        work, first_tile, last_tile = (unit, end, length, share, down, blocks), unit // length, tl.cdiv(end, length)
    return work, first_tile, last_tile, polls


@triton.jit
def place_of(tile, work, TILE: tl.constexpr, SHARED: tl.constexpr):
    """Which head of which sample a tile is of, by their number together, its first row, and its blocks of keys that
    this program walks."""
    unit, end, length, _, down, blocks = work
    pair, row0, begin, stop = tl.program_id(1), tl.program_id(0) * TILE, 0, blocks
    if SHARED:
        pair = tile // down
        row0 = (tile - pair * down) * TILE
        begin, stop = tl.maximum(unit - tile * length, 0), tl.minimum(end - tile * length, blocks)
    return pair, row0, begin, stop


@triton.jit
def part_of(program, tile, length, share):
    """Where a program's part of a tile lies: its first or its last tile."""
    return 2 * program + (program * share // length != tile).to(tl.int32)


@triton.jit
def recorded_rows(
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
def store_part(part, sums, top, total, row, column, BM: tl.constexpr, D: tl.constexpr):
    tl.store(part + row[:, None] * D + column[None, :], sums)
    tl.store(part + BM * D + row, top)
    tl.store(part + BM * (D + 1) + row, total)


@triton.jit
def combine(
    partial, first, last, tile, length, share, row, column, SIZE: tl.constexpr, BM: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Some rows of all parts of a tile, of programs ``first`` to ``last``, in their order. They come from L2: L1 may
    hold what stood there before. ``SIZE``: numbers from one part to the next."""
    total = row.to(tl.float32) * 0.0
    top = total - 1.0e30
    sums = total[:, None] + column.to(tl.float32)[None, :] * 0.0
    for program in range(first, last + 1, 4):
        for more in tl.static_range(4):  # so many loads of each kind are under way
            part = partial + part_of(program + more, tile, length, share).to(tl.int64) * SIZE
            there, inside = program + more <= last, part + row[:, None] * D + column[None, :]
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
def store_rows(out, sums, total, row, column, first, number, stride, HEAD_DIM: tl.constexpr):
    """Rows of one head, ``first`` being where row 0 has it."""
    sums = sums / tl.maximum(total, 1.0e-30)[:, None]
    good = (row < number)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(out + (first + row * stride)[:, None] + column[None, :], sums.to(out.dtype.element_ty), mask=good)


@triton.jit
def finish_shared(
    out, partial, lock, sums, top, total, program, tile, length, share, polls, row, column, piece_row, piece_column,
    row0, place, number, width, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Whether a program had all of a tile; if not, write its part, and the rows of the result that it is to combine.

    Args:
        row, column: of ``sums``. piece_row, piece_column: of what is combined at a time.
    """
    first, last = tile * length // share, (tile * length + length - 1) // share
    if first < last:
        part = partial + part_of(program, tile, length, share).to(tl.int64) * SIZE
        store_part(part, sums, top, total, row, column, BM, D)
        tl.debug_barrier()
        shares = share_out(lock, program - first, last - first + 1, polls)
        for piece in tl.range(0, BM // PIECE, num_stages=1):
            if (shares >> (piece % (last - first + 1))) & 1:
                some = piece * PIECE + piece_row
                made, weights = combine(partial, first, last, tile, length, share, some, piece_column, SIZE, BM, D)
                store_rows(out, made, weights, row0 + some, piece_column, place, number, width, HEAD_DIM)
    return first == last
