from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize_rows(
    rows: Tensor, rows2: Tensor | None, affine: Tensor, activation: str, count: Tensor, done: bool = False
) -> Tensor:
    """Group normalization of rows whose statistics are known: one multiply-add per channel, then the activation.

    Args:
        rows: ``[B, N, C1]``, the last dimension contiguous.
        rows2: further channels of the same rows ``[B, N, C2]``, or ``None``.
        affine: scale and offset, float32 ``[2, B, C1+C2]``, the last dimension contiguous (see ``fold_group_norms``).
        activation: ``"none"`` or ``"silu"``.
        count: int32 ``[1]``: rows from here on are not needed; what stands there is undefined.
        done: whether the rows were normalized as they were made; then they are returned.
    Returns:
        ``[B, N, C1+C2]`` in the dtype of ``rows``; computed in that of ``affine``.
    """
    if done:
        return rows
    joined = rows if rows2 is None else torch.cat([rows, rows2], -1)
    out = torch.addcmul(affine[1, :, None], joined.to(affine.dtype), affine[0, :, None])  # [B, N, C1+C2]
    return (F.silu(out) if activation == "silu" else out).to(rows.dtype)
