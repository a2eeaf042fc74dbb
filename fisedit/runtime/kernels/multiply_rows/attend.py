"""A linear layer whose rows attend to a text: the queries, and what they find, in one kernel.

A text has few keys: what its attention takes by itself is mostly the start of a kernel, and the queries' way through
memory. A tile has the columns of one head, so that all that its rows ask for is at hand when they are multiplied.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fisedit.runtime.kernels.activate import PTX
from fisedit.runtime.kernels.launch import cdiv, has_descriptors, is_aligned, launch, next_power_of_2, overlaps
from fisedit.runtime.kernels.multiply_rows.epilogue import follow_columns, load_columns, load_deviation
from fisedit.runtime.kernels.multiply_rows.steps import add_steps, begin_steps, has_work, tile_at, which_rows
from fisedit.runtime.kernels.multiply_rows.triton import MOST_MOMENTS, NARROWEST, Config

LOG2_E = 1.4426950408889634
FEWEST, BLOCK = 16, 64
"""Keys of a block, where warps have tasks of their own: shared memory has powers of two, products multiples of 16."""


@triton.jit
def _attend_text(queries, text, sample, column, keys, PRECISION: tl.constexpr):
    """What queries ``[BM, D]`` find in the text of one sample; ``keys``: their numbers, up to a power of two."""
    key, value, key_batch, key_row, value_batch, value_row, length, scale = text
    inside = keys < length
    own_key, own_value = key + sample * key_batch.to(tl.int64), value + sample * value_batch.to(tl.int64)
    k = tl.load(own_key + (keys[:, None] * key_row + column[None, :]), mask=inside[:, None], other=0.0)
    v = tl.load(own_value + (keys[:, None] * value_row + column[None, :]), mask=inside[:, None], other=0.0)
    logits = tl.dot(queries, tl.trans(k), input_precision=PRECISION)  # [BM, L]
    logits = tl.where(inside[None, :], logits * scale, float("-inf"))
    weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
    found = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)  # [BM, D]
    return found / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=["n_out", "batch", "steps", "parts", "across", "length"])
def _multiply_attend(
    out, rows, weight, bias, center, moments, key, value, count, n_out, batch, c1, co, rows_stride, steps, parts,
    across, input_eps, key_batch, key_row, value_batch, value_row, length, scale,
    EVEN_C: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, PAIR: tl.constexpr,
    PARTS: tl.constexpr, KEYS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    given = (rows, None, None, rows_stride, 0, 0, c1, 0, 0)
    patches = (None, None, 0, 0, n_out, 1)
    text = (key, value, key_batch, key_row, value_batch, value_row, length, scale)
    per = tl.load(count)
    tile_m, tile_n = tile_at(tl.program_id(0), tl.program_id(1), across)
    row0 = tile_m * BM
    where, row = which_rows(row0, tl.arange(0, BM), per, n_out, batch, False, PAIR)
    place, sample_of_row, valid, lowest, highest = where
    column = tile_n * BN + tl.arange(0, BN)
    matrix = (weight, c1, co, tile_n, column, column < co)
    if has_work(row0, where, per, n_out, batch, False):
        starts = begin_steps(given, patches, where, row, 0, False, False, PDL, BK)
        after = (bias, center, (None, 0, 0), (None, 0, 0))
        columns = load_columns(after, where, matrix, False, True)
        plane = batch.to(tl.int64) * n_out
        deviation = load_deviation((moments, parts, c1, input_eps), where, plane, PARTS)
        sums, _ = add_steps(
            given, patches, starts, matrix, row0, where, 0, steps, False, False, TMA, EVEN_C, True, PRECISION, BM, BN,
            BK,
        )  # fmt: skip
        sums = follow_columns(sums, deviation, columns[2], columns[0], center is not None, bias is not None)
        queries = sums.to(out.dtype.element_ty)
        at = out + (place.to(tl.int64)[:, None] * co + column[None, :])
        for sample in tl.range(lowest, highest + 1, num_stages=1):
            found = _attend_text(queries, text, sample, column, tl.arange(0, KEYS), PRECISION)
            own = valid & (sample_of_row == sample)
            tl.store(at, found.to(out.dtype.element_ty), mask=own[:, None])


def multiply_attend(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    moments: Tensor | None,
    center: Tensor | None,
    input_eps: float,
    count: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float | None,
    config: Config,
) -> Tensor:
    """What rows ``[B, N, C]``, multiplied to queries, find in a text: the contract of ``multiply_attend_rows`` for
    linear layers of one source, heads of 16 to 128 channels, a power of two, and at most 128 keys.

    Args:
        key, value: ``[B, L, h*d]``, the last dimension contiguous; no kernel of the same graph makes them.
        config: a tile as wide as a head, its work not split.
    """
    rows = rows if rows.stride(2) == 1 and rows.stride(0) == rows.shape[1] * rows.stride(1) else rows.contiguous()
    ready = key.stride(2) == value.stride(2) == 1  # else a kernel makes them after all
    key, value = (given if given.stride(2) == 1 else given.contiguous() for given in (key, value))
    (batch, number, channels), (width, _) = rows.shape, weight.shape
    moments = None if moments is None or moments.shape[1] == 0 else moments
    out = rows.new_empty(batch, number, width)  # [B, N, h*d]
    even_c, pdl = channels % config.k == 0, overlaps(rows)
    tma = has_descriptors(rows) and is_aligned(rows) and is_aligned(weight)
    special = config.specialized and PTX.value and tma and even_c and ready and rows.dtype.itemsize == 2
    kernel, describe, options = _kernel_of(config, rows, key, even_c, tma, special)
    read, table = rows, weight
    if tma:
        read = describe(rows.flatten(0, 1), [config.m, config.k])
        table = describe(weight, [config.n, config.k])
    tiles_m, across = cdiv(batch * number, config.m), rows.numel() > weight.numel()
    head_dim = width // heads
    launch(kernel, (heads, tiles_m, 1) if across else (tiles_m, heads, 1),
        out, read, table, bias, None if moments is None else center, moments, key, value, count, number, batch,
        channels, width, rows.stride(1), cdiv(channels, config.k), 0 if moments is None else moments.shape[1],
        int(across), input_eps, key.stride(0), key.stride(1), value.stride(0), value.stride(1), key.shape[1],
        (head_dim**-0.5 if scale is None else scale) * LOG2_E,
        PDL=pdl, PAIR=batch <= 2, BM=config.m, BN=config.n, BK=config.k, num_warps=config.warps,
        **options, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def _kernel_of(
    config: Config, rows: Tensor, key: Tensor, even_c: bool, tma: bool, special: bool
) -> tuple[Any, Any, dict[str, Any]]:
    """The kernel of a tile, what makes descriptors for it, and what else it needs to be launched."""
    if special:
        from fisedit.runtime.kernels.multiply_rows.attend_specialized import multiply_attend_specialized
        from fisedit.runtime.kernels.multiply_rows.specialized import describe, resources

        first, second = blocks_of(key.shape[1])
        held = 2 * (first + second) * config.n * rows.element_size()
        options = resources(config.m, config.n, config.k, config.warps, config.stages, False, held)
        return multiply_attend_specialized, describe, {**options, "FIRST": first, "SECOND": second}
    options = {
        "EVEN_C": even_c, "TMA": tma, "PRECISION": "ieee" if rows.dtype.itemsize == 4 else "tf32",
        "PARTS": min(cdiv(rows.shape[2], NARROWEST), MOST_MOMENTS), "KEYS": max(16, next_power_of_2(key.shape[1])),
        "num_stages": config.stages,
    }  # fmt: skip
    return _multiply_attend, TensorDescriptor.from_tensor, options


def blocks_of(keys: int) -> tuple[int, int]:
    """Of one or two blocks, how many keys each has: about the fewest that hold so many."""
    first, second = min(keys, BLOCK), max(keys - BLOCK, 0)
    return max(FEWEST, next_power_of_2(first)), max(FEWEST, next_power_of_2(second)) if second else 0
