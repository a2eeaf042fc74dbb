"""Scattered rows of all slots of a step in one launch, beside computation and maybe over PCIe.

A few programs walk all items of work. Each keeps a block of 16 KB on its way in registers: enough of them cover the
latency of host memory, and they leave the multiprocessors to whoever computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit.runtime.kernels.launch import launch
from fisedit.runtime.kernels.load_rows.moves import ROWS, Moves

BLOCK_BYTES = 16384
"""Of goal rows that a program has on their way."""
WARPS = 4
TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
}


@triton.jit
def _move(
    origin, goal, scales, pairs, number, width,
    ORIGIN: tl.constexpr, GOAL: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The rows of ``number`` pairs, each in pieces of PIECE elements, ``BLOCK // PIECE`` pieces at a time.

    Pieces are counted through all rows, so that a block is full whatever the width.
    """
    # With the hints, those of the offsets too, a piece is one load and one store, of 16 bytes.
    origin = tl.multiple_of(origin.to(tl.pointer_type(ORIGIN)), PIECE * (ORIGIN.primitive_bitwidth // 8))
    goal = tl.multiple_of(goal.to(tl.pointer_type(GOAL)), PIECE * (GOAL.primitive_bitwidth // 8))
    column = tl.arange(0, PIECE)
    pieces = width // PIECE
    for first in range(0, number * pieces, BLOCK // PIECE):
        piece = first + tl.arange(0, BLOCK // PIECE)
        good = piece < number * pieces
        pair = piece // pieces
        begin = (piece - pair * pieces) * PIECE
        source = tl.load(pairs + 2 * pair, mask=good, other=0).to(tl.int64)
        target = tl.load(pairs + 2 * pair + 1, mask=good, other=0).to(tl.int64)
        there = tl.multiple_of(source * width + begin, PIECE)[:, None] + column[None, :]
        here = tl.multiple_of(target * width + begin, PIECE)[:, None] + column[None, :]
        values = tl.load(origin + there, mask=good[:, None], eviction_policy="evict_first")
        if SCALED:
            scale = tl.load(scales + source, mask=good, other=0.0)
            values = values.to(tl.float32) * scale[:, None]
        tl.store(goal + here, values.to(GOAL), mask=good[:, None])


@triton.jit(
    do_not_specialize=["items", "batch", "masks"], do_not_specialize_on_alignment=["origins", "goals", "scales"]
)
def _load(
    pairs, starts, counts, lists, widths, work, origins, goals, scales, items, batch, masks,
    ORIGIN: tl.constexpr, GOAL: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        view, sample, first = tl.load(work + 3 * item), tl.load(work + 3 * item + 1), tl.load(work + 3 * item + 2)
        at = view * batch + sample
        address = tl.load(origins + at)
        if address != 0:
            place = tl.load(lists + view) * masks + sample % masks
            number = tl.minimum(tl.load(counts + place) - first, ROWS)
            which = pairs + 2 * (tl.load(starts + place) + first)
            width = tl.load(widths + view)
            goal = tl.load(goals + at)
            scale = tl.load(scales + at).to(tl.pointer_type(tl.float32))
            if width % WIDE == 0:
                _move(address, goal, scale, which, number, width, ORIGIN, GOAL, SCALED, BLOCK, WIDE)
            else:  # few rows of few channels, a latent's say
                _move(address, goal, scale, which, number, width, ORIGIN, GOAL, SCALED, BLOCK // 8, 1)


def load_rows(
    moves: Moves, origins: Tensor, goals: Tensor, dtype: torch.dtype, scales: Tensor | None = None, *,
    programs: int = 32,
) -> None:  # fmt: skip
    """See the reference; addresses may be of host memory that the GPU can read.

    Where C is a multiple of E, the elements of ``dtype`` in 16 bytes, addresses are multiples of E elements: rows are
    then read and written E elements at a time. Runs on the current stream; what the addresses lead to, and the
    tables, must live until it has run.
    """
    items = moves.work.shape[0]
    if not items:
        return
    size = dtype.itemsize
    launch(_load, (min(programs, items),),
        moves.pairs, moves.starts, moves.counts, moves.lists, moves.widths, moves.work, origins, goals,
        origins if scales is None else scales, items, origins.shape[1], moves.starts.shape[1],
        ORIGIN=TYPES[dtype if scales is None else torch.int8], GOAL=TYPES[dtype], SCALED=scales is not None,
        ROWS=ROWS, BLOCK=BLOCK_BYTES // size, WIDE=16 // size, num_warps=WARPS,
    )  # fmt: skip
