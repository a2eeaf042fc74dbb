"""One kernel for linear layers and convolutions of active rows.

The rows that an output of a convolution reads are gathered while they are loaded (implicit GEMM): active ones from the
packed input, the others from the recorded map in its place. Few rows leave too few tiles to fill the GPU: then the
inner dimension is split across programs, which add their partial sums together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fisedit.runtime.kernels.activate import ACTIVATIONS, PTX
from fisedit.runtime.kernels.launch import (
    cdiv,
    has_descriptors,
    is_aligned,
    launch,
    multiprocessors,
    overlaps,
    shared_memory,
)
from fisedit.runtime.kernels.multiply_rows.epilogue import (
    finish_shares,
    finish_tile,
    load_columns,
    load_deviation,
    load_residual,
    share_part,
)
from fisedit.runtime.kernels.multiply_rows.steps import add_steps, begin_steps, has_work, tile_at, which_rows
from fisedit.runtime.kernels.share_out import MOST_PARTS, POLLS

TMA = True
NARROWEST, MOST_MOMENTS = 32, 48
"""Columns of a tile, each of which makes a part of its rows' moments, and parts that are loaded at a time."""


@dataclass(frozen=True)
class Config:
    """Tile sizes of a launch: output rows, output channels, inner; and how often the inner dimension is split.

    Args:
        specialized: warps have tasks of their own, see ``specialized.py``.
        turns: groups of them take turns with tiles, too, see ``turns.py``; where rows are not gathered.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int = 1
    specialized: bool = False
    turns: bool = False

    def __str__(self) -> str:
        tile = f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages} /{self.split}"
        return tile + " specialized" * self.specialized + " in turns" * self.turns


@triton.jit
def _multiply_tile(
    given, patches, matrix, before, after, made, residual, residual_stride, partial, locks, polls, row0, where, row,
    plane, sizes, steps, each, ADDRESSES: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    NORM_ACTIVATION: tl.constexpr, PIECE: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr,
    EARLY: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, PAIR: tl.constexpr,
    WIDE: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile, or the steps of it that are this program's, ``each`` of them."""
    SPLIT: tl.constexpr = PIECE > 0
    first, last = 0, steps
    if SPLIT:
        first = tl.program_id(2) * each
        last = min(first + each, steps)
    starts = begin_steps(given, patches, where, row, first, ADDRESSES, SPLIT, PDL, BK)
    if EARLY:
        columns = load_columns(after, where, matrix, GATED, EVEN_N)
        if not SPLIT:
            extra = load_residual(residual, residual_stride, where, matrix, EVEN_N)
    deviation = load_deviation(before, where, plane, PARTS)
    sums, gates = add_steps(
        given, patches, starts, matrix, row0, where, first, last, WIDE, GATED, TMA, EVEN_C, EVEN_N, PRECISION, BM, BN,
        BK,
    )  # fmt: skip
    if not EARLY:
        columns = load_columns(after, where, matrix, GATED, EVEN_N)
    if SPLIT:
        SIZE: tl.constexpr = BM * BN * (2 if GATED else 1)
        number, parts = tl.program_id(2), tl.num_programs(2)
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        part = partial + (tile * parts).to(tl.int64) * SIZE
        shares = share_part(
            part + number * SIZE, locks + tile, sums, gates, columns, deviation, after[1], tl.arange(0, BM), matrix,
            number, parts, polls, GATED,
        )  # fmt: skip
        finish_shares(
            part, parts, shares, columns, made, after, residual, residual_stride, row0, where, tl.arange(0, PIECE),
            matrix, plane, sizes, GATED, ACTIVATION, NORM_ACTIVATION, EVEN_N, patches[1] is not None, PAIR, BM,
        )  # fmt: skip
    else:
        if not EARLY:
            extra = load_residual(residual, residual_stride, where, matrix, EVEN_N)
        finish_tile(
            sums, gates, columns, extra, deviation, made, after, where, matrix, plane, residual is not None, GATED,
            ACTIVATION, NORM_ACTIVATION, EVEN_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_in", "n_out", "batch", "table_stride", "steps", "each", "parts", "polls", "across"])
def _multiply(
    out, normalized, made_moments, rows, rows2, rows3, recorded, sources, weight, bias, center, affine, residual,
    norm_affine, moments, count, partial, locks, n_in, n_out, batch, c1, c2, c3, inner, co, rows_stride, rows2_stride,
    rows3_stride, recorded_stride, residual_stride, table_stride, affine_plane, affine_batch, norm_plane, norm_batch,
    taps, steps, each, parts, polls, across, input_eps,
    ADDRESSES: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, NORM_ACTIVATION: tl.constexpr,
    PIECE: tl.constexpr, EVEN_C: tl.constexpr, EVEN_N: tl.constexpr, EARLY: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr, PAIR: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    given = (rows, rows2, rows3, rows_stride, rows2_stride, rows3_stride, c1, c2, c3)
    patches = (recorded, sources, recorded_stride, table_stride, n_in, taps)
    before = (moments, parts, c1, input_eps)
    after = (bias, center, (affine, affine_plane, affine_batch), (norm_affine, norm_plane, norm_batch))
    made = (out, normalized, made_moments)
    per = tl.load(count)
    plane, sizes = batch.to(tl.int64) * n_out, (per, n_out, batch)
    tile_m, tile_n = tile_at(tl.program_id(0), tl.program_id(1), across)
    row0 = tile_m * BM
    where, row = which_rows(row0, tl.arange(0, BM), per, n_out, batch, sources is not None, PAIR)
    column = tile_n * BN + tl.arange(0, BN)
    matrix = (weight, inner, co, tile_n, column, column < co)
    if has_work(row0, where, per, n_out, batch, sources is not None):
        _multiply_tile(
            given, patches, matrix, before, after, made, residual, residual_stride, partial, locks, polls, row0, where,
            row, plane, sizes, steps, each, ADDRESSES, GATED, ACTIVATION, NORM_ACTIVATION, PIECE, EVEN_C, EVEN_N, EARLY,
            TMA, PRECISION, PDL, PAIR, WIDE, PARTS, BM, BN, BK,
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
    made = rows.new_empty(2, parts, batch, number, dtype=torch.float32) if with_moments else None  # [2, T, B, N']
    moments = None if moments is None or moments.shape[1] == 0 else moments
    _launch(
        config, out, made, rows, rows2, rows3, recorded, sources, weight, bias, affine, residual, norm, moments,
        None if moments is None else center, input_eps, count, locks, activation, gated, positions,
    )  # fmt: skip
    return out if made is None else (out, made)


def _launch(
    config: Config, out: Tensor, made: Tensor | None, rows: Tensor, rows2: Tensor | None, rows3: Tensor | None,
    recorded: Tensor | None, sources: Tensor | None, weight: Tensor, bias: Tensor | None, affine: Tensor | None,
    residual: Tensor | None, norm: tuple[Tensor | None, Tensor | None, str], moments: Tensor | None,
    center: Tensor | None, input_eps: float, count: Tensor, locks: Tensor, activation: str, gated: bool, positions: int,
) -> None:  # fmt: skip
    (batch, n_out, co), (_, n_in, c1), (normalized, norm_affine, norm_activation) = out.shape, rows.shape, norm
    c2, c3 = (0 if more is None else more.shape[2] for more in (rows2, rows3))
    gathers, taps = sources is not None, 1 if sources is None else sources.shape[2]
    addresses = recorded is not None and recorded.dtype == torch.int64
    recorded = recorded if recorded is None or addresses else recorded.contiguous()
    even_c = c1 % config.k == c2 % config.k == c3 % config.k == 0
    assert even_c or rows2 is None or not gathers, "several sources of rows have whole chunks of channels"
    given: list[Any] = [rows, rows2, rows3]
    read = [weight, *(more for more in given if more is not None and not gathers)]
    tma, pdl = TMA and has_descriptors(rows) and all(is_aligned(tensor) for tensor in read), overlaps(rows)
    special = config.specialized and PTX.value and tma and even_c and rows.dtype.itemsize == 2
    turns = special and config.turns and not gathers
    kernel, describe, options = _kernel_of(config, rows, even_c, tma, special, turns, gathers, gated)
    if tma and not gathers:
        given = [None if more is None else describe(more.flatten(0, 1), [config.m, config.k]) for more in given]
    tiles_n, tiles_m = cdiv(co, config.n), cdiv(batch * n_out, config.m)
    steps = cdiv(c1, config.k) * taps + cdiv(c2, config.k) + cdiv(c3, config.k)
    splits = 1 if turns else split_of(config.split, steps, tiles_n * tiles_m, locks.numel())
    across = sum(more.numel() for more in (rows, rows2, rows3) if more is not None) > weight.numel()
    grid = (tiles_n, tiles_m, splits) if across else (tiles_m, tiles_n, splits)
    if turns:
        grid = (min(cdiv(tiles_n, 1 if gated else 2) * tiles_m, multiprocessors(rows.device)), 1, 1)
    size = config.m * config.n * (2 if gated else 1)
    piece = max(8, config.m // (2 if config.m * config.n <= 4096 else 4))  # rows of which registers hold some parts
    partial = torch.empty(
        tiles_n * tiles_m * splits * size if splits > 1 else 1, dtype=torch.float32, device=rows.device
    )
    launch(kernel, grid,
        out, normalized, made, *given, recorded, sources, describe(weight, [config.n, config.k]) if tma else weight,
        bias, center, affine, residual, norm_affine, moments, count, partial, locks, n_in, n_out, batch, c1, c2, c3,
        weight.shape[1], co, _stride(rows, 1), _stride(rows2, 1), _stride(rows3, 1),
        0 if addresses else _stride(recorded, 0), _stride(residual, 1),
        sources.stride(0) if sources is not None and len(sources) > 1 else 0,
        _stride(affine, 0), _stride(affine, 1), _stride(norm_affine, 0), _stride(norm_affine, 1), taps, steps,
        cdiv(steps, splits), 0 if moments is None else moments.shape[1],
        POLLS if tiles_n * tiles_m * splits <= multiprocessors(rows.device) else 0, int(across), input_eps,
        ADDRESSES=addresses, GATED=gated, ACTIVATION=ACTIVATIONS[activation],
        NORM_ACTIVATION=ACTIVATIONS[norm_activation], PIECE=piece if splits > 1 else 0,
        EVEN_N=co % config.n == 0, PDL=pdl, PAIR=batch <= 2, WIDE=(n_in + 16 * positions) * c1 >= 2**31,
        BM=config.m, BN=config.n, BK=config.k, num_warps=config.warps,
        **options, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _kernel_of(
    config: Config, rows: Tensor, even_c: bool, tma: bool, special: bool, turns: bool, gathers: bool, gated: bool
) -> tuple[Any, Callable[..., Any], dict[str, Any]]:
    """The kernel of a tile, what makes descriptors for it, and what else it needs to be launched.

    Where warps cannot have tasks of their own, a tile is computed as others are: by the interpreter, of rows that no
    descriptor reaches, of channels that are no whole steps, in single precision.
    """
    if special:
        from fisedit.runtime.kernels.multiply_rows import specialized
        from fisedit.runtime.kernels.multiply_rows.turns import REGISTERS, multiply_in_turns

        if turns:
            return multiply_in_turns, specialized.describe, {"STAGES": config.stages, "maxnreg": REGISTERS}
        wide = config.n * (2 if gated else 1)
        options = specialized.resources(config.m, wide, config.k, config.warps, config.stages, gathers)
        return specialized.multiply_specialized, specialized.describe, options
    options = {
        "EVEN_C": even_c, "TMA": tma, "PRECISION": "ieee" if rows.dtype == torch.float32 else "tf32",
        "EARLY": config.m * config.n <= 8192 and config.warps == 4,
        "PARTS": min(cdiv(rows.shape[2], NARROWEST), MOST_MOMENTS), "num_stages": config.stages,
    }  # fmt: skip
    return _multiply, TensorDescriptor.from_tensor, options


def split_of(wanted: int, steps: int, tiles: int, locks: int) -> int:
    """How many programs share each tile: none without work, and none without a lock."""
    splits = min(wanted, MOST_PARTS, steps, locks // tiles if tiles > locks else wanted)
    return cdiv(steps, cdiv(steps, splits)) if splits > 1 else 1


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
    """A tile for a product of ``rows x inner x columns`` by rule, as deep as the GPU's shared memory holds.

    Args:
        rows, columns, inner: of the product. chunk: channels that are read in one piece.
    """
    tile = _choose(rows, columns, inner, chunk, gated, gathered, dtype)
    step = (tile.m + tile.n * (2 if gated else 1)) * tile.k * dtype.itemsize
    return replace(tile, stages=min(tile.stages, shared_memory() // step))


def _choose(rows: int, columns: int, inner: int, chunk: int, gated: bool, gathered: bool, dtype: torch.dtype) -> Config:
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
