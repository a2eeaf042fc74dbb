from __future__ import annotations

import torch
from torch import Tensor


def gather_patches(rows: Tensor, recorded: Tensor | None, sources: Tensor, count: Tensor) -> Tensor:
    """The input rows that each output of a convolution reads (im2col of active outputs).

    Args:
        rows: active input rows ``[B, N, C]``.
        recorded: the recorded map ``[B, R, C]``.
        sources: int32 ``[M, N', taps]``: v < N is active row v, v >= N recorded position v - N, -1 a row of zeros.
        count: int32 ``[1]``: outputs past it need not be gathered.
    Returns:
        ``[B, N', taps, C]``.
    """
    batch, _, channels = rows.shape
    parts = [rows, rows.new_zeros(batch, 1, channels)]
    if recorded is not None:
        parts.insert(1, recorded)
    everything = torch.cat(parts, 1)  # [B, N+R+1, C]
    index = sources.long().where(sources >= 0, everything.shape[1] - 1).expand(batch, -1, -1)
    patches = torch.take_along_dim(everything, index.reshape(batch, -1, 1), 1)
    return patches.view(batch, *sources.shape[1:], channels)
