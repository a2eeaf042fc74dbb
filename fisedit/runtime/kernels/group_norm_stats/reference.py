from __future__ import annotations

import math

import torch
from torch import Tensor


def group_norm_stats(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten.group_norm`` that also returns its statistics.

    Args:
        x: ``[B, C, ...]``.
    Returns:
        The normalized value like ``x``, and mean and reciprocal standard deviation ``[B, groups]``:
        float32, or float64 of float64.
    """
    if torch.compiler.is_compiling():
        return _written_out(x, groups, weight, bias, eps)
    batch, channels = x.shape[:2]
    size = math.prod(x.shape[2:])
    x = x.contiguous(memory_format=torch.channels_last if _channels_last(x) else torch.contiguous_format)
    out, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, batch, channels, size, groups, eps)
    if x.dtype not in (torch.float32, torch.float64):
        grouped = x.float().reshape(batch, groups, -1)  # [B, G, C/G*...]
        variance, mean = torch.var_mean(grouped, -1, correction=0)
        rstd = torch.rsqrt(variance + eps)
    return out, mean.view(batch, groups), rstd.view(batch, groups)


def _written_out(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in elementary ops, which a compiler fuses with what is around them; statistics computed once."""
    batch, channels = x.shape[:2]
    grouped = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(batch, groups, channels // groups, -1)
    variance, mean = torch.var_mean(grouped, (2, 3), correction=0, keepdim=True)  # [B, G, 1, 1]
    rstd = torch.rsqrt(variance + eps)
    out = ((grouped - mean) * rstd).reshape(x.shape)
    over = (1, channels, *[1] * (x.dim() - 2))
    if weight is not None:
        out = out * weight.reshape(over)
    if bias is not None:
        out = out + bias.reshape(over)
    return out.to(x.dtype), mean.reshape(batch, groups), rstd.reshape(batch, groups)


def _channels_last(x: Tensor) -> bool:
    """Whether PyTorch normalizes ``x`` in its channels-last order; on a GPU it wants channels first."""
    return x.is_cpu and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
