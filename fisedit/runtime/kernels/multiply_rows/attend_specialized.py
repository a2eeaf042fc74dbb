"""The kernel of ``attend.py`` by warps of different tasks, as ``specialized.py`` is of ``triton.py``.

The text's keys and values come into shared memory before the kernel in front ends: none of a graph makes them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fisedit.runtime.kernels.multiply_rows.epilogue import follow_columns
from fisedit.runtime.kernels.multiply_rows.specialized import READERS, add_steps, find_deviation, load_sources
from fisedit.runtime.kernels.multiply_rows.steps import has_work, tile_at, which_rows
from fisedit.runtime.kernels.stages import make_barriers


@gluon.jit
def allocate_pair(TYPE: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr):
    """Shared memory for a block of keys, and for their values."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], TYPE)
    return gl.allocate_shared_memory(TYPE, [KEYS, D], layout), gl.allocate_shared_memory(TYPE, [KEYS, D], layout)


@gluon.jit
def load_block(source, buffer, batch_stride, row_stride, sample, first_column, begin, length):
    """Some keys of one sample and head, or values, into shared memory; zeros past the end."""
    KEYS: gl.constexpr = buffer.type.shape[0]
    D: gl.constexpr = buffer.type.shape[1]
    ACROSS: gl.constexpr = D // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [gl.num_warps(), 1], [1, 0])
    key = begin + gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    column = first_column + gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    at = source + sample.to(gl.int64) * batch_stride + (key[:, None] * row_stride + column[None, :])
    buffer.store(gl.load(at, mask=(key < length)[:, None], other=0.0))


@gluon.jit
def load_text(text, held, sample, head):
    """All that one head of a sample's text has, its blocks ``held`` in shared memory."""
    key, value, key_batch, key_row, value_batch, value_row, length, _ = text
    FIRST: gl.constexpr = held[0].type.shape[0]
    first_column = head * held[0].type.shape[1]
    load_block(key, held[0], key_batch, key_row, sample, first_column, 0, length)
    load_block(value, held[1], value_batch, value_row, sample, first_column, 0, length)
    if len(held) > 2:
        load_block(key, held[2], key_batch, key_row, sample, first_column, FIRST, length)
        load_block(value, held[3], value_batch, value_row, sample, first_column, FIRST, length)
    fence_async_shared()


@gluon.jit
def weigh_block(queries, keys):
    """Products of queries and a block of keys, on their way."""
    KEYS: gl.constexpr = keys.type.shape[0]
    BM: gl.constexpr = queries.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, KEYS, 16])
    nothing = gl.zeros([BM, KEYS], gl.float32, layout=layout)
    return warpgroup_mma(queries, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def mask_block(logits, begin, length, scale):
    """In units of log2, and none past the end."""
    layout: gl.constexpr = logits.type.layout
    key = begin + gl.arange(0, logits.shape[1], layout=gl.SliceLayout(0, layout))
    return gl.where((key < length)[None, :], logits * scale, float("-inf"))


@gluon.jit
def attend_text(queries, held, length, scale, layout: gl.constexpr):
    """What queries find in the text that is ``held``, in ``layout``."""
    FIRST: gl.constexpr = held[0].type.shape[0]
    D: gl.constexpr = held[0].type.shape[1]
    BM: gl.constexpr = queries.shape[0]
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    a = weigh_block(queries, held[0])
    if len(held) > 2:
        b = weigh_block(queries, held[2])
        a, b = warpgroup_mma_wait(0, deps=(a, b))
        a, b = mask_block(a, 0, length, scale), mask_block(b, FIRST, length, scale)
        top = gl.convert_layout(gl.max(a, 1), rows)
        top = gl.maximum(top, gl.convert_layout(gl.max(b, 1), rows))
        b = gl.exp2(b - gl.convert_layout(top, gl.SliceLayout(1, b.type.layout))[:, None])
    else:
        a = mask_block(warpgroup_mma_wait(0, deps=(a,)), 0, length, scale)
        top = gl.convert_layout(gl.max(a, 1), rows)
    a = gl.exp2(a - gl.convert_layout(top, gl.SliceLayout(1, a.type.layout))[:, None])
    total = gl.convert_layout(gl.sum(a, 1), rows)
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    found = gl.zeros([BM, D], gl.float32, layout=layout)
    found = warpgroup_mma(gl.convert_layout(a.to(queries.dtype), operand), held[1], found, is_async=True)
    if len(held) > 2:
        total += gl.convert_layout(gl.sum(b, 1), rows)
        found = warpgroup_mma(gl.convert_layout(b.to(queries.dtype), operand), held[3], found, is_async=True)
    found = warpgroup_mma_wait(0, deps=(found,))
    return found / total[:, None]


@gluon.jit
def multiply_beside(buffers, full, empty, task, text, held, PDL: gl.constexpr):
    """The sums of a tile, and what is of its columns; first of all, its text."""
    load_text(text, held, task[5][3], task[6][3])
    return add_steps(buffers, full, empty, task, False, True, False, PDL)


@gluon.jit
def share_tasks(
    given, weights, before, after, where, matrix, row0, sizes, plane, steps, text, held, PDL: gl.constexpr,
    PAIR: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, LOADERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Sums and what is of columns, while other warps load; and mean and deviation of each row, where it has moments."""
    weight = weights[0]
    BK: gl.constexpr = weight.block_type.shape[1]
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], weight.dtype)
    buffers = (
        gl.allocate_shared_memory(weight.dtype, [STAGES, BM, BK], rows_layout),
        gl.allocate_shared_memory(weight.dtype, [STAGES, weight.block_type.shape[0], BK], weight.layout),
    )
    full, empty = make_barriers(STAGES, 2, 1)  # a step's rows and its weights come by themselves
    task = (0, steps, after, None, 0, where, matrix)
    deviation = (where[1], where[1])
    if before[0] is not None:
        found = gl.allocate_shared_memory(gl.float32, [2, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        known = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(known, count=1)
        fence_async_shared()
        made = gl.warp_specialize([
            (multiply_beside, (buffers, full, empty, task, text, held, PDL)),
            (load_sources, (given, weights, buffers, full, empty, row0, 0, steps, False, PDL)),
            (find_deviation, (before, found, known, row0, sizes, plane, PDL, PAIR)),
        ], [LOADERS, READERS], [REGISTERS, 48])  # fmt: skip
        mbarrier.wait(known, 0)
        deviation = (found.index(0).load(where[1].type.layout), found.index(1).load(where[1].type.layout))
    else:
        fence_async_shared()
        made = gl.warp_specialize([
            (multiply_beside, (buffers, full, empty, task, text, held, PDL)),
            (load_sources, (given, weights, buffers, full, empty, row0, 0, steps, False, PDL)),
        ], [LOADERS], [REGISTERS])  # fmt: skip
    return made[0], made[1], deviation


@gluon.jit(do_not_specialize=["n_out", "batch", "steps", "parts", "across", "length"])
def multiply_attend_specialized(
    out, rows, weight, bias, center, moments, key, value, count, n_out, batch, c1, co, rows_stride, steps, parts,
    across, input_eps, key_batch, key_row, value_batch, value_row, length, scale,
    PDL: gl.constexpr, PAIR: gl.constexpr, FIRST: gl.constexpr, SECOND: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, LOADERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    given = (rows, None, None, rows_stride, 0, 0, c1, 0, 0)
    text = (key, value, key_batch, key_row, value_batch, value_row, length, scale)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    TYPE: gl.constexpr = key.dtype.element_ty
    per = gl.load(count)
    plane, sizes = batch.to(gl.int64) * n_out, (per, n_out, batch)
    tile_m, tile_n = tile_at(gl.program_id(0), gl.program_id(1), across)
    row0 = tile_m * BM
    inside = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    where, _ = which_rows(row0, inside, per, n_out, batch, False, PAIR)
    place, sample_of_row, valid, lowest, highest = where
    column = tile_n * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    matrix = (weight, c1, co, tile_n, column, column < co)
    if has_work(row0, where, per, n_out, batch, False):
        held = allocate_pair(TYPE, FIRST, BN)
        if SECOND > 0:
            held = held + allocate_pair(TYPE, SECOND, BN)
        after = (bias, center, (None, 0, 0), (None, 0, 0))
        sums, columns, deviation = share_tasks(
            given, (weight, tile_n, co), (moments, parts, c1, input_eps), after, where, matrix, row0, sizes, plane,
            steps, text, held, PDL, PAIR, BM, STAGES, LOADERS, REGISTERS,
        )  # fmt: skip
        sums = follow_columns(sums, deviation, columns[2], columns[0], center is not None, bias is not None)
        queries = gl.convert_layout(sums.to(TYPE), gl.DotOperandLayout(0, layout, 2))
        at = out + (place.to(gl.int64)[:, None] * co + column[None, :])
        found = attend_text(queries, held, length, scale, layout)
        gl.store(at, found.to(TYPE), mask=(valid & (sample_of_row == lowest))[:, None])
        for sample in range(lowest + 1, highest + 1):  # few tiles have rows of another one
            load_text(text, held, sample, tile_n)
            found = attend_text(queries, held, length, scale, layout)
            gl.store(at, found.to(TYPE), mask=(valid & (sample_of_row == sample))[:, None])
