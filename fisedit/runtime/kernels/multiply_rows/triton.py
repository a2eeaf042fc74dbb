"""One kernel for linear layers and convolutions of active rows.

The rows that an output reads are gathered while they are loaded (implicit GEMM): active ones from the packed input,
the others from the recorded map in its place. Few rows leave too few tiles to fill the GPU: then the inner dimension is
split across programs, and the last to arrive adds their partial sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fisedit.runtime.kernels.activate import ACTIVATIONS
from fisedit.runtime.kernels.launch import cdiv, launch, next_power_of_2, overlaps
from fisedit.runtime.kernels.multiply_rows.epilogue import add_parts, deviation, finish_tile, is_last, load_moments
from fisedit.runtime.kernels.multiply_rows.steps import (
    first_step,
    load_rows,
    load_weight,
    next_step,
    row_starts,
    weight_of,
)
from fisedit.runtime.kernels.prefetch import prefetch, prefetched

TMA = True


@dataclass(frozen=True)
class Config:
    """Tile sizes of a launch: output rows, output channels, inner; and how often the inner dimension is split.

    ``staged``: rows wait for their turn in registers, one step ahead, not in shared memory. They come through L1, where
    the taps of a convolution find them again, and more programs fit on a multiprocessor; but products wait for them.
    ``registers``: of a thread, at most.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int = 1
    staged: bool = False
    registers: int | None = None

    def __str__(self) -> str:
        how = f"{' staged' * self.staged}{f' r{self.registers}' if self.registers else ''}"
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}{how} /{self.split}"


@triton.jit
def _sample_of(row, per, PAIR: tl.constexpr):
    """Which sample each row is of: of one or two, without a division."""
    return (row >= per).to(tl.int32) if PAIR else row // per


@triton.jit(do_not_specialize=["n_in", "n_out", "batch", "table_stride", "steps", "each", "parts", "ahead_size"])
def _multiply(
    out, rows, rows2, rows3, recorded, sources, weight, bias, affine, residual, normalized, norm_affine, moments,
    center, made_moments, count, partial, locks, ahead, ahead_size, n_in, n_out, batch, c1, c2, inner, co, rows_stride,
    rows2_stride, rows3_stride, recorded_stride, residual_stride, table_stride, affine_plane, affine_batch, norm_plane,
    norm_batch, taps, steps, each, parts, input_eps,
    GATHER: tl.constexpr, ADDRESSES: tl.constexpr, TWO: tl.constexpr, THREE: tl.constexpr, BIAS: tl.constexpr,
    AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    NORM_ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, STAGED: tl.constexpr,
    EVEN_C: tl.constexpr, EVEN_N: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    PAIR: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    BY_TAP: tl.constexpr = not STAGED
    per = tl.load(count)
    total = per * batch
    tile_n, tile_m = tl.program_id(0), tl.program_id(1)
    if tile_m * BM >= total:
        return
    row = tile_m * BM + tl.arange(0, BM)
    valid = row < total
    sample = _sample_of(tl.where(valid, row, 0), per, PAIR)
    row = tl.where(valid, row, 0) - sample * per
    column = tile_n * BN + tl.arange(0, BN)
    kept = column < co
    step = tl.arange(0, BK)
    first, last = 0, steps
    if SPLIT:
        first = tl.program_id(2) * each
        last = min(first + each, steps)

    # Tables and addresses are no kernel's work: they need not be waited for.
    width = tl.cdiv(c1, BK) * BK
    tap, begin = 0, 0
    if SPLIT:
        tap, begin = first_step(first, width, taps, BK, BY_TAP, GATHER or TWO)
    place = sample * n_out + row
    own, there, own2, own3 = row_starts(
        rows, rows2, rows3, recorded, sample, row, place, n_in, c1, c2, rows_stride, rows2_stride, rows3_stride,
        recorded_stride, GATHER, ADDRESSES, TWO, THREE,
    )  # fmt: skip
    index = row
    if GATHER:
        table = sources + sample * table_stride + row * taps
        index = tl.load(table + min(tap, taps - 1), mask=valid, other=-1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    plane = batch.to(tl.int64) * n_out
    if moments is not None:  # loaded now, needed at the end
        of_sums, of_squares = load_moments(moments, place, valid, parts, plane, PARTS)
    sums = tl.zeros((BM, BN), tl.float32)
    gates = tl.zeros((BM, BN), tl.float32)
    at = weight_of(tap, begin, c1, width, taps, TWO)
    if STAGED:
        a = load_rows(own, there, own2, own3, index, valid, tap, begin, step, n_in, c1, c2, width, taps,
                       GATHER, TWO, THREE, EVEN_C, WIDE, BY_TAP)  # fmt: skip
        tap, begin = next_step(tap, begin, width, taps, BK, BY_TAP, GATHER or TWO)
        if GATHER:
            index = tl.load(table + min(tap, taps - 1), mask=valid, other=-1)
    for number in tl.range(first, last):
        if not STAGED:
            a = load_rows(own, there, own2, own3, index, valid, tap, begin, step, n_in, c1, c2, width, taps,
                           GATHER, TWO, THREE, EVEN_C, WIDE, BY_TAP)  # fmt: skip
            at = number * BK if EVEN_C else tap * c1 + begin
        elif not (GATHER or TWO):
            at = number * BK
        real = begin + step < c1
        w = load_weight(weight, tile_n * BN, at, column, step, inner, kept, real, TMA, EVEN_C, EVEN_N)
        sums = tl.dot(a, w, sums, input_precision=PRECISION)
        if GATED:
            w = load_weight(weight, co + tile_n * BN, at, co + column, step, inner, kept, real, TMA, EVEN_C, EVEN_N)
            gates = tl.dot(a, w, gates, input_precision=PRECISION)
        if STAGED:
            more = valid & (number + 1 < last)
            if GATHER:
                index = tl.where(more, index, -1)
            a = load_rows(own, there, own2, own3, index, more, tap, begin, step, n_in, c1, c2, width, taps,
                           GATHER, TWO, THREE, EVEN_C, WIDE, BY_TAP)  # fmt: skip
            at = weight_of(tap, begin, c1, width, taps, TWO)
        tap, begin = next_step(tap, begin, width, taps, BK, BY_TAP, GATHER or TWO)
        if GATHER:  # one step ahead: a load whose address waits for another is hardly pipelined
            index = tl.load(table + min(tap, taps - 1), mask=valid, other=-1)
    tile = tile_m * tl.num_programs(0) + tile_n
    splits = tl.num_programs(2)
    if PDL:
        prefetch(ahead, ahead_size, tile * splits + tl.program_id(2), tl.cdiv(total, BM) * tl.num_programs(0) * splits)

    if SPLIT:
        SIZE: tl.constexpr = BM * BN * (2 if GATED else 1)
        partial += (tile * splits).to(tl.int64) * SIZE
        inside = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        if not is_last(partial, locks + tile, sums, gates, inside, splits, GATED, SIZE, BM * BN):
            return
        sums = add_parts(partial, splits, inside, BM, BN, SIZE)
        if GATED:
            gates = add_parts(partial + BM * BN, splits, inside, BM, BN, SIZE)

    mean, rstd = sample, sample
    if moments is not None:
        mean, rstd = deviation(of_sums, of_squares, c1, input_eps)
    lowest = _sample_of(tile_m * BM, per, PAIR)
    highest = _sample_of(min(tile_m * BM + BM, total) - 1, per, PAIR)
    finish_tile(
        sums, gates, out, bias, affine, residual, normalized, norm_affine, center, made_moments, mean, rstd, sample,
        lowest, highest, place, valid, column, tile_n, co, plane, residual_stride, affine_plane, affine_batch,
        norm_plane, norm_batch, BIAS, AFFINE, RESIDUAL, GATED, ACTIVATION, NORM_ACTIVATION, EVEN_N,
    )  # fmt: skip


def multiply_rows(
    rows: Tensor,
    rows2: Tensor | None,
    recorded: Tensor | None,
    sources: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    affine: Tensor | None,
    full: bool,
    residual: Tensor | None,
    count: Tensor,
    locks: Tensor,
    activation: str,
    gated: bool,
    positions: int,
    rows3: Tensor | None = None,
    prefetch: Tensor | None = None,
    moments: Tensor | None = None,
    center: Tensor | None = None,
    input_eps: float = 0.0,
    config: Config | None = None,
    norm: tuple[Tensor | None, Tensor | None, str] = (None, None, "none"),
    with_moments: bool = False,
) -> Any:
    """See the reference.

    Args:
        norm: where the rows go once more, normalized with this affine, and activated.
        with_moments: return the moments of the rows beside them, one part for each tile of the channels.
    """
    rows = _plain(rows) if sources is None else rows.contiguous()
    rows2, rows3, residual = (None if given is None else _plain(given) for given in (rows2, rows3, residual))
    batch, number = rows.shape[0], rows.shape[1] if sources is None else sources.shape[1]
    co = weight.shape[0] // (2 if gated else 1)
    chunk = math.gcd(*(given.shape[2] for given in (rows, rows2, rows3) if given is not None))
    config = config or choose(batch * number, co, weight.shape[1], chunk, gated, sources is not None, rows.dtype)
    if full:
        affine, activation = None, activation if gated else "none"
    out = rows.new_empty(batch, number, co)  # [B, N', Co]
    parts = cdiv(co, config.n)
    made = rows.new_empty(2, batch, number, parts, dtype=torch.float32) if with_moments else None  # [2, B, N', T]
    moments = None if moments is None or moments.shape[3] == 0 else moments
    _launch(
        config, out, made, rows, rows2, rows3, recorded, sources, weight, bias, affine, residual, norm, moments,
        None if moments is None else center, input_eps, count, locks, prefetch, activation, gated, positions,
    )  # fmt: skip
    return out if made is None else (out, made)


def _launch(
    config: Config, out: Tensor, made: Tensor | None, rows: Tensor, rows2: Tensor | None, rows3: Tensor | None,
    recorded: Tensor | None, sources: Tensor | None, weight: Tensor, bias: Tensor | None, affine: Tensor | None,
    residual: Tensor | None, norm: tuple[Tensor | None, Tensor | None, str], moments: Tensor | None,
    center: Tensor | None, input_eps: float, count: Tensor, locks: Tensor, ahead: Tensor | None, activation: str,
    gated: bool, positions: int,
) -> None:  # fmt: skip
    (batch, n_out, co), (_, n_in, c1), (normalized, norm_affine, norm_activation) = out.shape, rows.shape, norm
    c2, c3 = (0 if more is None else more.shape[2] for more in (rows2, rows3))
    taps = 1 if sources is None else sources.shape[2]
    tiles_n, tiles_m = cdiv(co, config.n), cdiv(batch * n_out, config.m)
    steps = cdiv(c1, config.k) * taps + cdiv(c2 + c3, config.k)
    splits = _splits(config.split, steps, tiles_n * tiles_m, locks.numel())
    size = config.m * config.n * (2 if gated else 1)
    partial = torch.empty(
        tiles_n * tiles_m * splits * size if splits > 1 else 1, dtype=torch.float32, device=rows.device
    )
    addresses = recorded is not None and recorded.dtype == torch.int64
    recorded = recorded if recorded is None or addresses else recorded.contiguous()
    parts = 0 if moments is None else moments.shape[3]
    pdl = overlaps(rows)
    even_c = c1 % config.k == c2 % config.k == c3 % config.k == 0
    assert even_c or rows2 is None, "several sources of rows have whole chunks of channels"
    tma = TMA and pdl and weight.stride(0) * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
    packed = TensorDescriptor(weight, [*weight.shape], [*weight.stride()], [config.n, config.k]) if tma else weight
    launch(_multiply, (tiles_n, tiles_m, splits),
        out, rows, _or(rows2, rows), _or(rows3, rows), _or(recorded, rows), _or(sources, locks), packed,
        _or(bias, rows), _or(affine, rows), _or(residual, rows), normalized, norm_affine, moments, center, made, count,
        partial, locks, *prefetched(ahead, rows), n_in, n_out, batch, c1, c2, weight.shape[1], co,
        _stride(rows, 1), _stride(rows2, 1), _stride(rows3, 1), 0 if addresses else _stride(recorded, 0),
        _stride(residual, 1), sources.stride(0) if sources is not None and len(sources) > 1 else 0,
        _stride(affine, 0), _stride(affine, 1), _stride(norm_affine, 0), _stride(norm_affine, 1), taps, steps,
        cdiv(steps, splits), parts, input_eps,
        GATHER=sources is not None, ADDRESSES=addresses, TWO=rows2 is not None, THREE=rows3 is not None,
        BIAS=bias is not None, AFFINE=affine is not None, RESIDUAL=residual is not None, GATED=gated,
        ACTIVATION=ACTIVATIONS[activation], NORM_ACTIVATION=ACTIVATIONS[norm_activation], PAIR=batch <= 2,
        WIDE=(n_in + 16 * positions) * c1 >= 2**31, PARTS=next_power_of_2(max(parts, cdiv(c1, 64))),
        EVEN_C=even_c, EVEN_N=co % config.n == 0, PRECISION="ieee" if rows.dtype == torch.float32 else "tf32",
        # Staged, the channels of weights would be masked of a step that is not at hand.
        SPLIT=splits > 1, STAGED=config.staged and even_c, TMA=tma, PDL=pdl, BM=config.m, BN=config.n, BK=config.k,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _splits(wanted: int, steps: int, tiles: int, locks: int) -> int:
    """How many programs share a tile: none without work, and none without a lock."""
    splits = min(wanted, steps, locks // tiles if tiles > locks else wanted)
    return cdiv(steps, cdiv(steps, splits)) if splits > 1 else 1


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _stride(tensor: Tensor | None, dimension: int) -> int:
    return 0 if tensor is None else tensor.stride(dimension)


def _plain(rows: Tensor) -> Tensor:
    """Rows whose samples follow one another, each row in one piece."""
    fits = rows.stride(2) == 1 and rows.stride(0) == rows.shape[1] * rows.stride(1)
    return rows if fits else rows.contiguous()


SMALL = Config(16, 32, 32, 4, 2)
PROCESSORS = 132
"""Multiprocessors of the GPU that the rule was made on (H100)."""


def choose(rows: int, columns: int, inner: int, chunk: int, gated: bool, gathered: bool, dtype: torch.dtype) -> Config:
    """A tile for a product of ``rows x inner x columns`` by rule.

    Args:
        rows, columns, inner: of the product. chunk: channels that are read in one piece.
    """
    if dtype == torch.float32 or inner < 64:
        return SMALL if inner < 64 else Config(32, 64, 32, 4, 3)
    if gated:
        tile = Config(32, 128, 64, 4, 6) if rows <= 128 else Config(128, 64, 64, 8, 6)
        return tile if rows <= 512 else Config(128, 128, 64, 8, 4)
    if rows <= 48:
        tile = Config(32, 64, 128, 4, 6) if chunk % 128 == 0 else Config(32, 64, 64, 4, 6)
    elif not gathered and rows <= 512:
        tile = Config(64, 64, 128, 4, 4) if chunk % 128 == 0 else Config(64, 64, 64, 4, 7)
    elif chunk % 128 == 0 and gathered:
        tile = Config(128, 64, 128, 4, 4)
    elif gathered and rows <= 3072:
        tile = Config(128, 64, 64, 4, 6) if rows <= 1536 else Config(64, 128, 64, 4, 6)
    else:
        tile = Config(128, 128, 64, 8, 4)
    tiles = -(-rows // tile.m) * -(-columns // tile.n)
    splits = PROCESSORS // tiles if tiles <= PROCESSORS // 2 else 2 * PROCESSORS // tiles if tiles < 100 else 1
    return replace(tile, split=max(1, min(splits, inner // tile.k // 6)))
