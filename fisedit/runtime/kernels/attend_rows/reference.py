from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recorded_key: Tensor | None,
    recorded_value: Tensor | None,
    table: Tensor | None,
    count: Tensor,
    key_count: Tensor | None,
    locks: Tensor,
    heads: int,
    scale: float | None,
) -> Tensor:
    """Attention of active query rows over text, over active rows, or over a recorded map with its active rows renewed.

    Args:
        query: ``[B, N, h*d]``, the last dimension contiguous.
        key, value: active rows ``[B, N, h*d]`` or, of text, ``[B, L, h*d]`` or ``[B, h, L, d]``; the last dimension
            contiguous.
        recorded_key, recorded_value: recorded rows ``[B, R, h*d]``; ``None`` without ``table``. The Triton kernel also
            takes int64 ``[B]``: the device address of each sample's contiguous ``[R, h*d]`` rows, a multiple of 16.
        table: int32 ``[M, R]``: v < N is active row v, v >= N recorded row v - N; ``None``: all of ``key`` is read.
        count: int32 ``[1]``: rows from here on are not needed; what stands there is undefined.
        key_count: int32 ``[B]``: only so many rows of ``key`` are real, at least one; ``None`` for all.
        locks: int32 zeros, and zeros again afterwards; one for every tile of the kernel (not read here).
        scale: ``None`` for ``1 / sqrt(d)``.
    Returns:
        ``[B, N, h*d]``.
    """
    if table is not None:
        assert recorded_key is not None and recorded_value is not None
        key, value = _renewed(recorded_key, key, table), _renewed(recorded_value, value, table)
    if key.dim() == 3:
        key, value = _split(key, heads), _split(value, heads)
    mask = None
    if key_count is not None:
        mask = torch.arange(key.shape[2], device=key.device) < key_count.clamp_min(1)[:, None, None, None]
    out = F.scaled_dot_product_attention(_split(query, heads), key, value, mask, scale=scale)  # [B, h, N, d]
    return out.transpose(1, 2).flatten(2)


def _renewed(recorded: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """The recorded map with the active rows in their places."""
    source = torch.cat([rows, recorded], 1)  # [B, N+R, C]
    return torch.take_along_dim(source, table.long()[:, :, None], 1)  # [B, R, C]


def _split(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(2, (heads, -1)).transpose(1, 2)  # [B, h, N, d]
