from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows by number: ``out[b, n] = rows[b, index[b, n]]``.

    Args:
        rows: ``[B, R, C]``.
        index: int64 ``[M, N]``, M = B, or 1 for one index shared by the batch; R pads, and gives any row.
    Returns:
        ``[B, N, C]``.
    """
    if index.shape[0] == 1:
        return rows.index_select(1, index[0])
    return torch.take_along_dim(rows, index.clamp_max(rows.shape[1] - 1)[:, :, None], 1)
