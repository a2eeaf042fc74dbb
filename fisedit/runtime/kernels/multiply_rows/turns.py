"""The product of ``specialized.py`` for many tiles: each program has some, which two groups of warps take in turn.

While one group finishes a tile, the other multiplies, and further warps load all the while: neither the start of a tile
nor its end is waited for, but the first and the last. Of linear layers alone, whose work is not split. Weights come by
two tiles at a time: those of values and of their gates, or of columns beside each other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fisedit.runtime.kernels.multiply_rows.epilogue import finish_tile, load_columns, load_residual
from fisedit.runtime.kernels.multiply_rows.specialized import READERS, ask_rows, ask_weights, deviation_of
from fisedit.runtime.kernels.multiply_rows.steps import tile_at, which_rows, working_tile, working_tiles
from fisedit.runtime.kernels.stages import make_barriers, next_stage, stage_before, wait_for_kernel

WARPS: gl.constexpr = gl.constexpr(4)
"""Of a group; two groups."""
REGISTERS = 168
"""Of each thread on average: a program has its multiprocessor to itself."""


@triton.jit
def tile_of(turn, work, BM: tl.constexpr):
    """The first row of what a program has at ``turn``, and of which weights."""
    tiles_m, tiles_n, across = work[2]
    per, n_out, batch = work[3]
    index = tl.program_id(0) + turn * tl.num_programs(0)
    length = tl.where(across > 0, tiles_n, tiles_m)
    line = index // length
    place = index - line * length
    tile_m, tile_n = tile_at(place, line, across)
    return working_tile(tile_m, per, n_out, batch, BM) * BM, tile_n


@gluon.jit
def load_tiles(given, weight, co, ring, work, GATED: gl.constexpr, PDL: gl.constexpr):
    """Rows and weights of all tiles of a program, step by step."""
    buffers, full, empty = ring
    turns, steps = work[0], work[1]
    STAGES: gl.constexpr = full.type.shape[0]
    BM: gl.constexpr = buffers[0].type.shape[1]
    EACH: gl.constexpr = 1 if GATED else 2  # tiles of columns beside each other
    other = co if GATED else weight.block_type.shape[0]
    _, place = tile_of(0, work, BM)
    early = gl.minimum(STAGES, steps)
    for ahead in range(early):
        ask_weights((weight, place * EACH, other), buffers, full, ahead, ahead, True)
    wait_for_kernel(PDL)
    stage, phase = 0, 1
    for turn in range(turns):
        row0, place = tile_of(turn, work, BM)
        for number in range(steps):
            if (turn > 0) | (number >= early):
                mbarrier.wait(empty.index(stage), phase)
                ask_weights((weight, place * EACH, other), buffers, full, number, stage, True)
            ask_rows(given, buffers, full, row0, number, stage)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def find_deviations(before, deviations, work, PDL: gl.constexpr, PAIR: gl.constexpr):
    """Of the rows of each tile, for each group in its turn."""
    found, known, taken = deviations
    BM: gl.constexpr = found.type.shape[1]
    if PDL:
        tl.extra.cuda.gdc_wait()
    for turn in range(work[0]):
        group, phase = turn % 2, (turn // 2) % 2
        row0, _ = tile_of(turn, work, BM)
        mean, rstd = deviation_of(before, row0, work[3], work[4], PAIR, BM)
        mbarrier.wait(taken.index(group), phase ^ 1)
        found.index(2 * group).store(mean)
        found.index(2 * group + 1).store(rstd)
        mbarrier.arrive(known.index(group), count=1)


@gluon.jit
def add_steps(ring, own, other, stage, phase, waits, steps):
    """The sums of two tiles of weights, one behind the other, and the stage that follows.

    A phase tells a load only from the one before it: a group waits until the other has seen all loads before its own.
    """
    buffers, full, empty = ring
    STAGES: gl.constexpr = full.type.shape[0]
    BM: gl.constexpr = buffers[0].type.shape[1]
    BW: gl.constexpr = buffers[1].type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BW, 16])
    sums = gl.zeros([BM, BW], gl.float32, layout=layout)
    mbarrier.wait(own, waits)
    for number in range(steps):
        mbarrier.wait(full.index(stage), phase)
        weight = buffers[1].index(stage).permute((1, 0))
        token = warpgroup_mma(buffers[0].index(stage), weight, sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(token,))
        mbarrier.arrive(empty.index(stage_before(stage, STAGES)), count=1, pred=number > 0)
        stage, phase = next_stage(stage, phase, STAGES)
    mbarrier.arrive(other, count=1)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    mbarrier.arrive(empty.index(stage_before(stage, STAGES)), count=1)
    return sums, stage, phase


@gluon.jit
def begin(tile_n, goal, where, layout: gl.constexpr, GATED: gl.constexpr, EVEN_N: gl.constexpr):
    """What :func:`finish_tile` needs besides sums and deviations, asked for before a tile's steps: it may come from
    memory."""
    _, after, residual, residual_stride, weight, inner, co = goal
    BN: gl.constexpr = weight.block_type.shape[0]
    column = tile_n * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    matrix = (weight, inner, co, tile_n, column, column < co)
    columns = load_columns(after, where, matrix, GATED, EVEN_N)
    return matrix, columns, load_residual(residual, residual_stride, where, matrix, EVEN_N)


@gluon.jit
def finish(
    sums, gates, begun, deviation, goal, where, plane, layout: gl.constexpr, GATED: gl.constexpr,
    ACTIVATION: gl.constexpr, NORM_ACTIVATION: gl.constexpr, EVEN_N: gl.constexpr,
):  # fmt: skip
    """All that follows the sums of a tile; ``begun``: from :func:`begin`."""
    matrix, columns, extra = begun
    if GATED:
        gates = gl.convert_layout(gates, layout)
    sums = gl.convert_layout(sums, layout)
    finish_tile(
        sums, gates, columns, extra, deviation, goal[0], goal[1], where, matrix, plane, goal[2] is not None, GATED,
        ACTIVATION, NORM_ACTIVATION, EVEN_N,
    )  # fmt: skip


@gluon.jit
def multiply_tiles(
    ring, begins, deviations, goal, work, GROUP: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    NORM_ACTIVATION: gl.constexpr, EVEN_N: gl.constexpr, PDL: gl.constexpr, PAIR: gl.constexpr,
):  # fmt: skip
    """Every other turn of a program, from number ``GROUP`` on."""
    turns, steps, sizes, plane = work[0], work[1], work[3], work[4]
    STAGES: gl.constexpr = ring[1].type.shape[0]
    BM: gl.constexpr = ring[0][0].type.shape[1]
    BN: gl.constexpr = goal[4].block_type.shape[0]
    ACROSS: gl.constexpr = min(32, BN // 8)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    if PDL:
        tl.extra.cuda.gdc_wait()
    skipped = GROUP * steps
    stage, phase = skipped % STAGES, skipped // STAGES % 2
    for turn in range(GROUP, turns, 2):
        row0, place = tile_of(turn, work, BM)
        inside = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
        where, _ = which_rows(row0, inside, sizes[0], sizes[1], sizes[2], False, PAIR)
        tile_n = place if GATED else 2 * place
        more = (tile_n + 1) * BN < goal[6]
        begun = begin(tile_n, goal, where, layout, GATED, EVEN_N)
        if not GATED:
            begun_too = begin(gl.where(more, tile_n + 1, tile_n), goal, where, layout, False, EVEN_N)
        waits = (turn // 2 + 1 - GROUP) % 2
        sums, stage, phase = add_steps(
            ring, begins[GROUP].index(0), begins[1 - GROUP].index(0), stage, phase, waits, steps
        )
        phase ^= (stage + steps) // STAGES % 2  # the other group's steps are between
        stage = (stage + steps) % STAGES
        deviation = (where[1], where[1])
        if deviations is not None:
            found, known, taken = deviations
            mbarrier.wait(known.index(GROUP), turn // 2 % 2)
            mean, rstd = found.index(2 * GROUP), found.index(2 * GROUP + 1)
            deviation = (mean.load(where[1].type.layout), rstd.load(where[1].type.layout))
            mbarrier.arrive(taken.index(GROUP), count=1)
        first, second = gl.split(sums.reshape((BM, 2, BN)).permute((0, 2, 1)))
        if GATED:
            finish(
                first, second, begun, deviation, goal, where, plane, layout, True, ACTIVATION, NORM_ACTIVATION, EVEN_N
            )
        else:
            finish(
                first, first, begun, deviation, goal, where, plane, layout, False, ACTIVATION, NORM_ACTIVATION, EVEN_N
            )
            if more:
                finish(
                    second, second, begun_too, deviation, goal, where, plane, layout, False, ACTIVATION,
                    NORM_ACTIVATION, EVEN_N,
                )  # fmt: skip


@gluon.jit(do_not_specialize=["n_in", "n_out", "batch", "table_stride", "steps", "each", "parts", "polls", "across"])
def multiply_in_turns(
    out, normalized, made_moments, rows, rows2, rows3, recorded, sources, weight, bias, center, affine, residual,
    norm_affine, moments, count, partial, locks, n_in, n_out, batch, c1, c2, c3, inner, co, rows_stride, rows2_stride,
    rows3_stride, recorded_stride, residual_stride, table_stride, affine_plane, affine_batch, norm_plane, norm_batch,
    taps, steps, each, parts, polls, across, input_eps,
    ADDRESSES: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr, NORM_ACTIVATION: gl.constexpr,
    PIECE: gl.constexpr, EVEN_N: gl.constexpr, PDL: gl.constexpr, PAIR: gl.constexpr, WIDE: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    given = (rows, rows2, rows3, rows_stride, rows2_stride, rows3_stride, c1, c2, c3)
    before = (moments, parts, c1, input_eps)
    after = (bias, center, (affine, affine_plane, affine_batch), (norm_affine, norm_plane, norm_batch))
    made = (out, normalized, made_moments)
    goal = (made, after, residual, residual_stride, weight, inner, co)
    per = gl.load(count)
    tiles_m, tiles_n = working_tiles(per, n_out, batch, BM), gl.cdiv(co, BN if GATED else 2 * BN)
    turns = gl.cdiv(tiles_m * tiles_n - gl.program_id(0), gl.num_programs(0))
    work = (turns, steps, (tiles_m, tiles_n, across), (per, n_out, batch), batch.to(gl.int64) * n_out)
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], weight.dtype)
    buffers = (
        gl.allocate_shared_memory(weight.dtype, [STAGES, BM, BK], rows_layout),
        gl.allocate_shared_memory(weight.dtype, [STAGES, 2 * BN, BK], weight.layout),
    )
    full, empty = make_barriers(STAGES, 2, 1)  # rows and weights fill a stage
    ring, begins = (buffers, full, empty), make_barriers(1, 1, 1)
    if turns > 0:  # registers: of the second group, and of those that load; the first group has the rest
        if moments is not None:
            found = gl.allocate_shared_memory(gl.float32, [4, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
            known, taken = make_barriers(2, 1, 1)
            deviations = (found, known, taken)
            fence_async_shared()
            gl.warp_specialize([
                (multiply_tiles, (ring, begins, deviations, goal, work, 0, GATED, ACTIVATION, NORM_ACTIVATION, EVEN_N,
                                  PDL, PAIR)),
                (multiply_tiles, (ring, begins, deviations, goal, work, 1, GATED, ACTIVATION, NORM_ACTIVATION, EVEN_N,
                                  PDL, PAIR)),
                (load_tiles, (given, weight, co, ring, work, GATED, PDL)),
                (find_deviations, (before, deviations, work, PDL, PAIR)),
            ], [WARPS, 1, READERS], [216, 24, 56])  # fmt: skip
        else:
            fence_async_shared()
            gl.warp_specialize([
                (multiply_tiles, (ring, begins, None, goal, work, 0, GATED, ACTIVATION, NORM_ACTIVATION, EVEN_N, PDL,
                                  PAIR)),
                (multiply_tiles, (ring, begins, None, goal, work, 1, GATED, ACTIVATION, NORM_ACTIVATION, EVEN_N, PDL,
                                  PAIR)),
                (load_tiles, (given, weight, co, ring, work, GATED, PDL)),
            ], [WARPS, 1], [232, 24])  # fmt: skip
