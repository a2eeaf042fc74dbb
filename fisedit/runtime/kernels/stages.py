"""Between warps of different tasks: the stages of a pipeline, which they take in turn (Gluon)."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def make_barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr, OTHER: gl.constexpr):
    """So many barriers in shared memory that ``COUNT`` arrivals open, and as many that ``OTHER`` do. All threads meet
    between two that lie beside each other, hence both kinds at a time."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    others = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(number), count=COUNT)
        mbarrier.init(others.index(number), count=OTHER)
    return barriers, others


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The stage behind ``stage``, and the phase that its barriers are in."""
    over = stage == STAGES - 1
    return gl.where(over, 0, stage + 1), phase ^ over.to(gl.int32)


@gluon.jit
def stage_before(stage, STAGES: gl.constexpr):
    """The stage in front of ``stage``."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def wait_for_kernel(PDL: gl.constexpr):
    """For the one in front; the next one may start from now on."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
