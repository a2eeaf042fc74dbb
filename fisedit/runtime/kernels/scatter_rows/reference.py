from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def scatter_rows(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """A copy of ``base`` with ``out[b, index[b, n]] = rows[b, n]``.

    Args:
        base: ``[B, R, C]``, not changed.
        index: int64 ``[M, N]``, M = B or 1, no row twice; R pads, and writes nothing.
        rows: ``[B, N, C]``.
    Returns:
        ``[B, R, C]``, contiguous.
    """
    if index.shape[0] == 1:
        return base.index_copy(1, index[0], rows)
    out = F.pad(base, (0, 0, 0, 1))  # [B, R+1, C], the last row for what pads
    return out.scatter_(1, index[:, :, None].expand_as(rows), rows)[:, :-1].contiguous()
