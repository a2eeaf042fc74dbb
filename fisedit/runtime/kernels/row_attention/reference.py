from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    heads: int,
    scale: float | None,
    key_count: Tensor | None = None,
) -> Tensor:
    """Attention of query rows over given keys and values.

    Args:
        query: ``[B, N, h*d]``.
        key, value: ``[B, h, L, d]``; L counts text tokens or rows.
        mask: broadcastable to ``[B, h, N, L]``; ``None`` for no mask.
        key_count: int64 ``[B]``: only so many keys of each sample are real; ``None`` for all. No ``mask`` then.
    Returns:
        ``[B, N, h*d_v]``.
    """
    batch, count, width = query.shape
    split = query.view(batch, count, heads, width // heads).transpose(1, 2)  # [B, h, N, d]
    if key_count is not None:
        mask = torch.arange(key.shape[2], device=key.device) < key_count.clamp_min(1)[:, None, None, None]
    out = F.scaled_dot_product_attention(split, key, value, mask, scale=scale)  # [B, h, N, d_v]
    return out.transpose(1, 2).reshape(batch, count, -1)
