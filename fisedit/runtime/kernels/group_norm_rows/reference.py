from __future__ import annotations

import torch
from torch import Tensor


def group_norm_rows(
    rows: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    """Group normalization with given statistics, as one multiply-add: ``rows * scale + offset``.

    Args:
        rows: ``[B, N, C]``.
        mean, rstd: recorded statistics, float32 ``[B, G]``.
        weight, bias: affine parameters ``[C]``.
        shift: added to the rows before normalizing, ``[B, 1, C]`` or broadcastable to it.
    Returns:
        ``[B, N, C]`` in the dtype of ``rows``.
    """
    channels = rows.shape[2]
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
