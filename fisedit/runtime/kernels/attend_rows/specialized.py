"""The attention of ``triton.py`` by warps of different tasks, for many queries.

Some warps look keys up and load them; three groups of others attend, each for its own rows of a tile. What the
products of one group leave of the matrix units the others use, and each key comes once for all three. In Triton, all
warps do the same at the same time; hence Gluon, its lower level. For GPUs of compute capability 9.x alone.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fisedit.runtime.kernels.attend_rows.config import GROUP, GROUPS
from fisedit.runtime.kernels.attend_rows.parts import PIECE, finish_shared, place_of, recorded_rows, store_rows, work_of
from fisedit.runtime.kernels.stages import make_barriers, next_stage, wait_for_kernel

LOADERS = 4
REGISTERS = {"REGISTERS": 152, "LOADER_REGISTERS": 56, "maxnreg": 128}
"""Of a thread that attends, of one that loads, and of each on average."""
LATE: tl.constexpr = tl.constexpr(2)
"""Blocks of keys asked for behind one before those who attend hear of it; a pipeline is two deeper at least."""
ROWS: tl.constexpr = tl.constexpr(GROUP)
TILE: tl.constexpr = tl.constexpr(GROUP * GROUPS)


@gluon.jit
def places_of(read, sample, head, number, HEAD_DIM: gl.constexpr, ADDRESSES: gl.constexpr, ALIGN: gl.constexpr):
    """Where the active rows of a head lie, and where its recorded rows would begin if the table counted them so. Looked
    up for each block: kept from one to the next, it was slower."""
    rows, batch_stride, head_stride, _, recorded, recorded_batch, recorded_stride = read
    own = rows + tl.multiple_of(sample.to(gl.int64) * batch_stride + head * head_stride, ALIGN)
    there = recorded_rows(rows, recorded, sample, recorded_batch, number, recorded_stride, ADDRESSES, ALIGN)
    return own, head * HEAD_DIM + there


@gluon.jit
def load_keys(
    read, table, table_batch, buffers, full, empty, work, first_tile, last_tile, number, keys, heads,
    HEAD_DIM: gl.constexpr, ADDRESSES: gl.constexpr, SHARED: gl.constexpr, EVEN: gl.constexpr, ALIGN: gl.constexpr,
    PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Keys and values, block by block, and tile by tile; where each lies is known a block ahead.

    What lies in shared memory has to be fenced before matrix units read it: here, ``LATE`` blocks after it was asked
    for, and not by each group that attends.
    """
    STAGES: gl.constexpr = full.type.shape[0]
    BN: gl.constexpr = buffers[0].type.shape[1]
    D: gl.constexpr = buffers[0].type.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    column = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    inside = gl.arange(0, BN, layout=gl.SliceLayout(1, layout))
    wait_for_kernel(PDL)
    asked = 0
    for tile in range(first_tile, last_tile):
        pair, _, begin, stop = place_of(tile, work, TILE, SHARED)
        sample = pair // heads
        head = pair - sample * heads
        own_table = table + sample * table_batch
        position = begin * BN + inside
        index = gl.load(own_table + position, mask=None if EVEN else position < keys, other=None if EVEN else 0)
        for _ in range(begin, stop):
            position = gl.minimum(position + BN, (stop - 1) * BN + inside)
            following = gl.load(own_table + position, mask=None if EVEN else position < keys, other=None if EVEN else 0)
            active, stage = index < number, asked % STAGES
            mbarrier.wait(empty.index(stage), (asked // STAGES + 1) % 2)
            for kind in gl.static_range(2):
                own, there = places_of(read[kind], sample, head, number, HEAD_DIM, ADDRESSES, ALIGN)
                offset = tl.multiple_of(index * gl.where(active, read[kind][3], read[kind][6]), ALIGN)
                at = gl.where(active, own, there)[:, None] + (offset[:, None] + column[None, :])
                if HEAD_DIM == D:
                    async_copy.async_copy_global_to_shared(buffers[kind].index(stage), at)
                else:
                    of_head = (column < HEAD_DIM)[None, :] & (inside >= 0)[:, None]
                    async_copy.async_copy_global_to_shared(buffers[kind].index(stage), at, mask=of_head)
            async_copy.commit_group()
            async_copy.wait_group(LATE)
            fence_async_shared()
            mbarrier.arrive(full.index((asked + STAGES - LATE) % STAGES), count=1, pred=asked >= LATE)
            asked += 1
            index = following
    async_copy.wait_group(0)
    fence_async_shared()
    for left in gl.static_range(LATE):
        block = asked - LATE + left
        mbarrier.arrive(full.index((block + STAGES) % STAGES), count=1, pred=block >= 0)


@gluon.jit
def halves(x):
    """The columns of a tile in two tensors, each number in the thread that has it."""
    return gl.split(x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)))


@gluon.jit
def add_eighths(x):
    """Sums of each row over every eighth column, ``[ROWS, 8]``: each thread adds up its own numbers."""
    return gl.sum(x.reshape((x.shape[0], x.shape[1] // 8, 8)), 1)


@gluon.jit
def attend_keys(
    queries, buffers, full, empty, begin, stop, stage, phase, keys, scale, s_layout: gl.constexpr,
    o_layout: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Weighted sum of values ``[ROWS, D]``, row maxima in units of log2, and row sums, over some blocks of keys.

    A block is weighed in four parts: the values of one are added while the next is weighed. Behind them comes the
    product with the next keys: all but the last values are waited for first, else registers were too few, and the
    compiler let each product wait for the one before. After the last block it is the same one again, for nobody.
    """
    STAGES: gl.constexpr = full.type.shape[0]
    BN: gl.constexpr = buffers[0].type.shape[1]
    D: gl.constexpr = buffers[0].type.shape[2]
    top = gl.full([ROWS], -1.0e30, gl.float32, layout=gl.SliceLayout(1, s_layout))
    nothing = gl.zeros([ROWS, BN], gl.float32, layout=s_layout)
    total = add_eighths(nothing)
    sums = gl.zeros([ROWS, D], gl.float32, layout=o_layout)
    inside = gl.arange(0, BN, layout=gl.SliceLayout(0, s_layout))
    mbarrier.wait(full.index(stage), phase)
    k = buffers[0].index(stage).permute((1, 0))
    logits = warpgroup_mma(queries, k, nothing, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, deps=(logits,))  # [ROWS, BN]
    for block in range(begin, stop):
        after, phase_after = next_stage(stage, phase, STAGES)
        more = block + 1 < stop
        ahead = gl.where(more, after, stage)
        mbarrier.wait(full.index(ahead), gl.where(more, phase_after, phase))
        if not EVEN:
            logits = gl.where((block * BN + inside < keys)[None, :], logits, float("-inf"))
        higher = gl.maximum(top, gl.max(logits, 1) * scale)
        fade = gl.exp2(top - higher)
        top = higher
        total *= gl.convert_layout(fade, gl.SliceLayout(1, total.type.layout))[:, None]
        sums *= gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]
        lower, upper = halves(logits)
        parts = halves(lower) + halves(upper)
        for number in gl.static_range(4):
            shift = gl.convert_layout(higher, gl.SliceLayout(1, parts[number].type.layout))[:, None]
            weights = gl.exp2(parts[number] * scale - shift)
            total += gl.convert_layout(add_eighths(weights), total.type.layout)
            weights = gl.convert_layout(weights.to(queries.dtype), gl.DotOperandLayout(0, o_layout, 2))
            values = buffers[1].index(stage).slice(number * (BN // 4), BN // 4)
            sums = warpgroup_mma(weights, values, sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        k = buffers[0].index(ahead).permute((1, 0))
        logits = warpgroup_mma(queries, k, nothing, use_acc=False, is_async=True)
        sums, logits = warpgroup_mma_wait(0, deps=(sums, logits))
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = after, phase_after
    return sums, top, gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, s_layout)), stage, phase


@gluon.jit
def skip_keys(full, empty, begin, stop, stage, phase):
    """Blocks of keys that no row of a group attends to."""
    STAGES: gl.constexpr = full.type.shape[0]
    for _ in range(begin, stop):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def attend_tiles(
    out, query, query_batch, query_row, partial, locks, buffers, full, empty, work, first_tile, last_tile, active,
    number, keys, heads, scale, polls, NUMBER: gl.constexpr, HEAD_DIM: gl.constexpr, SHARED: gl.constexpr,
    EVEN: gl.constexpr, ALIGN: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The rows of group ``NUMBER`` of each tile: all that they attend to, and what follows."""
    D: gl.constexpr = buffers[0].type.shape[2]
    BN: gl.constexpr = buffers[0].type.shape[1]
    SIZE: gl.constexpr = ROWS * (D + 2)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [4, 1], [1, 0])
    inside = gl.arange(0, ROWS, layout=gl.SliceLayout(1, o_layout))
    column = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    piece_row = gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))
    piece_column = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    width, own = heads * HEAD_DIM, partial + NUMBER * SIZE
    if PDL:
        tl.extra.cuda.gdc_wait()
    stage, phase = 0, 0
    for tile in range(first_tile, last_tile):
        pair, row0, begin, stop = place_of(tile, work, TILE, SHARED)
        row0 += NUMBER * ROWS
        if row0 < active:
            sample = pair // heads
            head, wide = pair - sample * heads, sample.to(gl.int64)
            row = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, q_layout))
            channel = gl.arange(0, D, layout=gl.SliceLayout(0, q_layout))
            own_query = query + tl.multiple_of(wide * query_batch + head * HEAD_DIM, ALIGN)
            at = own_query + (tl.multiple_of(row * query_row, ALIGN)[:, None] + channel[None, :])
            queries = gl.load(at, mask=(row < number)[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
            sums, top, total, stage, phase = attend_keys(
                queries, buffers, full, empty, begin, stop, stage, phase, keys, scale, s_layout, o_layout, EVEN
            )
            top = gl.convert_layout(top, gl.SliceLayout(1, o_layout))
            total = gl.convert_layout(total, gl.SliceLayout(1, o_layout))
            place = wide * number * width + head * HEAD_DIM
            whole = True
            if SHARED:
                _, _, length, share, _, _ = work
                lock = locks + tile * (TILE // ROWS) + NUMBER
                whole = finish_shared(
                    out, own, lock, sums, top, total, gl.program_id(0), tile, length, share, polls, inside, column,
                    piece_row, piece_column, row0, place, number, width, TILE * (D + 2), HEAD_DIM, D, ROWS,
                )  # fmt: skip
            if whole:
                store_rows(out, sums, total, row0 + inside, column, place, number, width, HEAD_DIM)
        else:
            stage, phase = skip_keys(full, empty, begin, stop, stage, phase)


@gluon.jit(do_not_specialize=["number", "keys", "pairs", "polls"])
def attend_specialized(
    out, query, key, value, recorded_key, recorded_value, table, count, key_count, partial, locks,
    number, keys, pairs, polls, heads, scale, query_batch, query_row, key_batch, key_head, key_row,
    value_batch, value_head, value_row, recorded_key_batch, recorded_key_row, recorded_value_batch,
    recorded_value_row, table_batch,
    HEAD_DIM: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, ADDRESSES: gl.constexpr, SHARED: gl.constexpr,
    EVEN: gl.constexpr, ALIGN: gl.constexpr, PDL: gl.constexpr, STAGES: gl.constexpr, LOADERS: gl.constexpr,
    REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    active = gl.load(count)
    work, first_tile, last_tile, polls = work_of(active, pairs, keys, polls, TILE, BN, SHARED)
    TYPE: gl.constexpr = query.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], TYPE)
    buffers = (
        gl.allocate_shared_memory(TYPE, [STAGES, BN, D], layout),
        gl.allocate_shared_memory(TYPE, [STAGES, BN, D], layout),
    )
    full, empty = make_barriers(STAGES, 1, TILE // ROWS)
    fence_async_shared()
    read = (
        (key, key_batch, key_head, key_row, recorded_key, recorded_key_batch, recorded_key_row),
        (value, value_batch, value_head, value_row, recorded_value, recorded_value_batch, recorded_value_row),
    )
    gl.warp_specialize([
        (attend_tiles, (out, query, query_batch, query_row, partial, locks, buffers, full, empty, work, first_tile,
                        last_tile, active, number, keys, heads, scale, polls, 0, HEAD_DIM, SHARED, EVEN, ALIGN, PDL)),
        (attend_tiles, (out, query, query_batch, query_row, partial, locks, buffers, full, empty, work, first_tile,
                        last_tile, active, number, keys, heads, scale, polls, 1, HEAD_DIM, SHARED, EVEN, ALIGN, PDL)),
        (attend_tiles, (out, query, query_batch, query_row, partial, locks, buffers, full, empty, work, first_tile,
                        last_tile, active, number, keys, heads, scale, polls, 2, HEAD_DIM, SHARED, EVEN, ALIGN, PDL)),
        (load_keys, (read, table, table_batch, buffers, full, empty, work, first_tile, last_tile, number, keys, heads,
                     HEAD_DIM, ADDRESSES, SHARED, EVEN, ALIGN, PDL, LOADERS)),
    ], [4, 4, LOADERS], [REGISTERS, REGISTERS, LOADER_REGISTERS])  # fmt: skip
