"""What the steps of a product read: rows, gathered from where they lie, and weights."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_weight(
    weight, first, at, column, step, inner, kept, within,
    TMA: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """The tile ``[BK, BN]``."""
    if TMA:
        tile = weight.load([first, at]).T  # past the channels of a tap it has the next one's, which meet zeros
    else:
        where = weight + column[None, :].to(tl.int64) * inner + (at + step)[:, None]
        if EVEN_C and EVEN_N:
            tile = tl.load(where)
        elif EVEN_C:
            tile = tl.load(where, mask=kept[None, :], other=0.0)
        else:
            tile = tl.load(where, mask=kept[None, :] & within[:, None], other=0.0)
    return tile


@triton.jit
def recorded_rows(rows, recorded, sample, stride, ADDRESSES: tl.constexpr):
    """Where each row's sample has its recorded map."""
    ITEM: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
    if ADDRESSES:
        first = tl.load(recorded + sample)
    else:
        first = recorded.to(tl.int64) + sample.to(tl.int64) * stride * ITEM
    return tl.multiple_of(first.to(rows.dtype), 16)


@triton.jit
def row_starts(
    rows, rows2, rows3, recorded, sample, row, place, n_in, c1, c2, rows_stride, rows2_stride, rows3_stride,
    recorded_stride, GATHER: tl.constexpr, ADDRESSES: tl.constexpr, TWO: tl.constexpr, THREE: tl.constexpr,
):  # fmt: skip
    """Where rows begin: the packed ones and the recorded ones, and of each output its own in the other sources. What a
    product does without is ``rows`` itself."""
    own, own2, own3, there = rows, rows, rows, rows
    if GATHER:
        own = rows + (sample * n_in).to(tl.int64) * c1
        there = recorded_rows(rows, recorded, sample, recorded_stride, ADDRESSES) - n_in.to(tl.int64) * c1
    else:
        own = rows + (sample * n_in + row).to(tl.int64) * rows_stride
    if TWO:  # after the taps
        own2 = rows2 + place.to(tl.int64) * rows2_stride
    if THREE:
        own3 = rows3 + place.to(tl.int64) * rows3_stride - c2
    return own, there, own2, own3


@triton.jit
def first_step(number, width, taps, BK: tl.constexpr, BY_TAP: tl.constexpr, TURNS: tl.constexpr):
    """Tap and channel where a step begins; what lies behind the taps has tap ``taps``, or channels from ``width`` on.

    Steps go ``BY_TAP``, all channels of one after the other, or else through all taps of some channels, whose rows are
    in L1 then. Without ``TURNS`` there is one tap, and nothing behind it.
    """
    if not TURNS:
        tap, begin = 0, number * BK
    elif BY_TAP:
        tap = min(number * BK // width, taps)
        begin = number * BK - tap * width
    else:
        chunk = min(number // taps, width // BK)
        behind = chunk * BK == width
        tap = tl.where(behind, 0, number - chunk * taps)
        begin = chunk * BK + tl.where(behind, (number - chunk * taps) * BK, 0)
    return tap, begin


@triton.jit
def next_step(tap, begin, width, taps, BK: tl.constexpr, BY_TAP: tl.constexpr, TURNS: tl.constexpr):
    if not TURNS:
        begin += BK
    elif BY_TAP:
        begin += BK
        over = (begin >= width) & (tap < taps)
        tap += over.to(tl.int32)
        begin = tl.where(over, 0, begin)
    else:
        tap += 1
        over = (tap == taps) | (begin >= width)
        tap = tl.where(over, 0, tap)
        begin += tl.where(over, BK, 0)
    return tap, begin


@triton.jit
def weight_of(tap, begin, c1, width, taps, TWO: tl.constexpr):
    """Where the weights of a step begin that goes through all taps of some channels."""
    at = tap * c1 + begin
    return at + tl.where(begin >= width, (taps - 1) * c1, 0) if TWO else at


@triton.jit
def load_rows(
    own, there, own2, own3, index, valid, tap, begin, step, n_in, c1, c2, width, taps,
    GATHER: tl.constexpr, TWO: tl.constexpr, THREE: tl.constexpr, EVEN_C: tl.constexpr, WIDE: tl.constexpr,
    BY_TAP: tl.constexpr,
):  # fmt: skip
    """What a step multiplies, ``[BM, BK]``: some channels of the rows that a tap reads, or of those behind the taps."""
    if TWO:
        behind = tap == taps if BY_TAP else begin >= width
        begin = begin if BY_TAP else tl.where(behind, begin - width, begin)
    channel = (begin + step)[None, :]
    if GATHER:
        start, wanted = tl.where(index < n_in, own, there), index >= 0
        inside = (index.to(tl.int64) if WIDE else index) * c1
        if TWO:
            wanted = tl.where(behind, valid, wanted)
            inside = tl.where(behind, 0, inside)
        channel = inside[:, None] + channel
    else:
        start, wanted = own, valid
    if TWO:
        start = tl.where(behind, own2, start)
        if THREE:
            start = tl.where(behind & (begin >= c2), own3, start)
    wanted = wanted[:, None] if EVEN_C else wanted[:, None] & (begin + step < c1)[None, :]
    return tl.load(start[:, None] + channel, mask=wanted, other=0.0)
