"""What follows the sums of a product's tile: the parts of other programs, norms, bias, activation, residual.

What it takes is loaded while other loads are under way, before the sums are there: each wait would be as long as some
steps of the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fisedit.runtime.kernels.activate import activate
from fisedit.runtime.kernels.multiply_rows.steps import which_rows
from fisedit.runtime.kernels.share_out import share_out


@triton.jit
def share_part(part, lock, sums, gates, inside, splits, polls, GATED: tl.constexpr, HALF: tl.constexpr):
    """Write a program's part of the sums; whose rows it is to add up, see :func:`share_out`."""
    tl.store(part + inside, sums)
    if GATED:
        tl.store(part + HALF + inside, gates)
    tl.debug_barrier()
    return share_out(lock, tl.program_id(2), splits, polls)


@triton.jit
def add_parts(part, splits, inside, there, SIZE: tl.constexpr, AHEAD: tl.constexpr):
    """The sum of all parts in their order, so many loads under way. They come from L2: L1 may hold what stood there
    before."""
    sums = tl.zeros(inside.shape, tl.float32)
    for first in range(0, splits, AHEAD):
        for more in tl.static_range(AHEAD):
            wanted = there[:, None] & (first + more < splits)
            sums += tl.load(part + inside, mask=wanted, other=0.0, cache_modifier=".cg")
            part += SIZE
    return sums


@triton.jit
def load_scales(affine, plane, stride, lowest, highest, column, within):
    """Scale and offset of each column for the first and the last sample of a tile: most have one or two."""
    first, last = affine + lowest * stride + column, affine + highest * stride + column
    scale, last_scale = tl.load(first, mask=within), tl.load(last, mask=within)
    return scale, last_scale, tl.load(first + plane, mask=within), tl.load(last + plane, mask=within)


@triton.jit
def scale_rows(x, scales, affine, plane, stride, sample, lowest, highest, column, kept):
    """``x`` by the scale and offset of each row's sample, one after the other: fewer registers; ``scales`` from
    :func:`load_scales`."""
    for number in tl.range(lowest, highest + 1, num_stages=1):
        other = kept & (number > lowest) & (number < highest)
        at = affine + number * stride + column
        scale = tl.load(at, mask=other, other=tl.where(number == lowest, scales[0], scales[1]))
        offset = tl.load(at + plane, mask=other, other=tl.where(number == lowest, scales[2], scales[3]))
        x = tl.where((sample == number)[:, None], x * scale[None, :] + offset[None, :], x)
    return x


@triton.jit
def load_deviation(moments, place, valid, parts, plane, channels, eps, AHEAD: tl.constexpr):
    """Mean of each row, and one over its deviation: from sums of its channels and of their squares, in parts, so many
    of which are loaded at a time."""
    own = moments + place.to(tl.int64)
    sums, squares = tl.zeros(place.shape, tl.float32), tl.zeros(place.shape, tl.float32)
    for first in range(0, parts, AHEAD):
        for more in tl.static_range(AHEAD):
            known, at = valid & (first + more < parts), own + (first + more) * plane
            sums += tl.load(at, mask=known, other=0.0)
            squares += tl.load(at + plane * parts, mask=known, other=0.0)
    mean = sums / channels
    return mean, tl.rsqrt(tl.maximum(squares / channels - mean * mean, 0.0) + eps)


@triton.jit
def store_moments(moments, x, place, valid, kept, tile_n, parts, plane, EVEN_N: tl.constexpr):
    x = x if EVEN_N else tl.where(kept[None, :], x, 0.0)
    at = moments + tile_n * plane + place.to(tl.int64)
    tl.store(at, tl.sum(x, 1), mask=valid)
    tl.store(at + plane * parts, tl.sum(x * x, 1), mask=valid)


@triton.jit
def load_columns(
    bias, center, affine, affine_plane, affine_batch, norm_affine, norm_plane, norm_batch, lowest, highest, column, co,
    within, BIAS: tl.constexpr, AFFINE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """What is of columns, for :func:`finish_tile`: biases, sums of weights, scales; ``column`` where there is none."""
    GATES: tl.constexpr = BIAS and GATED
    CENTER: tl.constexpr = center is not None
    CENTERS: tl.constexpr = CENTER and GATED
    own = tl.load(bias + column, mask=within).to(tl.float32) if BIAS else column
    gate = tl.load(bias + co + column, mask=within).to(tl.float32) if GATES else column
    of_own = tl.load(center + column, mask=within) if CENTER else column
    of_gate = tl.load(center + co + column, mask=within) if CENTERS else column
    scales = (column, column, column, column)
    if AFFINE:
        scales = load_scales(affine, affine_plane, affine_batch, lowest, highest, column, within)
    norms = (column, column, column, column)
    if norm_affine is not None:
        norms = load_scales(norm_affine, norm_plane, norm_batch, lowest, highest, column, within)
    return own, gate, of_own, of_gate, scales, norms


@triton.jit
def load_residual(residual, stride, place, valid, column, within, RESIDUAL: tl.constexpr):
    """``[BM, BN]``; ``column`` stands for none."""
    if RESIDUAL:
        good = valid[:, None] if within is None else valid[:, None] & within[None, :]
        found = tl.load(residual + (place.to(tl.int64)[:, None] * stride + column[None, :]), mask=good, other=0.0)
    else:
        found = column
    return found


@triton.jit
def load_operands(
    bias, center, affine, affine_plane, affine_batch, norm_affine, norm_plane, norm_batch, residual, residual_stride,
    lowest, highest, place, valid, column, co, within, BIAS: tl.constexpr, AFFINE: tl.constexpr, GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """:func:`load_columns` and :func:`load_residual`."""
    columns = load_columns(
        bias, center, affine, affine_plane, affine_batch, norm_affine, norm_plane, norm_batch, lowest, highest, column,
        co, within, BIAS, AFFINE, GATED,
    )  # fmt: skip
    return columns, load_residual(residual, residual_stride, place, valid, column, within, RESIDUAL)


@triton.jit
def follow_columns(sums, mean, rstd, center, bias, CENTER: tl.constexpr, BIAS: tl.constexpr):
    """What follows sums of products of rows column by column: their normalization, and the bias."""
    if CENTER:
        sums = (sums - mean[:, None] * center[None, :]) * rstd[:, None]
    if BIAS:
        sums += bias[None, :]
    return sums


@triton.jit
def finish_tile(
    sums, gates, columns, extra, mean, rstd, out, affine, norm_affine, normalized, made_moments, sample, lowest,
    highest, place, valid, column, within, tile_n, co, plane, affine_plane, affine_batch, norm_plane, norm_batch,
    CENTER: tl.constexpr, BIAS: tl.constexpr, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM_ACTIVATION: tl.constexpr,
):  # fmt: skip
    """All that follows the sums of a tile, or of some of its rows, and where it goes.

    Args:
        columns, extra: from :func:`load_columns` and :func:`load_residual`.
    """
    own, gate, of_own, of_gate, scales, norms = columns
    sums = follow_columns(sums, mean, rstd, of_own, own, CENTER, BIAS)
    if AFFINE:
        sums = scale_rows(
            sums, scales, affine, affine_plane, affine_batch, sample, lowest, highest, column, column < co
        )
    if GATED:
        sums *= activate(follow_columns(gates, mean, rstd, of_gate, gate, CENTER, BIAS), ACTIVATION)
    else:
        sums = activate(sums, ACTIVATION)
    if RESIDUAL:
        sums += extra.to(tl.float32)
    at = place.to(tl.int64)[:, None] * co + column[None, :]
    good = valid[:, None] if within is None else valid[:, None] & within[None, :]
    result = sums.to(out.dtype.element_ty)
    tl.store(out + at, result, mask=good)
    if made_moments is not None:
        store_moments(
            made_moments, result.to(tl.float32), place, valid, column < co, tile_n, tl.cdiv(co, column.shape[0]), plane,
            within is None,
        )  # fmt: skip
    if normalized is not None:
        x = result.to(tl.float32)
        x = scale_rows(x, norms, norm_affine, norm_plane, norm_batch, sample, lowest, highest, column, column < co)
        tl.store(normalized + at, activate(x, NORM_ACTIVATION).to(out.dtype.element_ty), mask=good)


@triton.jit
def finish_piece(
    part, splits, start, end, columns, out, affine, residual, residual_stride, norm_affine, normalized, moments,
    made_moments, c1, input_eps, parts, row0, lowest, highest, per, n_out, batch, column, within, tile_n, co, plane,
    affine_plane, affine_batch, norm_plane, norm_batch, CENTER: tl.constexpr, BIAS: tl.constexpr, AFFINE: tl.constexpr,
    RESIDUAL: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, NORM_ACTIVATION: tl.constexpr,
    GATHER: tl.constexpr, PAIR: tl.constexpr, PARTS: tl.constexpr, PIECE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """:func:`finish_tile` for rows ``start`` to ``end`` of a tile, at most ``PIECE``, whose sums lie in parts."""
    row = start + tl.arange(0, PIECE)
    there = row < end
    place, sample, _, valid = which_rows(row0 + start, per, n_out, batch, PIECE, GATHER, PAIR)
    valid &= there
    extra = load_residual(residual, residual_stride, place, valid, column, within, RESIDUAL)
    inside = row[:, None] * BN + tl.arange(0, BN)[None, :]
    sums = add_parts(part, splits, inside, there, SIZE, 4)
    gates = add_parts(part + BM * BN, splits, inside, there, SIZE, 4) if GATED else sums
    mean, rstd = sample, sample
    if CENTER:
        mean, rstd = load_deviation(moments, place, valid, parts, plane, c1, input_eps, PARTS)
    finish_tile(
        sums, gates, columns, extra, mean, rstd, out, affine, norm_affine, normalized, made_moments, sample, lowest,
        highest, place, valid, column, within, tile_n, co, plane, affine_plane, affine_batch, norm_plane, norm_batch,
        CENTER, BIAS, AFFINE, RESIDUAL, GATED, ACTIVATION, NORM_ACTIVATION,
    )  # fmt: skip


@triton.jit
def finish_shares(
    partial, locks, sums, gates, polls, columns, out, affine, residual, residual_stride, norm_affine, normalized,
    moments, made_moments, c1, input_eps, parts, tile_m, lowest, highest, per, n_out, batch, column, within, tile_n, co,
    plane, affine_plane, affine_batch, norm_plane, norm_batch, CENTER: tl.constexpr, BIAS: tl.constexpr,
    AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    NORM_ACTIVATION: tl.constexpr, GATHER: tl.constexpr, PAIR: tl.constexpr, PARTS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """:func:`share_part`, and :func:`finish_piece` for the rows that a program is to add up."""
    BM: tl.constexpr = sums.shape[0]
    BN: tl.constexpr = sums.shape[1]
    SIZE: tl.constexpr = BM * BN * (2 if GATED else 1)
    tile, splits = tile_m * tl.num_programs(0) + tile_n, tl.num_programs(2)
    part = partial + (tile * splits).to(tl.int64) * SIZE
    inside = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    mine = part + tl.program_id(2) * SIZE
    shares = share_part(mine, locks + tile, sums, gates, inside, splits, polls, GATED, BM * BN)
    each = tl.cdiv(BM, splits)
    for number in tl.range(0, splits, num_stages=1):
        if (shares >> number) & 1:
            end = min(number * each + each, BM)
            for start in tl.range(number * each, end, PIECE, num_stages=1):
                finish_piece(
                    part, splits, start, end, columns, out, affine, residual, residual_stride, norm_affine, normalized,
                    moments, made_moments, c1, input_eps, parts, tile_m * BM, lowest, highest, per, n_out, batch,
                    column, within, tile_n, co, plane, affine_plane, affine_batch, norm_plane, norm_batch, CENTER, BIAS,
                    AFFINE, RESIDUAL, GATED, ACTIVATION, NORM_ACTIVATION, GATHER, PAIR, PARTS, PIECE, BM, BN, SIZE,
                )  # fmt: skip
