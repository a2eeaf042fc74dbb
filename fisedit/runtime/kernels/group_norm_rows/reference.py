from __future__ import annotations

import torch
from torch import Tensor


def group_norm_rows(
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    eps: float,
    positions: int,
    count: Tensor | None = None,
) -> Tensor:
    """Group normalization with recorded statistics, as one multiply-add: ``rows * scale + offset``.

    Where a sample's rows are all ``positions`` of the level, their own statistics are exact and are used instead.

    Args:
        rows: ``[B, N, C]``.
        mean, rstd: recorded statistics, float32 ``[B, G]``.
        weight, bias: affine parameters ``[C]``.
        eps: added to the variance of fresh statistics.
        count: int64 ``[B]``: only so many rows of each sample are real; ``None`` for all.
        shift: added to the rows before normalizing, ``[B, 1, C]`` or broadcastable to it.
    Returns:
        ``[B, N, C]`` in the dtype of ``rows``.
    """
    batch, number, channels = rows.shape
    if number == positions:
        moved = rows if shift is None else rows + shift
        grouped = moved.to(mean.dtype).view(batch, number, mean.shape[1], -1)  # [B, R, G, C/G]
        variance, own = torch.var_mean(grouped, (1, 3), correction=0)  # [B, G]
        whole = count.eq(positions)[:, None] if count is not None else torch.ones_like(own, dtype=torch.bool)
        mean, rstd = torch.where(whole, own, mean), torch.where(whole, torch.rsqrt(variance + eps), rstd)
    repeat = channels // mean.shape[1]
    scale = rstd.repeat_interleave(repeat, 1)[:, None]  # [B, 1, C]
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    center = mean.repeat_interleave(repeat, 1)[:, None]  # [B, 1, C]
    if shift is not None:
        center = center - shift.to(center.dtype)
    offset = -center * scale
    if bias is not None:
        offset = offset + bias.to(offset.dtype)
    if rows.dtype == scale.dtype:
        return torch.addcmul(offset, rows, scale)
    return (rows * scale + offset).to(rows.dtype)
