"""What the steps of a product multiply: rows, as they lie or gathered, and weights."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sample_of(row, per, PAIR: tl.constexpr):
    """Which sample each row is of: of one or two, without a division."""
    return (row >= per).to(tl.int32) if PAIR else row // per


@triton.jit
def which_rows(first, per, n_out, batch, SIZE: tl.constexpr, GATHER: tl.constexpr, PAIR: tl.constexpr):
    """The output rows from ``first`` on: where each lies in the result, its sample, its number there, and whether there
    is one. Gathered rows follow one another without the padding of samples; others keep it, to be read in one piece.
    """
    row = first + tl.arange(0, SIZE)
    if GATHER:
        valid = row < per * batch
        row = tl.where(valid, row, 0)
        sample = sample_of(row, per, PAIR)
        row -= sample * per
    else:
        valid = row < n_out * batch
        row = tl.where(valid, row, 0)
        sample = sample_of(row, n_out, PAIR)
        row -= sample * n_out
        valid &= row < per
    return sample * n_out + row, sample, row, valid


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
def add_products(
    sums, gates, a, weight, tile_n, co, at, column, step, inner, kept, within,
    GATED: tl.constexpr, TMA: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add those of the rows ``a`` ``[BM, BK]`` and the weights from channel ``at`` on; of a gate, with its own."""
    first = tile_n * column.shape[0]
    w = load_weight(weight, first, at, column, step, inner, kept, within, TMA, EVEN_C, EVEN_N)
    sums = tl.dot(a, w, sums, input_precision=PRECISION)
    if GATED:
        w = load_weight(weight, co + first, at, co + column, step, inner, kept, within, TMA, EVEN_C, EVEN_N)
        gates = tl.dot(a, w, gates, input_precision=PRECISION)
    return sums, gates


@triton.jit
def add_rows(
    sums, gates, rows, stride, channels, before, skipped, weight, tile_m, tile_n, place, valid, column, kept, first,
    last, step, co, inner, GATED: tl.constexpr, TMA: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps ``first`` to ``last`` of a product, as far as they are of ``rows``, whose ``channels`` come behind
    ``before`` others, which are ``skipped`` steps."""
    BM: tl.constexpr = place.shape[0]
    BK: tl.constexpr = step.shape[0]
    if not TMA:
        start = rows + place.to(tl.int64) * stride
    for number in tl.range(tl.maximum(first - skipped, 0), tl.minimum(last - skipped, tl.cdiv(channels, BK))):
        begin = number * BK
        within = begin + step < channels
        if TMA:
            a = rows.load([tile_m * BM, begin])
        else:
            a = tl.load(start[:, None] + (begin + step)[None, :], mask=valid[:, None] & within[None, :], other=0.0)
        sums, gates = add_products(
            sums, gates, a, weight, tile_n, co, before + begin, column, step, inner, kept, within,
            GATED, TMA, EVEN_C, EVEN_N, PRECISION,
        )  # fmt: skip
    return sums, gates


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
def first_step(number, width, taps, BK: tl.constexpr):
    """Tap and channel where a step begins; what lies behind the taps has tap ``taps``."""
    tap = min(number * BK // width, taps)
    return tap, number * BK - tap * width


@triton.jit
def find_patches(
    rows, rows2, rows3, recorded, sources, sample, row, place, valid, first, n_in, c1, c2, taps, rows2_stride,
    rows3_stride, recorded_stride, table_stride, ADDRESSES: tl.constexpr, SPLIT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Where the steps of gathered rows begin: tap and channel, the tables of outputs and what the tap reads, and where
    the packed and the recorded rows lie, and the outputs' own in the other sources."""
    tap, begin = 0, 0
    if SPLIT:
        tap, begin = first_step(first, tl.cdiv(c1, BK) * BK, taps, BK)
    table = sources + sample * table_stride + row * taps
    index = tl.load(table + min(tap, taps - 1), mask=valid, other=-1)
    own = rows + (sample * n_in).to(tl.int64) * c1
    there = recorded_rows(rows, recorded, sample, recorded_stride, ADDRESSES) - n_in.to(tl.int64) * c1
    own2 = rows2 + place.to(tl.int64) * rows2_stride
    own3 = rows3 + place.to(tl.int64) * rows3_stride - c2
    return tap, begin, table, index, own, there, own2, own3


@triton.jit
def next_step(tap, begin, width, taps, BK: tl.constexpr):
    begin += BK
    over = (begin >= width) & (tap < taps)
    return tap + over.to(tl.int32), tl.where(over, 0, begin)


@triton.jit
def load_patches(
    own, there, own2, own3, index, valid, tap, begin, step, n_in, c1, c2, taps,
    TWO: tl.constexpr, THREE: tl.constexpr, EVEN_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What a step multiplies, ``[BM, BK]``: some channels of the rows that a tap reads, or of those behind the taps."""
    start, wanted = tl.where(index < n_in, own, there), index >= 0
    inside = (index.to(tl.int64) if WIDE else index) * c1
    if TWO:
        behind = tap == taps
        wanted = tl.where(behind, valid, wanted)
        inside = tl.where(behind, 0, inside)
        start = tl.where(behind, own2, start)
        if THREE:
            start = tl.where(behind & (begin >= c2), own3, start)
    wanted = wanted[:, None] if EVEN_C else wanted[:, None] & (begin + step < c1)[None, :]
    return tl.load(start[:, None] + (inside[:, None] + (begin + step)[None, :]), mask=wanted, other=0.0)


@triton.jit
def add_patches(
    sums, gates, own, there, own2, own3, table, index, valid, tap, begin, weight, tile_n, column, kept, first, last,
    step, n_in, c1, c2, taps, co, inner, TWO: tl.constexpr, THREE: tl.constexpr, WIDE: tl.constexpr,
    GATED: tl.constexpr, TMA: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps ``first`` to ``last`` of a product of gathered rows; ``index``: those that the first step's tap reads."""
    BK: tl.constexpr = step.shape[0]
    width = tl.cdiv(c1, BK) * BK
    for number in tl.range(first, last):
        a = load_patches(
            own, there, own2, own3, index, valid, tap, begin, step, n_in, c1, c2, taps, TWO, THREE, EVEN_C, WIDE
        )
        at = number * BK if EVEN_C else tap * c1 + begin
        sums, gates = add_products(
            sums, gates, a, weight, tile_n, co, at, column, step, inner, kept, begin + step < c1,
            GATED, TMA, EVEN_C, EVEN_N, PRECISION,
        )  # fmt: skip
        tap, begin = next_step(tap, begin, width, taps, BK)
        # One step ahead: a load whose address waits for another is hardly pipelined.
        index = tl.load(table + min(tap, taps - 1), mask=valid, other=-1)
    return sums, gates


@triton.jit
def add_sources(
    sums, gates, rows, rows2, rows3, rows_stride, rows2_stride, rows3_stride, c1, c2, c3, weight, tile_m, tile_n, place,
    valid, column, kept, first, last, step, co, inner, TWO: tl.constexpr, THREE: tl.constexpr, GATED: tl.constexpr,
    TMA: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps ``first`` to ``last`` of a product of rows as they lie, one source after the other."""
    BK: tl.constexpr = step.shape[0]
    sums, gates = add_rows(
        sums, gates, rows, rows_stride, c1, 0, 0, weight, tile_m, tile_n, place, valid, column, kept, first, last, step,
        co, inner, GATED, TMA, EVEN_C, EVEN_N, PRECISION,
    )  # fmt: skip
    if TWO:
        sums, gates = add_rows(
            sums, gates, rows2, rows2_stride, c2, c1, tl.cdiv(c1, BK), weight, tile_m, tile_n, place, valid, column,
            kept, first, last, step, co, inner, GATED, TMA, EVEN_C, EVEN_N, PRECISION,
        )  # fmt: skip
    if THREE:
        sums, gates = add_rows(
            sums, gates, rows3, rows3_stride, c3, c1 + c2, tl.cdiv(c1, BK) + tl.cdiv(c2, BK), weight, tile_m, tile_n,
            place, valid, column, kept, first, last, step, co, inner, GATED, TMA, EVEN_C, EVEN_N, PRECISION,
        )  # fmt: skip
    return sums, gates
