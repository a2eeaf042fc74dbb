from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_rows(rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, count: Tensor) -> Tensor:
    """``aten.layer_norm`` over the last dimension of active rows.

    Args:
        rows: ``[B, N, C]``, the last dimension contiguous.
        weight, bias: ``[C]``.
        count: int32 ``[1]``: rows from here on are not needed; what stands there is undefined.
    Returns:
        ``[B, N, C]`` in the dtype of ``rows``; half precision is computed in float32.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    weight, bias = (t if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(rows.to(wide), rows.shape[-1:], weight, bias, eps).to(rows.dtype)
