"""Activations within kernels."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}
PTX: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)
"""Whether kernels are compiled, for a GPU that reads PTX, and not interpreted."""


@triton.jit
def times_sigmoid(x, y):
    """``x * sigmoid(y)``, to the last bits of float32: the general quotient would take three times as many steps."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $2, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 t, t;
            mul.f32 $0, $1, t;
            }""",
            "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return x * tl.sigmoid(y)


@triton.jit
def gelu(x):
    """``x * normal_cdf(x)`` within 1.5e-7 * |x|, by Abramowitz and Stegun, 7.1.26: half the steps of ``tl.erf``."""
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 z, t, q, e;
            abs.f32 z, $1;
            fma.rn.f32 t, z, 0f3E6D3388, 0f3F800000;
            rcp.approx.ftz.f32 t, t;
            mul.f32 e, z, z;
            mul.f32 e, e, 0fBF38AA3B;
            ex2.approx.ftz.f32 e, e;
            fma.rn.f32 q, t, 0f3F87DC22, 0fBFBA00E3;
            fma.rn.f32 q, q, t, 0f3FB5F0E3;
            fma.rn.f32 q, q, t, 0fBE91A98E;
            fma.rn.f32 q, q, t, 0f3E827906;
            mul.f32 q, q, t;
            mul.f32 q, q, e;
            mul.f32 z, z, 0fBF000000;
            max.f32 t, $1, 0f00000000;
            fma.rn.f32 $0, z, q, t;
            }""",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        x = times_sigmoid(x, x)
    elif ACTIVATION == 2:
        x = gelu(x)
    elif ACTIVATION == 3:
        x = times_sigmoid(x, 1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x
