from __future__ import annotations

from torch import Tensor


def scatter_rows(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """A copy of ``base`` with ``out[b, index[b, n]] = rows[b, n]``.

    Args:
        base: ``[B, R, C]``, not changed.
        index: int64 ``[M, N]``, M = B or 1, no row twice.
        rows: ``[B, N, C]``.
    Returns:
        ``[B, R, C]``, contiguous.
    """
    out = base.clone()
    if index.shape[0] == 1:
        return out.index_copy_(1, index[0], rows)
    return out.scatter_(1, index[:, :, None].expand_as(rows), rows)
