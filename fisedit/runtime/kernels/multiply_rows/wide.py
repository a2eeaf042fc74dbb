"""Convolutions in tiles of 160 columns, which is no power of two: sums of 128 and of 32, side by side.

Gathered rows are most of what a convolution takes in, and a multiprocessor that has a tile more than others decides how
long it takes. Of 320 or 640 columns, such tiles are fewer than those of 128, and none is partly empty. Otherwise the
kernel of ``specialized.py``; its work is not split.
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

from fisedit.runtime.kernels.multiply_rows.epilogue import finish_tile, load_columns, load_residual
from fisedit.runtime.kernels.multiply_rows.specialized import load_patches
from fisedit.runtime.kernels.multiply_rows.steps import has_work, parity_at, place_rows, tile_at, which_rows
from fisedit.runtime.kernels.stages import make_barriers, next_stage, stage_before

BLOCK = 32
"""Rows of weights that come at a time."""
FIRST: gl.constexpr = gl.constexpr(128)
"""Columns of the first sums; the second ones have the rest."""


@gluon.jit
def load_weights(weight, own, buffers, full, empty, steps):
    """Of all steps, the rows of weights from ``own`` on."""
    STAGES: gl.constexpr = full.type.shape[0]
    BLOCK: gl.constexpr = weight.block_type.shape[0]
    BK: gl.constexpr = weight.block_type.shape[1]
    REST: gl.constexpr = buffers[2].type.shape[1]
    stage, phase = 0, 1
    for number in range(steps):
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
def begin(goal, where, matrix):
    """What :func:`finish_tile` needs besides sums."""
    return load_columns(goal[1], where, matrix, False, True), load_residual(goal[2], goal[3], where, matrix, True)


@gluon.jit
def add_steps(buffers, full, empty, steps, goal, first, second, PDL: gl.constexpr):
    """Both sums of a tile, and what was loaded in the meantime; ``first``, ``second``: where and which columns."""
    STAGES: gl.constexpr = full.type.shape[0]
    BM: gl.constexpr = buffers[0].type.shape[1]
    REST: gl.constexpr = buffers[2].type.shape[1]
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, FIRST, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, REST, 16])
    if PDL:
        tl.extra.cuda.gdc_wait()
    begun, begun_too = begin(goal, first[0], first[1]), begin(goal, second[0], second[1])
    sums = gl.zeros([BM, FIRST], gl.float32, layout=wide)
    more = gl.zeros([BM, REST], gl.float32, layout=narrow)
    stage, phase = 0, 0
    for number in range(steps):
        mbarrier.wait(full.index(stage), phase)
        fence_async_shared()
        rows = buffers[0].index(stage)
        tokens = (
            warpgroup_mma(rows, buffers[1].index(stage).permute((1, 0)), sums, is_async=True),
            warpgroup_mma(rows, buffers[2].index(stage).permute((1, 0)), more, is_async=True),
        )
        sums, more = warpgroup_mma_wait(2, deps=tokens)
        mbarrier.arrive(empty.index(stage_before(stage, STAGES)), count=1, pred=number > 0)
        stage, phase = next_stage(stage, phase, STAGES)
    sums, more = warpgroup_mma_wait(0, deps=(sums, more))
    return sums, more, begun, begun_too


@gluon.jit
def columns_of(row0, own, given, parity, sizes, WIDTH: gl.constexpr, PAIR: gl.constexpr, BM: gl.constexpr):
    """Where the rows of a tile go, and which columns it has from number ``own`` on, for threads that store eight."""
    weight, inner, co, tile_n = given
    ACROSS: gl.constexpr = WIDTH // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [gl.num_warps(), 1], [1, 0])
    inside = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    found = which_rows(row0, inside, sizes[0], sizes[1], sizes[2], True, PAIR)
    column = own + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    return place_rows(found, parity, sizes[1]), (weight, inner, co, tile_n, column, column < co, 0)


@gluon.jit
def finish(
    sums, begun, goal, part, plane, WIDTH: gl.constexpr, ACTIVATION: gl.constexpr, NORM_ACTIVATION: gl.constexpr
):  # fmt: skip
    """All that follows the sums of some columns."""
    ACROSS: gl.constexpr = WIDTH // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [gl.num_warps(), 1], [1, 0])
    made, after, residual, _ = goal
    where, matrix = part
    sums = gl.convert_layout(sums, layout)
    finish_tile(
        sums, sums, begun[0], begun[1], (where[1], where[1]), made, after, where, matrix, plane, residual is not None,
        False, ACTIVATION, NORM_ACTIVATION, True,
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
    of_weight = (weight, inner, co, tile_n)
    first = columns_of(row0, own, of_weight, parity, sizes, FIRST, PAIR, BM)
    second = columns_of(row0, own + FIRST, of_weight, parity, sizes, REST, PAIR, BM)
    if has_work(row0, first[0], sizes[0], n_out, batch, True):
        rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], weight.dtype)
        buffers = (
            gl.allocate_shared_memory(weight.dtype, [STAGES, BM, BK], rows_layout),
            gl.allocate_shared_memory(weight.dtype, [STAGES, FIRST, BK], weight.layout),
            gl.allocate_shared_memory(weight.dtype, [STAGES, REST, BK], weight.layout),
        )
        full, empty = make_barriers(STAGES, 1 + 32 * LOADERS, 1)  # gathered rows come from each thread
        fence_async_shared()
        sums, more, begun, begun_too = gl.warp_specialize([
            (add_steps, (buffers, full, empty, steps, goal, first, second, PDL)),
            (load_patches, (given, patches, buffers, full, empty, row0, sizes[0], n_out, batch, 0, steps, ADDRESSES,
                            PDL, PAIR, WIDE, LOADERS)),
            (load_weights, (weight, which * co + own, buffers, full, empty, steps)),
        ], [LOADERS, 1], [REGISTERS, 24])  # fmt: skip
        finish(sums, begun, goal, first, plane, FIRST, ACTIVATION, NORM_ACTIVATION)
        finish(more, begun_too, goal, second, plane, REST, ACTIVATION, NORM_ACTIVATION)
