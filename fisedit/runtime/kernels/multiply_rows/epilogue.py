"""What follows the sums of a product's tile: the parts of other programs, norms, bias, activation, residual."""

from __future__ import annotations

import triton
import triton.language as tl

from fisedit.runtime.kernels.activate import activate


@triton.jit
def is_last(partial, locks, sums, gates, inside, splits, GATED: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr):
    """Write a program's part of the sums; whether all others have written theirs."""
    tl.store(partial + tl.program_id(2) * SIZE + inside, sums)
    if GATED:
        tl.store(partial + tl.program_id(2) * SIZE + HALF + inside, gates)
    tl.debug_barrier()
    last = tl.atomic_add(locks, 1, sem="acq_rel") == splits - 1
    if last:
        tl.store(locks, 0)
    return last


@triton.jit
def add_parts(part, splits, inside, BM: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr):
    """The sum of all parts in their order. They come from L2: L1 may hold what stood there before."""
    sums = tl.zeros((BM, BN), tl.float32)
    for first in range(0, splits, 4):
        for more in tl.static_range(4):  # four loads under way
            sums += tl.load(part + inside, mask=first + more < splits, other=0.0, cache_modifier=".cg")
            part += SIZE
    return sums


@triton.jit
def scale_rows(x, affine, plane, stride, sample, lowest, highest, column, within):
    """``x`` by the scale and offset of each row's sample: one after the other, most tiles have rows of one alone."""
    for number in tl.range(lowest, highest + 1, num_stages=1):
        at = affine + number * stride + column
        scaled = x * tl.load(at, mask=within)[None, :] + tl.load(at + plane, mask=within)[None, :]
        x = tl.where((sample == number)[:, None], scaled, x)
    return x


@triton.jit
def load_moments(moments, place, valid, parts, plane, PARTS: tl.constexpr):
    """Sums of each row's channels and of their squares, in parts: ``[BM, PARTS]`` each."""
    part = tl.arange(0, PARTS)
    at = moments + (place.to(tl.int64) * parts)[:, None] + part[None, :]
    known = valid[:, None] & (part < parts)[None, :]
    return tl.load(at, mask=known, other=0.0), tl.load(at + plane * parts, mask=known, other=0.0)


@triton.jit
def store_moments(moments, x, place, valid, kept, tile_n, parts, plane, EVEN_N: tl.constexpr):
    x = x if EVEN_N else tl.where(kept[None, :], x, 0.0)
    at = moments + place.to(tl.int64) * parts + tile_n
    tl.store(at, tl.sum(x, 1), mask=valid)
    tl.store(at + plane * parts, tl.sum(x * x, 1), mask=valid)


@triton.jit
def deviation(of_sums, of_squares, channels, eps):
    """Mean of each row, and one over its deviation."""
    mean = tl.sum(of_sums, 1) / channels
    return mean, tl.rsqrt(tl.maximum(tl.sum(of_squares, 1) / channels - mean * mean, 0.0) + eps)


@triton.jit
def follow_columns(sums, mean, rstd, center, bias, column, within, BIAS: tl.constexpr):
    """What follows sums of products of rows column by column: their normalization, and the bias."""
    if center is not None:
        sums = (sums - mean[:, None] * tl.load(center + column, mask=within)[None, :]) * rstd[:, None]
    if BIAS:
        sums += tl.load(bias + column, mask=within).to(tl.float32)[None, :]
    return sums


@triton.jit
def finish_tile(
    sums, gates, out, bias, affine, residual, normalized, norm_affine, center, made_moments, mean, rstd, sample, lowest,
    highest, place, valid, column, tile_n, co, plane, residual_stride, affine_plane, affine_batch, norm_plane,
    norm_batch, BIAS: tl.constexpr, AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM_ACTIVATION: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """All that follows the sums of a tile, and where it goes."""
    kept = column < co
    within = None if EVEN_N else kept
    sums = follow_columns(sums, mean, rstd, center, bias, column, within, BIAS)
    if GATED:
        gates = follow_columns(gates, mean, rstd, center, bias, co + column, within, BIAS)
    if AFFINE:
        sums = scale_rows(sums, affine, affine_plane, affine_batch, sample, lowest, highest, column, within)
    sums = sums * activate(gates, ACTIVATION) if GATED else activate(sums, ACTIVATION)
    goal = place.to(tl.int64)[:, None]
    good = valid[:, None] if EVEN_N else valid[:, None] & kept[None, :]
    if RESIDUAL:
        sums += tl.load(residual + goal * residual_stride + column[None, :], mask=good, other=0.0).to(tl.float32)
    result = sums.to(out.dtype.element_ty)
    tl.store(out + goal * co + column[None, :], result, mask=good)
    if made_moments is not None:
        x = result.to(tl.float32)
        store_moments(made_moments, x, place, valid, kept, tile_n, tl.num_programs(0), plane, EVEN_N)
    if normalized is not None:
        x = result.to(tl.float32)
        x = scale_rows(x, norm_affine, norm_plane, norm_batch, sample, lowest, highest, column, within)
        x = activate(x, NORM_ACTIVATION)
        tl.store(normalized + goal * co + column[None, :], x.to(out.dtype.element_ty), mask=good)
