from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def row_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int, scale: float | None
) -> Tensor:
    """Attention of query rows over given keys and values.

    Args:
        query: ``[B, N, h*d]``.
        key, value: ``[B, h, L, d]``; L counts text tokens or rows.
        mask: broadcastable to ``[B, h, N, L]``; ``None`` for no mask.
    Returns:
        ``[B, N, h*d_v]``.
    """
    batch, count, width = query.shape
    split = query.view(batch, count, heads, width // heads).transpose(1, 2)  # [B, h, N, d]
    out = F.scaled_dot_product_attention(split, key, value, mask, scale=scale)  # [B, h, N, d_v]
    return out.transpose(1, 2).reshape(batch, count, -1)
