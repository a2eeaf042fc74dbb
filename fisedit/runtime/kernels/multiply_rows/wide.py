"""Convolutions in tiles of 160 columns, which is no power of two: sums of 128 and of 32, side by side.

Gathered rows are most of what a convolution takes in, and a multiprocessor that has a tile more than others decides how
long it takes. Of 320 or 640 columns, such tiles are fewer than those of 128, and none is partly empty. Otherwise the
kernel of ``specialized.py``. Parts of shared sums lie apart for the first and the second columns.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fisedit.runtime.kernels.multiply_rows.epilogue import (
    finish_shares,
    finish_tile,
    load_columns,
    load_residual,
    places_in,
    share_part,
)
from fisedit.runtime.kernels.multiply_rows.specialized import load_patches
from fisedit.runtime.kernels.multiply_rows.steps import has_work, parity_at, place_rows, tile_at, which_rows
from fisedit.runtime.kernels.stages import make_barriers, next_stage, stage_before

BLOCK = 32
"""Rows of weights that come at a time."""
FIRST: gl.constexpr = gl.constexpr(128)
"""Columns of the first sums; the second ones have the rest."""


@gluon.jit
def load_weights(weight, own, buffers, full, empty, from_step, to_step):
    """Of some steps, the rows of weights from ``own`` on."""
    STAGES: gl.constexpr = full.type.shape[0]
    BLOCK: gl.constexpr = weight.block_type.shape[0]
    BK: gl.constexpr = weight.block_type.shape[1]
    REST: gl.constexpr = buffers[2].type.shape[1]
    stage, phase = 0, 1
    for number in range(from_step, to_step):
        mbarrier.wait(empty.index(stage), phase)
        barrier, first, second = full.index(stage), buffers[1].index(stage), buffers[2].index(stage)
        mbarrier.expect(barrier, weight.block_type.nbytes * ((FIRST + REST) // BLOCK))
        for begin in gl.static_range(0, FIRST, BLOCK):
            where = [own + begin, number * BK]
            tma.async_copy_global_to_shared(weight, where, barrier, first.slice(begin, BLOCK))
        for begin in gl.static_range(0, REST, BLOCK):
            where = [own + FIRST + begin, number * BK]
            tma.async_copy_global_to_shared(weight, where, barrier, second.slice(begin, BLOCK))
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def begin(goal, part, SPLIT: gl.constexpr):
    """What :func:`finish_tile` needs besides sums."""
    where, matrix = part
    extra = where[1]
    if not SPLIT:
        extra = load_residual(goal[2], goal[3], where, matrix, True)
    return load_columns(goal[1], where, matrix, False, True), extra


@gluon.jit
def add_steps(
    buffers, full, empty, from_step, to_step, goal, first, second, SPLIT: gl.constexpr, PDL: gl.constexpr
):  # fmt: skip
    """Both sums of a tile, and what was loaded in the meantime; ``first``, ``second``: where and which columns."""
    STAGES: gl.constexpr = full.type.shape[0]
    BM: gl.constexpr = buffers[0].type.shape[1]
    REST: gl.constexpr = buffers[2].type.shape[1]
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, FIRST, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, REST, 16])
    if PDL:
        tl.extra.cuda.gdc_wait()
    begun, begun_too = begin(goal, first, SPLIT), begin(goal, second, SPLIT)
    sums = gl.zeros([BM, FIRST], gl.float32, layout=wide)
    more = gl.zeros([BM, REST], gl.float32, layout=narrow)
    stage, phase = 0, 0
    for number in range(from_step, to_step):
        mbarrier.wait(full.index(stage), phase)
        fence_async_shared()
        rows = buffers[0].index(stage)
        tokens = (
            warpgroup_mma(rows, buffers[1].index(stage).permute((1, 0)), sums, is_async=True),
            warpgroup_mma(rows, buffers[2].index(stage).permute((1, 0)), more, is_async=True),
        )
        sums, more = warpgroup_mma_wait(2, deps=tokens)
        mbarrier.arrive(empty.index(stage_before(stage, STAGES)), count=1, pred=number > from_step)
        stage, phase = next_stage(stage, phase, STAGES)
    sums, more = warpgroup_mma_wait(0, deps=(sums, more))
    return sums, more, begun, begun_too


@gluon.jit
def columns_of(row0, own, co, parity, sizes, layout: gl.constexpr, WIDTH: gl.constexpr, PAIR: gl.constexpr,
               BM: gl.constexpr):  # fmt: skip
    """Where the rows of a tile go, and which columns it has from number ``own`` on."""
    inside = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    found = which_rows(row0, inside, sizes[0], sizes[1], sizes[2], True, PAIR)
    column = own + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    return place_rows(found, parity, sizes[1]), (None, 0, co, own, column, column < co, 0)


@gluon.jit
def finish(
    sums, begun, goal, part, plane, layout: gl.constexpr, ACTIVATION: gl.constexpr, NORM_ACTIVATION: gl.constexpr
):  # fmt: skip
    """All that follows the sums of some columns."""
    made, after, residual, _ = goal
    where, matrix = part
    sums = gl.convert_layout(sums, layout)
    finish_tile(
        sums, sums, begun[0], begun[1], (where[1], where[1]), made, after, where, matrix, plane, residual is not None,
        False, ACTIVATION, NORM_ACTIVATION, True,
    )  # fmt: skip


@gluon.jit
def finish_part(
    part, shared, shares, columns, goal, row0, where, piece, matrix, parity, plane, sizes, ACTIVATION: gl.constexpr,
    NORM_ACTIVATION: gl.constexpr, PAIR: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """Likewise, of this program's rows, the parts of whose sums are there."""
    finish_shares(
        part, shared, shares, columns, goal[0], goal[1], goal[2], goal[3], row0, where, piece, matrix, parity, plane,
        sizes, False, ACTIVATION, NORM_ACTIVATION, True, True, PAIR, BM,
    )  # fmt: skip


@gluon.jit
def share_sums(
    partial, locks, sums, more, begun, begun_too, goal, first, second, row0, parity, plane, sizes, polls,
    wide: gl.constexpr, narrow: gl.constexpr, ACTIVATION: gl.constexpr, NORM_ACTIVATION: gl.constexpr,
    PIECE: gl.constexpr, PAIR: gl.constexpr, BM: gl.constexpr, REST: gl.constexpr,
):  # fmt: skip
    """Write a program's parts of both sums, and finish its share of the rows."""
    number, shared = gl.program_id(2), gl.num_programs(2)
    tiles, tile = gl.num_programs(0) * gl.num_programs(1), gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    part = partial + (tile * shared).to(gl.int64) * (BM * FIRST)
    part_too = partial + (tiles * shared).to(gl.int64) * (BM * FIRST) + (tile * shared).to(gl.int64) * (BM * REST)
    sums, more = gl.convert_layout(sums, wide), gl.convert_layout(more, narrow)
    inside = gl.arange(0, BM, layout=gl.SliceLayout(1, wide))
    gl.store(part + number * (BM * FIRST) + places_in(inside, first[1]), sums)
    shares = share_part(
        part_too + number * (BM * REST), locks + tile, more, more, begun_too[0], (second[0][1], second[0][1]), None,
        gl.arange(0, BM, layout=gl.SliceLayout(1, narrow)), second[1], number, shared, polls, False,
    )  # fmt: skip
    finish_part(
        part, shared, shares, begun[0], goal, row0, first[0], gl.arange(0, PIECE, layout=gl.SliceLayout(1, wide)),
        first[1], parity, plane, sizes, ACTIVATION, NORM_ACTIVATION, PAIR, BM,
    )  # fmt: skip
    finish_part(
        part_too, shared, shares, begun_too[0], goal, row0, second[0],
        gl.arange(0, PIECE, layout=gl.SliceLayout(1, narrow)), second[1], parity, plane, sizes, ACTIVATION,
        NORM_ACTIVATION, PAIR, BM,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["n_in", "n_out", "batch", "table_stride", "steps", "each", "parts", "polls", "across"])
def multiply_wide(
    out, normalized, made_moments, rows, rows2, rows3, recorded, sources, places, weight, bias, center, affine,
    residual, norm_affine, moments, count, partial, locks, n_in, n_out, batch, c1, c2, c3, inner, co, rows_stride,
    rows2_stride, rows3_stride, recorded_stride, residual_stride, table_stride, affine_plane, affine_batch, norm_plane,
    norm_batch, taps, steps, each, parts, polls, across, input_eps,
    ADDRESSES: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr, NORM_ACTIVATION: gl.constexpr,
    PIECE: gl.constexpr, EVEN_N: gl.constexpr, PDL: gl.constexpr, PAIR: gl.constexpr, WIDE: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, LOADERS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    REST: gl.constexpr = BN - FIRST
    given = (rows, rows2, rows3, rows_stride, rows2_stride, rows3_stride, c1, c2, c3)
    after = (bias, None, (affine, affine_plane, affine_batch), (norm_affine, norm_plane, norm_batch))
    goal = ((out, normalized, None), after, residual, residual_stride)
    sizes, plane = (gl.load(count), n_out, batch), batch.to(gl.int64) * n_out
    tile_m, tile_n = tile_at(gl.program_id(0), gl.program_id(1), across)
    which, tile_n = parity_at(places, tile_n, co, BN)
    parity = (places, table_stride // 9 * 4, which)
    patches = (recorded, sources, recorded_stride, table_stride, n_in, taps, parity)
    row0, own = tile_m * BM, tile_n * BN
    EACH: gl.constexpr = 4 if PIECE > 0 else 8  # of a row, for a thread to store at once: parts are in single precision
    wide: gl.constexpr = gl.BlockedLayout([1, EACH], [EACH // 4, 128 // EACH], [gl.num_warps(), 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, EACH], [EACH, 32 // EACH], [gl.num_warps(), 1], [1, 0])
    first = columns_of(row0, own, co, parity, sizes, wide, FIRST, PAIR, BM)
    second = columns_of(row0, own + FIRST, co, parity, sizes, narrow, REST, PAIR, BM)
    if has_work(row0, first[0], sizes[0], n_out, batch, True):
        rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], weight.dtype)
        buffers = (
            gl.allocate_shared_memory(weight.dtype, [STAGES, BM, BK], rows_layout),
            gl.allocate_shared_memory(weight.dtype, [STAGES, FIRST, BK], weight.layout),
            gl.allocate_shared_memory(weight.dtype, [STAGES, REST, BK], weight.layout),
        )
        full, empty = make_barriers(STAGES, 1 + 32 * LOADERS, 1)  # gathered rows come from each thread
        begins = gl.program_id(2) * each
        ends = gl.minimum(begins + each, steps)
        fence_async_shared()
        sums, more, begun, begun_too = gl.warp_specialize([
            (add_steps, (buffers, full, empty, begins, ends, goal, first, second, PIECE > 0, PDL)),
            (load_patches, (given, patches, buffers, full, empty, row0, sizes[0], n_out, batch, begins, ends, ADDRESSES,
                            PDL, PAIR, WIDE, LOADERS)),
            (load_weights, (weight, which * co + own, buffers, full, empty, begins, ends)),
        ], [LOADERS, 1], [REGISTERS, 24])  # fmt: skip
        if PIECE > 0:
            share_sums(
                partial, locks, sums, more, begun, begun_too, goal, first, second, row0, parity, plane, sizes, polls,
                wide, narrow, ACTIVATION, NORM_ACTIVATION, PIECE, PAIR, BM, REST,
            )  # fmt: skip
        else:
            finish(sums, begun, goal, first, plane, wide, ACTIVATION, NORM_ACTIVATION)
            finish(more, begun_too, goal, second, plane, narrow, ACTIVATION, NORM_ACTIVATION)
