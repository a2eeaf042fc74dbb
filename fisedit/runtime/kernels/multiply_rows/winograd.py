"""3x3 convolutions by fewer products: Winograd's F(2x2, 3x3), over blocks of 2x2 outputs.

A block reads 4x4 rows. Of these come 16 sums, each is multiplied by weights of its own, and sums of the products are
the four outputs: 4 products for each, not 9 (Lavin and Gray 2016, equation 8). Where nearest upsampling made the map
twice as large, the 4x4 rows are 3x3 different ones, and 9 sums are enough: 2.25 products for each output.

One kernel makes the sums, PyTorch multiplies them, and another kernel does what follows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit.runtime.kernels.activate import ACTIVATIONS
from fisedit.runtime.kernels.launch import cdiv, launch, overlaps
from fisedit.runtime.kernels.multiply_rows.epilogue import finish_tile, load_columns, load_residual
from fisedit.runtime.kernels.multiply_rows.steps import recorded_rows

BLOCKS, CHANNELS = 8, 128
"""Of a program of either kernel: each of its 128 threads reads and writes 16 bytes of half precision."""


@triton.jit
def _combine(a, b, c, d, SIDE: tl.constexpr):
    """The sums of four rows in a line, or of three where the middle ones are the same."""
    if SIDE == 4:
        sums = (a - c, b + c, c - b, b - d)
    else:
        sums = (a - b, b, b - c, c)
    return sums


@triton.jit
def _find_line(table, line, good, SIDE: tl.constexpr):
    """Which rows a line of a block has."""
    at = table + line * SIDE
    a, b, c = (tl.load(at, mask=good, other=-1), tl.load(at + 1, mask=good, other=-1),
               tl.load(at + 2, mask=good, other=-1))  # fmt: skip
    d = tl.load(at + 3, mask=good, other=-1) if SIDE == 4 else c
    return a, b, c, d


@triton.jit
def _load_row(given, index, channel, kept):
    own, there, n_in, channels = given
    start = tl.where(index < n_in, own, there) + index.to(tl.int64) * channels
    wanted = (index >= 0)[:, None] & kept[None, :]
    return tl.load(start[:, None] + channel[None, :], mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def _load_line(given, indices, channel, kept, SIDE: tl.constexpr):
    """The sums of one line of each block."""
    a, b, c = (_load_row(given, indices[0], channel, kept), _load_row(given, indices[1], channel, kept),
               _load_row(given, indices[2], channel, kept))  # fmt: skip
    d = _load_row(given, indices[3], channel, kept) if SIDE == 4 else c
    return _combine(a, b, c, d, SIDE)


@triton.jit(do_not_specialize=["n_in", "table_stride"])
def _sum_blocks(
    out, rows, recorded, sources, count, n_in, channels, plane, recorded_stride, table_stride,
    RECORDED: tl.constexpr, ADDRESSES: tl.constexpr, SIDE: tl.constexpr, PDL: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """All sums of some blocks, for some channels."""
    number, sample = tl.load(count), tl.program_id(2)
    if tl.program_id(0) * BM < number:
        block, channel = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
        good, kept = block < number, channel < channels
        table = sources + sample * table_stride + block * (SIDE * SIDE)
        found, found2, found3 = (_find_line(table, 0, good, SIDE), _find_line(table, 1, good, SIDE),
                                 _find_line(table, 2, good, SIDE))  # fmt: skip
        found4 = _find_line(table, 3, good, SIDE) if SIDE == 4 else found3
        own = rows + sample.to(tl.int64) * n_in * channels
        there = own
        if RECORDED:
            there = recorded_rows(rows, recorded, sample, recorded_stride, ADDRESSES) - n_in.to(tl.int64) * channels
        given = (own, there, n_in, channels)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        a, b, c = (_load_line(given, found, channel, kept, SIDE), _load_line(given, found2, channel, kept, SIDE),
                   _load_line(given, found3, channel, kept, SIDE))  # fmt: skip
        d = _load_line(given, found4, channel, kept, SIDE) if SIDE == 4 else c
        goal = out + (sample * number + block).to(tl.int64)[:, None] * channels + channel[None, :]
        for column in tl.static_range(SIDE):
            sums = _combine(a[column], b[column], c[column], d[column], SIDE)
            for line in tl.static_range(SIDE):
                at = goal + plane.to(tl.int64) * (line * SIDE + column)
                tl.store(at, sums[line].to(out.dtype.element_ty), mask=good[:, None] & kept[None, :])


@triton.jit
def _load_products(products, plane, line, stored, SIDE: tl.constexpr):
    """Those of one line of places, as the sums that two outputs beside each other need."""
    at = products + plane * (line * SIDE)
    a, b, c = (tl.load(at, mask=stored, other=0.0).to(tl.float32),
               tl.load(at + plane, mask=stored, other=0.0).to(tl.float32),
               tl.load(at + 2 * plane, mask=stored, other=0.0).to(tl.float32))  # fmt: skip
    even, odd = a + b, b - c
    if SIDE == 4:
        even += c
        odd -= tl.load(at + 3 * plane, mask=stored, other=0.0).to(tl.float32)
    return even, odd


@triton.jit
def _finish_output(
    sums, columns, goal, table, sample, good, n_out, matrix,
    ACTIVATION: tl.constexpr, NORM_ACTIVATION: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """All that follows the sums of one output of each block; ``table``: where it is, if anywhere."""
    made, after, residual, residual_stride = goal
    own = tl.load(table, mask=good, other=-1)
    where = (sample * n_out + own, sample + own * 0, own >= 0, sample, sample)
    extra = load_residual(residual, residual_stride, where, matrix, EVEN_N)
    finish_tile(
        sums, sums, columns, extra, (own, own), made, after, where, matrix, n_out, residual is not None, False,
        ACTIVATION, NORM_ACTIVATION, EVEN_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_out", "places_stride"])
def _finish_blocks(
    out, normalized, products, places, bias, affine, residual, norm_affine, count, n_out, co, plane, places_stride,
    residual_stride, affine_plane, affine_batch, norm_plane, norm_batch,
    SIDE: tl.constexpr, ACTIVATION: tl.constexpr, NORM_ACTIVATION: tl.constexpr, EVEN_N: tl.constexpr,
    PDL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The outputs of some blocks, some channels of them."""
    number, sample = tl.load(count), tl.program_id(2)
    if tl.program_id(0) * BM < number:
        block, column = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
        good, kept = block < number, column < co
        after = (bias, None, (affine, affine_plane, affine_batch), (norm_affine, norm_plane, norm_batch))
        goal = ((out, normalized, None), after, residual, residual_stride)
        matrix = (products, co, co, tl.program_id(1), column, kept)
        table = places + sample * places_stride + block * 4
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        columns = load_columns(after, (block, block, good, sample, sample), matrix, False, EVEN_N)
        stored, apart = good[:, None] & kept[None, :], plane.to(tl.int64)
        first = products + (sample * number + block).to(tl.int64)[:, None] * co + column[None, :]
        a, a_odd = _load_products(first, apart, 0, stored, SIDE)
        b, b_odd = _load_products(first, apart, 1, stored, SIDE)
        c, c_odd = _load_products(first, apart, 2, stored, SIDE)
        top, top_odd, low, low_odd = a + b, a_odd + b_odd, b - c, b_odd - c_odd
        if SIDE == 4:
            d, d_odd = _load_products(first, apart, 3, stored, SIDE)
            top, top_odd, low, low_odd = top + c, top_odd + c_odd, low - d, low_odd - d_odd
        _finish_output(top, columns, goal, table, sample, good, n_out, matrix, ACTIVATION, NORM_ACTIVATION, EVEN_N)
        _finish_output(
            top_odd, columns, goal, table + 1, sample, good, n_out, matrix, ACTIVATION, NORM_ACTIVATION, EVEN_N
        )
        _finish_output(low, columns, goal, table + 2, sample, good, n_out, matrix, ACTIVATION, NORM_ACTIVATION, EVEN_N)
        _finish_output(
            low_odd, columns, goal, table + 3, sample, good, n_out, matrix, ACTIVATION, NORM_ACTIVATION, EVEN_N
        )


def multiply_winograd(
    rows: Tensor,
    recorded: Tensor | None,
    bias: Tensor | None,
    affine: Tensor | None,
    residual: Tensor | None,
    activation: str,
    number: int,
    block_sources: Tensor,
    block_count: Tensor,
    places: Tensor,
    block_weight: Tensor,
    norm: tuple[Tensor | None, Tensor | None, str] = (None, None, "none"),
) -> Tensor:
    """A 3x3 convolution of active rows: what ``multiply_rows`` gives, by other sums.

    Args:
        rows, recorded, bias, affine, residual, activation: see the reference of ``multiply_rows``.
        number: N', rows of the result for each sample, padding included.
        block_sources: int32 ``[M, T, 16]``: the ``sources`` of a convolution of 4x4 taps at a stride of two, or
            ``[M, T, 9]``: of 3x3 taps over the map before an upsampling. block_count: int32 ``[1]``: blocks past it
            need not be computed.
        places: int32 ``[M, T, 4]``: which output each of a block's four (line, column: 00, 01, 10, 11) is; -1: none.
        block_weight: ``[16 * Co, C]`` or ``[9 * Co, C]``.
        norm: where the rows go once more, normalized with this affine, and activated.
    Returns: ``[B, N', Co]``.
    """
    sums = transform_rows(rows.contiguous(), recorded, block_sources, block_count)
    weight = block_weight.unflatten(0, (len(sums), -1))  # [16, Co, C]
    products = torch.bmm(sums, weight.mT)  # [16, B * T, Co]
    out = rows.new_empty(len(rows), number, weight.shape[1])  # [B, N', Co]
    normalized, norm_affine, norm_activation = norm
    pdl, (places_stride, side) = overlaps(rows), (_batch_stride(places), math.isqrt(len(sums)))
    launch(_finish_blocks, (cdiv(places.shape[1], BLOCKS), cdiv(out.shape[2], CHANNELS), len(rows)),
        out, normalized, products, places, bias, affine, residual, norm_affine, block_count, number, out.shape[2],
        products.stride(0), places_stride, 0 if residual is None else residual.stride(1), *_strides(affine),
        *_strides(norm_affine),
        SIDE=side, ACTIVATION=ACTIVATIONS[activation], NORM_ACTIVATION=ACTIVATIONS[norm_activation],
        EVEN_N=out.shape[2] % CHANNELS == 0, PDL=pdl, BM=BLOCKS, BN=CHANNELS, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def transform_rows(rows: Tensor, recorded: Tensor | None, sources: Tensor, count: Tensor) -> Tensor:
    """The sums of all blocks, ``[16, B * T, C]`` or ``[9, B * T, C]``: those of one sample behind the other's, the
    padding of both at the end."""
    (batch, n_in, channels), (_, blocks, taps) = rows.shape, sources.shape
    addresses = recorded is not None and recorded.dtype == torch.int64
    recorded = recorded if recorded is None or addresses else recorded.contiguous()
    out = rows.new_empty(taps, batch * blocks, channels)  # [16, B * T, C]
    pdl = overlaps(rows)
    launch(_sum_blocks, (cdiv(blocks, BLOCKS), cdiv(channels, CHANNELS), batch),
        out, rows, recorded, sources, count, n_in, channels, out.stride(0),
        0 if recorded is None or addresses else recorded.stride(0), _batch_stride(sources),
        RECORDED=recorded is not None, ADDRESSES=addresses, SIDE=math.isqrt(taps), PDL=pdl, BM=BLOCKS, BC=CHANNELS,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def _batch_stride(table: Tensor) -> int:
    return table.stride(0) if len(table) > 1 else 0


def _strides(affine: Tensor | None) -> tuple[int, int]:
    return (0, 0) if affine is None else (affine.stride(0), affine.stride(1))
