from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit.runtime.kernels.activate import ACTIVATIONS, activate
from fisedit.runtime.kernels.launch import cdiv, launch, next_power_of_2, overlaps

CHANNELS = 128
"""Of a program: with 8 rows, each of its 128 threads reads and writes 16 bytes of float16."""
ELEMENTS = 2048
"""Of a program that normalizes whole rows: one of up to 2048 channels, or several shorter ones."""


@triton.jit
def _load_biased(product, bias, place, channel, real, good):
    x = tl.load(product + place[:, None] + channel[None, :], mask=good, other=0.0).to(tl.float32)  # [BM, BC]
    if bias is not None:
        x += tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=["number"])
def _finish(
    out, product, bias, affine, residual, count, normalized, norm_affine, norm_weight, norm_bias,
    number, channels, product_batch, product_row, affine_plane, affine_batch, residual_batch, residual_row,
    norm_plane, norm_batch, eps,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, NORM_ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block of rows; of whole rows, if a layer normalization follows."""
    last = tl.load(count)
    if tl.program_id(0) * BM >= last:
        return
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sample = tl.program_id(2).to(tl.int64)
    row, channel = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    real = channel < channels
    good = (row < last)[:, None] & real[None, :]
    if norm_affine is not None:  # what does not wait for the rows is loaded beside them
        at = norm_affine + sample * norm_batch + channel
        norm_scale, norm_offset = tl.load(at, mask=real, other=0.0), tl.load(at + norm_plane, mask=real, other=0.0)
    else:
        if norm_weight is not None:
            norm_scale = tl.load(norm_weight + channel, mask=real, other=0.0).to(tl.float32)
        if norm_bias is not None:
            norm_offset = tl.load(norm_bias + channel, mask=real, other=0.0).to(tl.float32)
    place = sample * product_batch + row * product_row
    x = _load_biased(product, bias, place, channel, real, good)
    if GATED:
        halves = bias if bias is None else bias + channels
        x *= activate(_load_biased(product + channels, halves, place, channel, real, good), ACTIVATION)
    else:
        if affine is not None:
            at = affine + sample * affine_batch + channel
            scale, offset = tl.load(at, mask=real, other=0.0), tl.load(at + affine_plane, mask=real, other=0.0)
            x = x * scale[None, :] + offset[None, :]
        x = activate(x, ACTIVATION)
    if residual is not None:
        at = residual + sample * residual_batch + row[:, None] * residual_row + channel[None, :]
        x += tl.load(at, mask=good, other=0.0).to(tl.float32)
    goal = ((sample * number + row) * channels)[:, None] + channel[None, :]
    x = x.to(out.dtype.element_ty)
    tl.store(out + goal, x, mask=good)
    if normalized is not None:
        x = x.to(tl.float32)
        if norm_affine is not None:
            x = activate(x * norm_scale[None, :] + norm_offset[None, :], NORM_ACTIVATION)
        else:
            x = tl.where(real[None, :], x - tl.sum(x, 1)[:, None] / channels, 0.0)
            x *= tl.rsqrt(tl.sum(x * x, 1) / channels + eps)[:, None]
            if norm_weight is not None:
                x *= norm_scale[None, :]
            if norm_bias is not None:
                x += norm_offset[None, :]
        tl.store(normalized + goal, x.to(out.dtype.element_ty), mask=good)


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
    block = 8 if batch * number <= 2048 else 32
    out = product.new_empty(batch, number, channels // 2 if gated else channels)  # [B, N, Co]
    _launch(out, product, bias, affine, residual, count, activation, gated, block, CHANNELS)
    return out


def finish_norm_rows(
    product: Tensor,
    bias: Tensor | None,
    affine: Tensor | None,
    residual: Tensor | None,
    count: Tensor,
    activation: str,
    gated: bool,
    norm_affine: Tensor | None,
    norm_activation: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The reference's contract."""
    batch, number, channels = product.shape
    out = product.new_empty(batch, number, channels // 2 if gated else channels)  # [B, N, Co]
    normalized = torch.empty_like(out)
    rows, columns = 8 if batch * number <= 2048 else 32, CHANNELS
    if norm_affine is None:
        columns = next_power_of_2(out.shape[2])
        rows = max(1, ELEMENTS // columns)
    _launch(out, product, bias, affine, residual, count, activation, gated, rows, columns,
            (normalized, norm_affine, norm_weight, norm_bias), norm_activation, eps)  # fmt: skip
    return out, normalized


def _launch(
    out: Tensor, product: Tensor, bias: Tensor | None, affine: Tensor | None, residual: Tensor | None, count: Tensor,
    activation: str, gated: bool, rows: int, columns: int,
    norm: tuple[Tensor | None, ...] = (None, None, None, None), norm_activation: str = "none", eps: float = 0.0,
) -> None:  # fmt: skip
    """``rows``, ``columns``: of a program. ``norm``: where normalized rows go, and what they are normalized with."""
    batch, number, channels = out.shape
    pdl = overlaps(product)
    launch(_finish, (cdiv(number, rows), cdiv(channels, columns), batch),
        out, product, bias, affine, residual, count, *norm,
        number, channels, product.stride(0), product.stride(1), *_strides(affine),
        *_strides(residual), *_strides(norm[1]), eps,
        ACTIVATION=ACTIVATIONS[activation], GATED=gated, NORM_ACTIVATION=ACTIVATIONS[norm_activation],
        BM=rows, BC=columns, PDL=pdl, num_warps=4 if columns <= ELEMENTS else 8,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))
