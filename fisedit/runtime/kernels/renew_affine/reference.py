from __future__ import annotations

import torch
from torch import Tensor


def renew_affine(
    rows: Tensor,
    rows2: Tensor | None,
    affine: Tensor,
    full: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    counts: Tensor,
) -> Tensor:
    """Scale and offset of a group normalization from the rows' own statistics, where all of a sample's are active.

    Args:
        rows, rows2: ``[B, N, C1]``, ``[B, N, C2]``: N is all rows of the level.
        affine: what the recorded statistics gave, float32 ``[2, B, C]``; the result of samples that are
            not whole.
        full: whether any sample is whole.
        weight, bias: ``[C]``. shift: added to the rows before normalizing, ``[B or 1, 1, C or 1]``.
        counts: int32 ``[B]``: the rows of each sample that are real.
    Returns:
        float32 ``[2, B, C]``.
    """
    if not full:
        return affine
    joined = rows if rows2 is None else torch.cat([rows, rows2], -1)
    wide = joined.to(affine.dtype)
    moved = wide if shift is None else wide + shift.to(affine.dtype)
    batch, number, channels = moved.shape
    variance, mean = torch.var_mean(moved.view(batch, number, groups, -1), (1, 3), correction=0)  # [B, G]
    repeat = channels // groups
    scale = torch.rsqrt(variance + eps).repeat_interleave(repeat, 1)  # [B, C]
    center = -mean.repeat_interleave(repeat, 1)
    if shift is not None:
        center = center + shift.to(affine.dtype).expand(batch, 1, channels)[:, 0]
    if weight is not None:
        scale = scale * weight.to(affine.dtype)
    offset = center * scale if bias is None else center * scale + bias.to(affine.dtype)
    return torch.where(counts.eq(number)[None, :, None], torch.stack([scale, offset]), affine)
