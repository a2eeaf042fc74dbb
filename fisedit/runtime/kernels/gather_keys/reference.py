from __future__ import annotations

import torch
from torch import Tensor


def gather_keys(
    key: Tensor, value: Tensor, recorded_key: Tensor, recorded_value: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """The keys and values of a whole map: the recorded ones with those of the active rows in their places.

    Args:
        key, value: active rows ``[B, N, C]``, the last dimension contiguous.
        recorded_key, recorded_value: recorded rows ``[B, R, C]``.
        table: int32 ``[M, R]``: v < N is active row v, v >= N recorded row v - N.
    Returns:
        Twice ``[B, R, C]``, contiguous.
    """
    index = table.long()[:, :, None]  # [M, R, 1]
    keys, values = (
        torch.take_along_dim(torch.cat([rows, recorded], 1), index, 1)  # [B, R, C]
        for rows, recorded in ((key, recorded_key), (value, recorded_value))
    )
    return keys, values
