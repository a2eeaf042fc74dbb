from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit.runtime.kernels.launch import launch

ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}
CHANNELS = 128
"""Of a program: with 8 rows, each of its 128 threads reads and writes 16 bytes of float16."""


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        x = x * tl.sigmoid(x)
    elif ACTIVATION == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 3:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def _load_biased(product, bias, place, channel, real, good):
    x = tl.load(product + place[:, None] + channel[None, :], mask=good, other=0.0).to(tl.float32)  # [BM, BC]
    if bias is not None:
        x += tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=["number"])
def _finish(
    out, product, bias, affine, residual, count, number, channels, product_batch, product_row,
    affine_plane, affine_batch, residual_batch, residual_row,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    last = tl.load(count)
    if tl.program_id(0) * BM >= last:
        return
    sample = tl.program_id(2).to(tl.int64)
    row, channel = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    real = channel < channels
    good = (row < last)[:, None] & real[None, :]
    place = sample * product_batch + row * product_row
    x = _load_biased(product, bias, place, channel, real, good)
    if GATED:
        halves = bias if bias is None else bias + channels
        x *= _activate(_load_biased(product + channels, halves, place, channel, real, good), ACTIVATION)
    else:
        if affine is not None:
            at = affine + sample * affine_batch + channel
            scale, offset = tl.load(at, mask=real, other=0.0), tl.load(at + affine_plane, mask=real, other=0.0)
            x = x * scale[None, :] + offset[None, :]
        x = _activate(x, ACTIVATION)
    if residual is not None:
        at = residual + sample * residual_batch + row[:, None] * residual_row + channel[None, :]
        x += tl.load(at, mask=good, other=0.0).to(tl.float32)
    goal = (sample * number + row) * channels
    tl.store(out + goal[:, None] + channel[None, :], x.to(out.dtype.element_ty), mask=good)


def finish_rows(
    product: Tensor,
    bias: Tensor | None,
    affine: Tensor | None,
    residual: Tensor | None,
    count: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    """The reference's contract."""
    batch, number, channels = product.shape
    channels = channels // 2 if gated else channels
    out = product.new_empty(batch, number, channels)  # [B, N, Co]
    pdl = product.is_cuda and torch.cuda.get_device_capability(product.device) >= (9, 0)
    block = 8 if batch * number <= 2048 else 32
    launch(_finish, (triton.cdiv(number, block), triton.cdiv(channels, CHANNELS), batch),
        out, product, bias, affine, residual, count, number, channels, product.stride(0), product.stride(1),
        0 if affine is None else affine.stride(0), 0 if affine is None else affine.stride(1),
        0 if residual is None else residual.stride(0), 0 if residual is None else residual.stride(1),
        ACTIVATION=ACTIVATIONS[activation], GATED=gated, BM=block, BC=CHANNELS, PDL=pdl,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
