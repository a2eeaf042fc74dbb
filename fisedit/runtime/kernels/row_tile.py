"""Which rows and channels a program moves, in kernels that gather or scatter rows by an index."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_tile(index, number, positions, index_stride, PDL: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Once the kernel in front has ended: the sample, rows and channels of a program, and where the index has each row;
    ``positions``, which pads an index, behind its last."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    place = tl.load(index + sample * index_stride + row, mask=row < number, other=positions)
    return sample, row, channel, place
