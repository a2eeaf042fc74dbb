"""What the steps of a product multiply: rows, as they lie or gathered, and weights.

Arguments that belong together come as tuples, as ``_multiply`` in ``triton.py`` makes them:

- ``given``: the three sources of rows, their strides, and their channels;
- ``patches``: the recorded map, the table of gathered rows, ``None`` if they lie side by side, the strides of both, the
  input's rows and the taps;
- ``matrix``: the weights, their rows' length, their rows (of one half, if gated), and in this tile which rows they are,
  by number of the tile and of each column, and which of them there are;
- ``where``: of a tile's rows the place of each in the result, its sample, and whether there is one; the first and the
  last sample.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sample_of(row, per, PAIR: tl.constexpr):
    """Which sample each row is of: of one or two, without a division."""
    return (row >= per).to(tl.int32) if PAIR else row // per


@triton.jit
def which_rows(first, inside, per, n_out, batch, GATHER: tl.constexpr, PAIR: tl.constexpr):
    """The output rows ``inside`` those from ``first`` on: ``where``, and the number of each in its sample.

    Gathered rows follow one another without the padding of samples; others keep it, to be read in one piece.
    """
    own_per = per if GATHER else n_out  # rows from one sample to the next
    row = first + inside
    valid = row < own_per * batch
    row = tl.where(valid, row, 0)
    sample = sample_of(row, own_per, PAIR)
    row -= sample * own_per
    valid &= row < per
    end = tl.minimum(first + inside.shape[0], own_per * batch)
    lowest, highest = sample_of(first, own_per, PAIR), sample_of(end - 1, own_per, PAIR)
    return (sample * n_out + row, sample, valid, lowest, highest), row


@triton.jit
def has_work(first, where, per, n_out, batch, GATHER: tl.constexpr):
    """Whether any row of a tile is more than padding; ``first``: its first one."""
    own_per = per if GATHER else n_out
    within_one = (first - where[3] * own_per >= per) & (where[3] == where[4])
    return (first < own_per * batch) & (within_one == 0)


@triton.jit
def tile_at(place, line, across):
    """Which tile of rows and which of columns is the ``place``-th of a ``line``: of the same rows if ``across``, or
    else of the same weights. What one program reads is in L2 for those beside it."""
    return tl.where(across > 0, line, place), tl.where(across > 0, place, line)


@triton.jit
def working_tiles(per, n_out, batch, BM: tl.constexpr):
    """How many tiles of rows that keep their padding are more than that."""
    total, behind = 0, 0
    for sample in range(batch):
        begin, end = tl.maximum(sample * n_out // BM, behind), (sample * n_out + per - 1) // BM + 1
        total += tl.maximum(end - begin, 0)
        behind = tl.maximum(behind, end)
    return total


@triton.jit
def working_tile(number, per, n_out, batch, BM: tl.constexpr):
    """The ``number``-th of them."""
    tile, behind = number, 0
    for sample in range(batch):
        tile += tl.where(tile >= behind, tl.maximum(sample * n_out // BM - behind, 0), 0)
        behind = tl.maximum(behind, (sample * n_out + per - 1) // BM + 1)
    return tile


@triton.jit
def load_weight(matrix, half, at, step, within, TMA: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr):
    """The tile ``[BK, BN]`` from channel ``at`` on; of a gate if ``half`` is how many rows come before its own."""
    weight, inner, _, tile_n, column, kept = matrix
    if TMA:  # past the channels of a tap it has the next one's, which meet zeros
        tile = weight.load([half + tile_n * column.shape[0], at]).T
    else:
        where = weight + (half + column)[None, :].to(tl.int64) * inner + (at + step)[:, None]
        if EVEN_C and EVEN_N:
            tile = tl.load(where)
        elif EVEN_C:
            tile = tl.load(where, mask=kept[None, :], other=0.0)
        else:
            tile = tl.load(where, mask=kept[None, :] & within[:, None], other=0.0)
    return tile


@triton.jit
def add_products(
    sums, gates, a, matrix, at, step, within,
    GATED: tl.constexpr, TMA: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add those of the rows ``a`` ``[BM, BK]`` and the weights from channel ``at`` on; of a gate, with its own."""
    w = load_weight(matrix, 0, at, step, within, TMA, EVEN_C, EVEN_N)
    sums = tl.dot(a, w, sums, input_precision=PRECISION)
    if GATED:
        w = load_weight(matrix, matrix[2], at, step, within, TMA, EVEN_C, EVEN_N)
        gates = tl.dot(a, w, gates, input_precision=PRECISION)
    return sums, gates


@triton.jit
def add_rows(
    sums, gates, rows, stride, channels, before, skipped, matrix, row0, where, first, last, step,
    GATED: tl.constexpr, TMA: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps ``first`` to ``last`` of a product, as far as they are of ``rows``, whose ``channels`` come behind
    ``before`` others, which are ``skipped`` steps."""
    BK: tl.constexpr = step.shape[0]
    place, _, valid, _, _ = where
    if not TMA:
        start = rows + place.to(tl.int64) * stride
    for number in tl.range(tl.maximum(first - skipped, 0), tl.minimum(last - skipped, tl.cdiv(channels, BK))):
        begin = number * BK
        within = begin + step < channels
        if TMA:
            a = rows.load([row0, begin])
        else:
            a = tl.load(start[:, None] + (begin + step)[None, :], mask=valid[:, None] & within[None, :], other=0.0)
        sums, gates = add_products(
            sums, gates, a, matrix, before + begin, step, within, GATED, TMA, EVEN_C, EVEN_N, PRECISION
        )
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
def find_patches(given, patches, where, row, first, ADDRESSES: tl.constexpr, SPLIT: tl.constexpr, BK: tl.constexpr):
    """Where the steps of gathered rows begin: tap and channel, the tables of outputs and what the tap reads, and where
    the packed and the recorded rows lie, and the outputs' own in the other sources."""
    rows, rows2, rows3, _, rows2_stride, rows3_stride, c1, c2, _ = given
    recorded, sources, recorded_stride, table_stride, n_in, taps = patches
    place, sample, valid, _, _ = where
    tap, begin = 0, 0
    if SPLIT:
        tap, begin = first_step(first, tl.cdiv(c1, BK) * BK, taps, BK)
    table = sources + sample * table_stride + row * taps
    index = tl.load(table + min(tap, taps - 1), mask=valid, other=-1)
    own = rows + (sample * n_in).to(tl.int64) * c1
    there = own
    if recorded is not None:
        there = recorded_rows(rows, recorded, sample, recorded_stride, ADDRESSES) - n_in.to(tl.int64) * c1
    own2, own3 = own, own
    if rows2 is not None:
        own2 = rows2 + place.to(tl.int64) * rows2_stride
    if rows3 is not None:
        own3 = rows3 + place.to(tl.int64) * rows3_stride - c2
    return tap, begin, table, index, own, there, own2, own3


@triton.jit
def next_step(tap, begin, width, taps, BK: tl.constexpr):
    begin += BK
    over = (begin >= width) & (tap < taps)
    return tap + over.to(tl.int32), tl.where(over, 0, begin)


@triton.jit
def tap_rows(given, found, index, valid, tap, begin, n_in, taps, WIDE: tl.constexpr):
    """Where the rows lie that a tap reads, or the outputs' own behind the taps: in which memory each, at which place
    there, and whether there is one."""
    _, rows2, rows3, _, _, _, c1, c2, _ = given
    own, there, own2, own3 = found
    start, wanted = tl.where(index < n_in, own, there), index >= 0
    inside = (index.to(tl.int64) if WIDE else index) * c1
    if rows2 is not None:
        behind = tap == taps
        wanted = tl.where(behind, valid, wanted)
        inside = tl.where(behind, 0, inside)
        start = tl.where(behind, own2, start)
        if rows3 is not None:
            start = tl.where(behind & (begin >= c2), own3, start)
    return start, inside, wanted


@triton.jit
def load_patches(given, found, index, valid, tap, begin, step, n_in, taps, EVEN_C: tl.constexpr, WIDE: tl.constexpr):
    """What a step multiplies, ``[BM, BK]``: some channels of the rows that a tap reads, or of those behind the taps."""
    start, inside, wanted = tap_rows(given, found, index, valid, tap, begin, n_in, taps, WIDE)
    wanted = wanted[:, None] if EVEN_C else wanted[:, None] & (begin + step < given[6])[None, :]
    return tl.load(start[:, None] + (inside[:, None] + (begin + step)[None, :]), mask=wanted, other=0.0)


@triton.jit
def add_patches(
    sums, gates, given, patches, starts, matrix, where, first, last, step, WIDE: tl.constexpr,
    GATED: tl.constexpr, TMA: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps ``first`` to ``last`` of a product of gathered rows; ``starts``: from :func:`find_patches`."""
    BK: tl.constexpr = step.shape[0]
    c1, n_in, taps, valid = given[6], patches[4], patches[5], where[2]
    tap, begin, table, index, own, there, own2, own3 = starts
    width = tl.cdiv(c1, BK) * BK
    for number in tl.range(first, last):
        found = (own, there, own2, own3)
        a = load_patches(given, found, index, valid, tap, begin, step, n_in, taps, EVEN_C, WIDE)
        at = number * BK if EVEN_C else tap * c1 + begin
        sums, gates = add_products(
            sums, gates, a, matrix, at, step, begin + step < c1, GATED, TMA, EVEN_C, EVEN_N, PRECISION
        )
        tap, begin = next_step(tap, begin, width, taps, BK)
        # One step ahead: a load whose address waits for another is hardly pipelined.
        index = tl.load(table + min(tap, taps - 1), mask=valid, other=-1)
    return sums, gates


@triton.jit
def add_sources(
    sums, gates, given, matrix, row0, where, first, last, step,
    GATED: tl.constexpr, TMA: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps ``first`` to ``last`` of a product of rows as they lie, one source after the other."""
    BK: tl.constexpr = step.shape[0]
    rows, rows2, rows3, rows_stride, rows2_stride, rows3_stride, c1, c2, c3 = given
    sums, gates = add_rows(
        sums, gates, rows, rows_stride, c1, 0, 0, matrix, row0, where, first, last, step,
        GATED, TMA, EVEN_C, EVEN_N, PRECISION,
    )  # fmt: skip
    if rows2 is not None:
        sums, gates = add_rows(
            sums, gates, rows2, rows2_stride, c2, c1, tl.cdiv(c1, BK), matrix, row0, where, first, last, step,
            GATED, TMA, EVEN_C, EVEN_N, PRECISION,
        )  # fmt: skip
    if rows3 is not None:
        sums, gates = add_rows(
            sums, gates, rows3, rows3_stride, c3, c1 + c2, tl.cdiv(c1, BK) + tl.cdiv(c2, BK), matrix, row0, where,
            first, last, step, GATED, TMA, EVEN_C, EVEN_N, PRECISION,
        )  # fmt: skip
    return sums, gates


@triton.jit
def begin_steps(
    given, patches, where, row, first, ADDRESSES: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """What :func:`add_steps` starts with, from step ``first`` on; and wait for the kernel before: only tables and
    addresses are no kernel's work."""
    starts = first
    if patches[1] is not None:
        starts = find_patches(given, patches, where, row, first, ADDRESSES, SPLIT, BK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    return starts


@triton.jit
def add_steps(
    given, patches, starts, matrix, row0, where, first, last, WIDE: tl.constexpr, GATED: tl.constexpr,
    TMA: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The sums of a tile over steps ``first`` to ``last``, and those of its gates: ``[BM, BN]``."""
    sums, gates, step = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32), tl.arange(0, BK)
    if patches[1] is not None:
        sums, gates = add_patches(
            sums, gates, given, patches, starts, matrix, where, first, last, step, WIDE, GATED, TMA, EVEN_C, EVEN_N,
            PRECISION,
        )  # fmt: skip
    else:
        sums, gates = add_sources(
            sums, gates, given, matrix, row0, where, first, last, step, GATED, TMA, EVEN_C, EVEN_N, PRECISION
        )
    return sums, gates
