"""Between warps of different tasks: the stages of a pipeline, which they take in turn (Gluon)."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
