"""The product of ``triton.py`` by warps of different tasks, which asks for weights before the kernel in front ends.

Some warps load rows and weights, the others multiply. No kernel makes the weights: as many steps of them as shared
memory holds are on their way while the kernel in front still runs, and only then do warps wait for it. In Triton, the
loads of a loop begin together; hence Gluon, its lower level. For GPUs of compute capability 9.x alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fisedit.runtime.kernels.multiply_rows.epilogue import (
    finish_shares,
    finish_tile,
    load_columns,
    load_deviation,
    load_residual,
    share_part,
)
from fisedit.runtime.kernels.multiply_rows.steps import (
    find_patches,
    has_work,
    next_step,
    tap_rows,
    tile_at,
    which_rows,
)
from fisedit.runtime.kernels.stages import make_barriers, next_stage, stage_before, wait_for_kernel

LOADERS, GATHERERS = 1, 4
"""Warps that load rows as they lie, and that gather them: a warp more loads the weights."""
READERS: gl.constexpr = gl.constexpr(2)
AHEAD: gl.constexpr = gl.constexpr(512)
"""Warps that add up the moments of rows, and how many of their parts they load at a time."""
HALF = 113 * 1024
"""Bytes of shared memory, so that two programs fit into a multiprocessor."""


def describe(rows: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """A descriptor of rows ``[N, C]`` in half precision, for tiles of ``block``."""
    return TensorDescriptor.from_tensor(rows, list(block), layout_of(*block))


@cache
def layout_of(rows: int, channels: int) -> gl.NVMMASharedLayout:
    """Of a tile in shared memory; to make it takes longer than the rest of a launch."""
    return gl.NVMMASharedLayout.get_default_for([rows, channels], gl.float16)


def resources(m: int, n: int, k: int, warps: int, stages: int, gathers: bool, held: int = 0) -> dict[str, Any]:
    """What a launch needs besides its arguments: stages, warps that load, and registers, of the threads that gather and
    of each on average. Warps come by fours; as many programs share a multiprocessor as its memory holds, two at most.

    Args:
        m, k, warps, stages: of the tile. n: its rows of weights. gathers: whether rows are gathered.
        held: bytes of shared memory besides its stages.
    """
    groups = warps // 4 + (2 if gathers else 1)
    pairs = warps == 4 and stages * (m + n) * k * 2 + held <= HALF and not (gathers and n > 64)
    each = 65536 // (128 * groups) // (2 if pairs else 1)
    own = 24
    if gathers:
        own = 88 if pairs else 200 if m * k > 8192 else 112 if warps == 8 else 152
    return {"STAGES": stages, "LOADERS": GATHERERS if gathers else LOADERS, "REGISTERS": own,
            "maxnreg": min(168, each // 8 * 8)}  # fmt: skip


@gluon.jit
def ask_weights(weights, buffers, full, number, stage, GATED: gl.constexpr):
    """Those of step ``number``, and of its gates."""
    weight, tile_n, half = weights
    BN: gl.constexpr = weight.block_type.shape[0]
    BK: gl.constexpr = weight.block_type.shape[1]
    barrier, buffer = full.index(stage), buffers[1].index(stage)
    mbarrier.expect(barrier, weight.block_type.nbytes * (2 if GATED else 1))
    tma.async_copy_global_to_shared(weight, [tile_n * BN, number * BK], barrier, buffer.slice(0, BN))
    if GATED:
        tma.async_copy_global_to_shared(weight, [half + tile_n * BN, number * BK], barrier, buffer.slice(BN, BN))


@gluon.jit
def ask_rows(given, buffers, full, row0, number, stage):
    """Those of step ``number``, as they lie, of one source after the other."""
    rows, rows2, rows3, _, _, _, c1, c2, _ = given
    begin, buffer, barrier = number * rows.block_type.shape[1], buffers[0].index(stage), full.index(stage)
    mbarrier.expect(barrier, rows.block_type.nbytes)
    tma.async_copy_global_to_shared(rows, [row0, begin], barrier, buffer, pred=begin < c1)
    begin -= c1
    if rows2 is not None:
        second = (begin >= 0) & (begin < c2)
        tma.async_copy_global_to_shared(rows2, [row0, begin], barrier, buffer, pred=second)
    if rows3 is not None:
        tma.async_copy_global_to_shared(rows3, [row0, begin - c2], barrier, buffer, pred=begin >= c2)


@gluon.jit
def load_weights(weights, buffers, full, empty, first, last, GATED: gl.constexpr):
    """Steps ``first`` to ``last``."""
    STAGES: gl.constexpr = full.type.shape[0]
    stage, phase = 0, 1
    for number in range(first, last):
        mbarrier.wait(empty.index(stage), phase)
        ask_weights(weights, buffers, full, number, stage, GATED)
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def load_patches(
    given, patches, buffers, full, empty, row0, per, n_out, batch, first, last,
    ADDRESSES: gl.constexpr, PDL: gl.constexpr, PAIR: gl.constexpr, WIDE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Gathered rows, steps ``first`` to ``last``: where they lie is looked up once for all steps of a tap."""
    STAGES: gl.constexpr = full.type.shape[0]
    BM: gl.constexpr = buffers[0].type.shape[1]
    BK: gl.constexpr = buffers[0].type.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [WARPS, 1], [1, 0])
    step = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
    inside = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    where, row = which_rows(row0, inside, per, n_out, batch, True, PAIR)
    n_in, taps, valid, c1, c2 = patches[4], patches[5], where[2], given[6], given[7]
    starts = find_patches(given, patches, where, row, first, ADDRESSES, True, BK)
    tap, begin, table, index, own, there, own2, own3 = starts
    found = (own, there, own2, own3)
    following = gl.load(table + gl.minimum(tap + 1, taps - 1), mask=valid, other=-1)
    wait_for_kernel(PDL)
    start, at, wanted = tap_rows(given, found, index, valid, tap, begin, n_in, taps, WIDE)
    start += at
    stage, phase = 0, 1
    for _ in range(first, last):
        mbarrier.wait(empty.index(stage), phase)
        chunk = start[:, None] + (begin + step)[None, :]
        async_copy.async_copy_global_to_shared(buffers[0].index(stage), chunk, mask=wanted[:, None])
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        stage, phase = next_stage(stage, phase, STAGES)
        tap, begin = next_step(tap, begin, c1, taps, BK)
        if (begin == 0) | ((tap == taps) & (begin == c2)):
            start, at, wanted = tap_rows(given, found, following, valid, tap, begin, n_in, taps, WIDE)
            start += at
            following = gl.load(table + gl.minimum(tap + 1, taps - 1), mask=valid, other=-1)


@gluon.jit
def load_sources(
    given, weights, buffers, full, empty, row0, first, last, GATED: gl.constexpr, PDL: gl.constexpr
):  # fmt: skip
    """Rows as they lie, and weights, steps ``first`` to ``last``."""
    STAGES: gl.constexpr = full.type.shape[0]
    for ahead in range(gl.minimum(STAGES, last - first)):
        ask_weights(weights, buffers, full, first + ahead, ahead, GATED)
    wait_for_kernel(PDL)
    stage, phase = 0, 1
    for number in range(first, last):
        if number >= first + STAGES:
            mbarrier.wait(empty.index(stage), phase)
            ask_weights(weights, buffers, full, number, stage, GATED)
        ask_rows(given, buffers, full, row0, number, stage)
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def deviation_of(before, row0, sizes, plane, PAIR: gl.constexpr, BM: gl.constexpr):
    """What :func:`load_deviation` gives for the rows of a tile, by warps of their own."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [READERS], [0])
    inside = gl.arange(0, BM, layout=layout)
    where, _ = which_rows(row0, inside, sizes[0], sizes[1], sizes[2], False, PAIR)
    return load_deviation(before, where, plane, AHEAD // BM)


@gluon.jit
def find_deviation(before, found, known, row0, sizes, plane, PDL: gl.constexpr, PAIR: gl.constexpr):
    """Mean and deviation of each row into shared memory, while other warps multiply."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    mean, rstd = deviation_of(before, row0, sizes, plane, PAIR, found.type.shape[1])
    found.index(0).store(mean)
    found.index(1).store(rstd)
    mbarrier.arrive(known, count=1)


@gluon.jit
def add_steps(
    buffers, full, empty, task, GATED: gl.constexpr, EVEN_N: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The sums of a tile over steps ``first`` to ``last``, those of its gates behind them, and what was loaded in the
    meantime for :func:`finish_tile`."""
    first, last, after, residual, residual_stride, where, matrix = task
    STAGES: gl.constexpr = full.type.shape[0]
    BM: gl.constexpr = buffers[0].type.shape[1]
    BW: gl.constexpr = buffers[1].type.shape[1]
    DOWN: gl.constexpr = min(BM // 16, gl.num_warps())
    ACROSS: gl.constexpr = gl.num_warps() // DOWN
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [DOWN, ACROSS], [16, BW // ACROSS, 16])
    if PDL:
        tl.extra.cuda.gdc_wait()
    columns, extra = load_columns(after, where, matrix, GATED, EVEN_N), where[1]
    if not SPLIT:
        extra = load_residual(residual, residual_stride, where, matrix, EVEN_N)
    sums = gl.zeros([BM, BW], gl.float32, layout=layout)
    stage, phase = 0, 0
    for number in range(first, last):
        mbarrier.wait(full.index(stage), phase)
        fence_async_shared()
        weight = buffers[1].index(stage).permute((1, 0))
        token = warpgroup_mma(buffers[0].index(stage), weight, sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(token,))
        before_it = stage_before(stage, STAGES)  # its products are done: it may be loaded again
        mbarrier.arrive(empty.index(before_it), count=1, pred=number > first)
        stage, phase = next_stage(stage, phase, STAGES)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    return sums, columns, extra


@gluon.jit
def share_tasks(
    given, patches, weights, before, after, residual, residual_stride, where, matrix, row0, per, n_out, batch, plane,
    first, last, ADDRESSES: gl.constexpr, GATED: gl.constexpr, EVEN_N: gl.constexpr, SPLIT: gl.constexpr,
    PDL: gl.constexpr, PAIR: gl.constexpr, WIDE: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr, LOADERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """What :func:`add_steps` gives, while other warps load; and the mean and deviation of each row, where it has
    moments."""
    weight = weights[0]
    BW: gl.constexpr = weight.block_type.shape[0] * (2 if GATED else 1)
    BK: gl.constexpr = weight.block_type.shape[1]
    GATHERS: gl.constexpr = patches[1] is not None
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], weight.dtype)
    buffers = (
        gl.allocate_shared_memory(weight.dtype, [STAGES, BM, BK], rows_layout),
        gl.allocate_shared_memory(weight.dtype, [STAGES, BW, BK], weight.layout),
    )
    full, empty = make_barriers(STAGES, 1 + (32 * LOADERS if GATHERS else 1), 1)  # gathered rows come from each thread
    task = (first, last, after, residual, residual_stride, where, matrix)
    deviation = (where[1], where[1])
    if GATHERS:
        fence_async_shared()
        made = gl.warp_specialize([
            (add_steps, (buffers, full, empty, task, GATED, EVEN_N, SPLIT, PDL)),
            (load_patches, (given, patches, buffers, full, empty, row0, per, n_out, batch, first, last, ADDRESSES, PDL,
                            PAIR, WIDE, LOADERS)),
            (load_weights, (weights, buffers, full, empty, first, last, GATED)),
        ], [LOADERS, 1], [REGISTERS, 24])  # fmt: skip
    elif before[0] is not None:
        found = gl.allocate_shared_memory(gl.float32, [2, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        known = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(known, count=1)
        fence_async_shared()
        made = gl.warp_specialize([
            (add_steps, (buffers, full, empty, task, GATED, EVEN_N, SPLIT, PDL)),
            (load_sources, (given, weights, buffers, full, empty, row0, first, last, GATED, PDL)),
            (find_deviation, (before, found, known, row0, (per, n_out, batch), plane, PDL, PAIR)),
        ], [LOADERS, READERS], [REGISTERS, 48])  # fmt: skip
        mbarrier.wait(known, 0)
        deviation = (found.index(0).load(where[1].type.layout), found.index(1).load(where[1].type.layout))
    else:
        fence_async_shared()
        made = gl.warp_specialize([
            (add_steps, (buffers, full, empty, task, GATED, EVEN_N, SPLIT, PDL)),
            (load_sources, (given, weights, buffers, full, empty, row0, first, last, GATED, PDL)),
        ], [LOADERS], [REGISTERS])  # fmt: skip
    return made[0], made[1], made[2], deviation


@gluon.jit(do_not_specialize=["n_in", "n_out", "batch", "table_stride", "steps", "each", "parts", "polls", "across"])
def multiply_specialized(
    out, normalized, made_moments, rows, rows2, rows3, recorded, sources, weight, bias, center, affine, residual,
    norm_affine, moments, count, partial, locks, n_in, n_out, batch, c1, c2, c3, inner, co, rows_stride, rows2_stride,
    rows3_stride, recorded_stride, residual_stride, table_stride, affine_plane, affine_batch, norm_plane, norm_batch,
    taps, steps, each, parts, polls, across, input_eps,
    ADDRESSES: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr, NORM_ACTIVATION: gl.constexpr,
    PIECE: gl.constexpr, EVEN_N: gl.constexpr, PDL: gl.constexpr, PAIR: gl.constexpr, WIDE: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, LOADERS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    given = (rows, rows2, rows3, rows_stride, rows2_stride, rows3_stride, c1, c2, c3)
    patches = (recorded, sources, recorded_stride, table_stride, n_in, taps)
    before = (moments, parts, c1, input_eps)
    after = (bias, center, (affine, affine_plane, affine_batch), (norm_affine, norm_plane, norm_batch))
    made = (out, normalized, made_moments)
    SPLIT: gl.constexpr = PIECE > 0
    EACH: gl.constexpr = 4 if SPLIT else 8  # of a row, for a thread to store at once: parts are in single precision
    ACROSS: gl.constexpr = min(32, BN // EACH)
    layout: gl.constexpr = gl.BlockedLayout([1, EACH], [32 // ACROSS, ACROSS], [gl.num_warps(), 1], [1, 0])
    per = gl.load(count)
    plane, sizes = batch.to(gl.int64) * n_out, (per, n_out, batch)
    tile_m, tile_n = tile_at(gl.program_id(0), gl.program_id(1), across)
    row0 = tile_m * BM
    inside = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    where, _ = which_rows(row0, inside, per, n_out, batch, sources is not None, PAIR)
    column = tile_n * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    matrix = (weight, inner, co, tile_n, column, column < co)
    if has_work(row0, where, per, n_out, batch, sources is not None):
        first = gl.program_id(2) * each
        last = gl.minimum(first + each, steps)
        sums, columns, extra, deviation = share_tasks(
            given, patches, (weight, tile_n, co), before, after, residual, residual_stride, where, matrix, row0, per,
            n_out, batch, plane, first, last, ADDRESSES, GATED, EVEN_N, SPLIT, PDL, PAIR, WIDE, BM, STAGES,
            LOADERS, REGISTERS,
        )  # fmt: skip
        gates = sums
        if GATED:
            sums, gates = gl.split(sums.reshape((BM, 2, BN)).permute((0, 2, 1)))
            gates = gl.convert_layout(gates, layout)
        sums = gl.convert_layout(sums, layout)
        if SPLIT:
            SIZE: gl.constexpr = BM * BN * (2 if GATED else 1)
            number, shared = gl.program_id(2), gl.num_programs(2)
            tile = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
            part = partial + (tile * shared).to(gl.int64) * SIZE
            shares = share_part(
                part + number * SIZE, locks + tile, sums, gates, columns, deviation, center, inside, matrix, number,
                shared, polls, GATED,
            )  # fmt: skip
            finish_shares(
                part, shared, shares, columns, made, after, residual, residual_stride, row0, where,
                gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout)), matrix, plane, sizes, GATED, ACTIVATION,
                NORM_ACTIVATION, EVEN_N, sources is not None, PAIR, BM,
            )  # fmt: skip
        else:
            finish_tile(
                sums, gates, columns, extra, deviation, made, after, where, matrix, plane, residual is not None, GATED,
                ACTIVATION, NORM_ACTIVATION, EVEN_N,
            )  # fmt: skip
