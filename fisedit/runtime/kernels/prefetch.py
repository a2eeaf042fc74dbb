"""Have the weights of the next product on their way to L2 while a kernel before it computes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MOST = 16 << 20
"""Bytes that are asked for ahead: more would push out what is needed before."""
OWN_ROWS = 0
MOST_ROWS = 128
"""Products of so many rows wait for their weights; those of more for what they compute."""


@triton.jit
def prefetch(weight, size, program, programs):
    """Ask for a program's share of the first ``size`` bytes (PTX ``cp.async.bulk.prefetch``, since sm_90)."""
    share = tl.cdiv(tl.cdiv(size, programs), 128) * 128
    first = program * share
    length = min(share, size - first)
    if length > 0:
        tl.inline_asm_elementwise(
            """{
            .reg .pred one;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 one, thread, 0;
            @one cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r", [weight.to(tl.int64) + first, length], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def prefetch_slices(weight, stride, first, rows, begin, length, MOST_AT_ONCE: tl.constexpr):
    """Ask for ``length`` bytes of each of some rows, from element ``begin`` on; each thread for a row."""
    ITEM: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    for before in tl.static_range(0, MOST_AT_ONCE, 128):
        tl.inline_asm_elementwise(
            """{
            .reg .pred one;
            .reg .u32 thread;
            .reg .u64 row;
            mov.u32 thread, %tid.x;
            setp.lt.s32 one, thread, $3;
            setp.lt.and.u32 one, thread, 128, one;
            cvt.u64.u32 row, thread;
            mad.lo.u64 row, row, $2, $1;
            @one cp.async.bulk.prefetch.L2.global [row], $4;
            mov.u32 $0, 0;
            }""",
            "=r,l,l,r,r",
            [
                weight.to(tl.int64) + ((first + before).to(tl.int64) * stride + begin) * ITEM,
                stride.to(tl.int64) * ITEM, rows - before, length,
            ],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def prefetch_by_grid(weight, size):
    """:func:`prefetch` by all programs of a launch."""
    program = tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * tl.program_id(2))
    prefetch(weight, size, program, tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2))


def prefetched(weight: Tensor | None, rows: Tensor) -> tuple[Tensor, int]:
    """The tensor that :func:`prefetch` takes and the bytes to ask for, 0 if there is nothing to ask for.

    Args:
        rows: ``[B, N, C]``, what is computed meanwhile; any tensor stands for no weight.
    """
    many = rows.shape[0] * rows.shape[1] > MOST_ROWS
    if weight is None or many or not weight.is_contiguous() or weight.data_ptr() % 16:
        return rows, 0
    return weight, min(weight.numel() * weight.element_size(), MOST) // 16 * 16


def slice_bytes(weight: Tensor, rows: int, splits: int, span: int) -> int:
    """How much of each row of its weights a program asks for, before it may compute; 0: nothing."""
    if rows > OWN_ROWS:
        return 0
    return min(span * weight.element_size(), MOST // (weight.shape[0] * splits)) // 16 * 16
