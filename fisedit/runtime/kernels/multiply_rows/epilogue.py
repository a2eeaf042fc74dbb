"""What follows the sums of a product's tile: the parts of other programs, norms, bias, activation, residual.

What it takes is loaded while other loads are under way, before the sums are there: each wait would be as long as some
steps of the product. Besides the tuples of ``steps.py`` there are

- ``before``: the moments of the rows, in how many parts, of how many channels, and what is added to their variance;
- ``after``: the bias, the sums of the weights, and scale and offset of the result and of the one that is normalized,
  each with its strides; ``None`` where there is none;
- ``made``: the result, the normalized one, and the result's moments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fisedit.runtime.kernels.activate import activate
from fisedit.runtime.kernels.multiply_rows.steps import which_rows
from fisedit.runtime.kernels.share_out import share_out


@triton.jit
def places_in(row, matrix):
    """Where in a part of a tile, ``[BM, BN]``, the sums of rows ``row`` lie."""
    BN: tl.constexpr = matrix[4].shape[0]
    return row[:, None] * BN + (matrix[4] - matrix[3] * BN)[None, :]


@triton.jit
def share_part(
    part, lock, sums, gates, columns, deviation, center, row, matrix, number, parts, polls, GATED: tl.constexpr
):  # fmt: skip
    """Write a program's part of a tile's sums, ``row`` all its rows; whose rows it is to add up, see
    :func:`share_out`. The parts of normalized rows add up to normalized sums: one of them takes off the mean."""
    SIZE: tl.constexpr = sums.shape[0] * sums.shape[1]
    inside = places_in(row, matrix)
    if center is not None:
        own = (tl.where(number == 0, deviation[0], 0.0), deviation[1])
        sums = follow_columns(sums, own, columns[2], columns[0], True, False)
        if GATED:
            gates = follow_columns(gates, own, columns[3], columns[1], True, False)
    tl.store(part + inside, sums)
    if GATED:
        tl.store(part + SIZE + inside, gates)
    tl.debug_barrier()
    return share_out(lock, number, parts, polls)


@triton.jit
def zeros_of(index):
    """Zeros for each ``index``, in its layout: Gluon has none of its own for ``tl.zeros``."""
    return index.to(tl.float32) * 0.0


@triton.jit
def add_parts(part, parts, inside, there, SIZE: tl.constexpr, AHEAD: tl.constexpr):
    """The sum of all parts in their order, so many loads under way. They come from L2: L1 may hold what stood there
    before."""
    sums = zeros_of(inside)
    for first in range(0, parts, AHEAD):
        for more in tl.static_range(AHEAD):
            wanted = there[:, None] & (first + more < parts)
            sums += tl.load(part + inside, mask=wanted, other=0.0, cache_modifier=".cg")
            part += SIZE
    return sums


@triton.jit
def load_scales(scale, lowest, highest, column, within):
    """Scale and offset of each column for the first and the last sample of a tile: most have one or two."""
    affine, plane, stride = scale
    first, last = affine + lowest * stride + column, affine + highest * stride + column
    of_first, of_last = tl.load(first, mask=within), tl.load(last, mask=within)
    return of_first, of_last, tl.load(first + plane, mask=within), tl.load(last + plane, mask=within)


@triton.jit
def scale_rows(x, scales, scale, where, column, kept):
    """``x`` by the scale and offset of each row's sample, one after the other: fewer registers; ``scales`` from
    :func:`load_scales`."""
    affine, plane, stride = scale
    _, sample, _, lowest, highest = where
    for number in tl.range(lowest, highest + 1, num_stages=1):
        other = kept & (number > lowest) & (number < highest)
        at = affine + number * stride + column
        factor = tl.load(at, mask=other, other=tl.where(number == lowest, scales[0], scales[1]))
        offset = tl.load(at + plane, mask=other, other=tl.where(number == lowest, scales[2], scales[3]))
        x = tl.where((sample == number)[:, None], x * factor[None, :] + offset[None, :], x)
    return x


@triton.jit
def load_deviation(before, where, plane, AHEAD: tl.constexpr):
    """Mean of each row, and one over its deviation: from sums of its channels and of their squares, in parts, so many
    of which are loaded at a time. Samples, which nothing reads, where there are none."""
    moments, parts, channels, eps = before
    place, sample, valid, _, _ = where
    mean, rstd = sample, sample
    if moments is not None:
        own = moments + place.to(tl.int64)
        sums, squares = zeros_of(place), zeros_of(place)
        for first in range(0, parts, AHEAD):
            for more in tl.static_range(AHEAD):
                known, at = valid & (first + more < parts), own + (first + more) * plane
                sums += tl.load(at, mask=known, other=0.0)
                squares += tl.load(at + plane * parts, mask=known, other=0.0)
        mean = sums / channels
        rstd = tl.rsqrt(tl.maximum(squares / channels - mean * mean, 0.0) + eps)
    return mean, rstd


@triton.jit
def store_moments(moments, x, place, valid, kept, tile_n, parts, plane, EVEN_N: tl.constexpr):
    x = x if EVEN_N else tl.where(kept[None, :], x, 0.0)
    at = moments + tile_n * plane + place.to(tl.int64)
    tl.store(at, tl.sum(x, 1), mask=valid)
    tl.store(at + plane * parts, tl.sum(x * x, 1), mask=valid)


@triton.jit
def load_columns(after, where, matrix, GATED: tl.constexpr, EVEN_N: tl.constexpr):
    """What is of columns, for :func:`finish_tile`: biases, sums of weights, scales; ``column`` where there is none."""
    bias, center, scale, norm = after
    _, _, _, lowest, highest = where
    _, _, co, _, column, kept = matrix
    GATES: tl.constexpr = bias is not None and GATED
    CENTERS: tl.constexpr = center is not None and GATED
    within = None if EVEN_N else kept
    own = tl.load(bias + column, mask=within).to(tl.float32) if bias is not None else column
    gate = tl.load(bias + co + column, mask=within).to(tl.float32) if GATES else column
    of_own = tl.load(center + column, mask=within) if center is not None else column
    of_gate = tl.load(center + co + column, mask=within) if CENTERS else column
    scales = (column, column, column, column)
    if scale[0] is not None:
        scales = load_scales(scale, lowest, highest, column, within)
    norms = (column, column, column, column)
    if norm[0] is not None:
        norms = load_scales(norm, lowest, highest, column, within)
    return own, gate, of_own, of_gate, scales, norms


@triton.jit
def load_residual(residual, stride, where, matrix, EVEN_N: tl.constexpr):
    """``[BM, BN]``; ``column`` stands for none."""
    place, _, valid, _, _ = where
    _, _, _, _, column, kept = matrix
    found = column
    if residual is not None:
        good = valid[:, None] if EVEN_N else valid[:, None] & kept[None, :]
        found = tl.load(residual + (place.to(tl.int64)[:, None] * stride + column[None, :]), mask=good, other=0.0)
    return found


@triton.jit
def follow_columns(sums, deviation, center, bias, CENTER: tl.constexpr, BIAS: tl.constexpr):
    """What follows sums of products of rows column by column: their normalization, and the bias."""
    if CENTER:
        sums = (sums - deviation[0][:, None] * center[None, :]) * deviation[1][:, None]
    if BIAS:
        sums += bias[None, :]
    return sums


@triton.jit
def finish_tile(
    sums, gates, columns, extra, deviation, made, after, where, matrix, plane, RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, NORM_ACTIVATION: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """All that follows the sums of a tile, or of some of its rows, and where it goes.

    Args:
        columns, extra, deviation: from :func:`load_columns`, :func:`load_residual` and :func:`load_deviation`.
    """
    own, gate, of_own, of_gate, scales, norms = columns
    bias, center, scale, norm = after
    place, _, valid, _, _ = where
    _, _, co, tile_n, column, kept = matrix
    BIAS: tl.constexpr = bias is not None
    CENTER: tl.constexpr = center is not None
    sums = follow_columns(sums, deviation, of_own, own, CENTER, BIAS)
    if scale[0] is not None:
        sums = scale_rows(sums, scales, scale, where, column, kept)
    if GATED:
        sums *= activate(follow_columns(gates, deviation, of_gate, gate, CENTER, BIAS), ACTIVATION)
    else:
        sums = activate(sums, ACTIVATION)
    if RESIDUAL:
        sums += extra.to(tl.float32)
    out, normalized, moments = made
    at = place.to(tl.int64)[:, None] * co + column[None, :]
    good = valid[:, None] if EVEN_N else valid[:, None] & kept[None, :]
    result = sums.to(out.dtype.element_ty)
    tl.store(out + at, result, mask=good)
    if moments is not None:
        parts = tl.cdiv(co, column.shape[0])
        store_moments(moments, result.to(tl.float32), place, valid, kept, tile_n, parts, plane, EVEN_N)
    if normalized is not None:
        x = scale_rows(result.to(tl.float32), norms, norm, where, column, kept)
        tl.store(normalized + at, activate(x, NORM_ACTIVATION).to(out.dtype.element_ty), mask=good)


@triton.jit
def finish_shares(
    part, parts, shares, columns, made, after, residual, residual_stride, row0, tile, piece, matrix, plane, sizes,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, NORM_ACTIVATION: tl.constexpr, EVEN_N: tl.constexpr,
    GATHER: tl.constexpr, PAIR: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """:func:`finish_tile` for some rows of a tile whose sums lie in parts, so many at a time as ``piece`` numbers.

    Args:
        part: the first one; the others follow. shares: of which of their programs, see :func:`share_out`.
        tile: ``where`` its rows are. sizes: rows of each sample, with padding, and samples.
    """
    PIECE: tl.constexpr = piece.shape[0]
    BN: tl.constexpr = matrix[4].shape[0]
    SIZE: tl.constexpr = BM * BN * (2 if GATED else 1)
    per, n_out, batch = sizes
    each = tl.cdiv(BM, parts)
    for number in tl.range(0, parts, num_stages=1):
        if (shares >> number) & 1:
            end = min(number * each + each, BM)
            for start in tl.range(number * each, end, PIECE, num_stages=1):
                row = start + piece
                there = row < end
                found = which_rows(row0 + start, piece, per, n_out, batch, GATHER, PAIR)[0]
                where = (found[0], found[1], found[2] & there, tile[3], tile[4])  # columns are of the tile's samples
                extra = load_residual(residual, residual_stride, where, matrix, EVEN_N)
                inside = places_in(row, matrix)
                sums = add_parts(part, parts, inside, there, SIZE, 4)
                gates = add_parts(part + BM * BN, parts, inside, there, SIZE, 4) if GATED else sums
                finish_tile(
                    sums, gates, columns, extra, where, made, (after[0], None, after[2], after[3]), where, matrix,
                    plane, residual is not None, GATED, ACTIVATION, NORM_ACTIVATION, EVEN_N,
                )  # fmt: skip
