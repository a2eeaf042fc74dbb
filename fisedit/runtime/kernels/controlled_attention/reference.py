from __future__ import annotations

import math

import torch
from torch import Tensor


def controlled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_recorded: Tensor,
    key_recorded: Tensor,
    index: Tensor,
    weight: Tensor,
    heads: int,
    scale: float | None,
) -> Tensor:
    """Cross-attention whose maps of kept tokens are the recorded run's (Prompt-to-Prompt, Hertz et al. 2022).

    ``map[..., j] = weight[j] * recorded[..., index[j]] + (1 - weight[j]) * new[..., j]``.

    Args:
        query, query_recorded: ``[B, R, h*d]``.
        key, key_recorded: ``[B, h, L, d]``. value: ``[B, h, L, d]``.
        mask: broadcastable to ``[B, h, R, L]``.
        index: int64 ``[B, L]``, the recorded token of each token. weight: ``[B, L]``, 1 keeps the recorded map.
    Returns:
        ``[B, R, h*d]``.
    """
    batch, count, width = query.shape
    factor = 1.0 / math.sqrt(width // heads) if scale is None else scale

    def attention_map(queries: Tensor, keys: Tensor) -> Tensor:
        split = queries.view(batch, count, heads, -1).transpose(1, 2)  # [B, h, R, d]
        scores = (split * factor) @ keys.transpose(-1, -2)  # [B, h, R, L]
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1)

    new, recorded = attention_map(query, key), attention_map(query_recorded, key_recorded)
    kept = recorded.index_select(-1, index[0]) if index.shape[0] == 1 else _take(recorded, index)
    mixed = torch.lerp(new, kept, weight.to(new.dtype)[:, None, None])  # [B, h, R, L]
    return (mixed @ value).transpose(1, 2).reshape(batch, count, -1)


def _take(maps: Tensor, index: Tensor) -> Tensor:
    return torch.take_along_dim(maps, index[:, None, None].expand(*maps.shape[:3], -1), -1)
