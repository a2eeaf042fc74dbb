from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def multiply_norm_rows(
    *product: Any,
    norm_affine: Tensor | None = None,
    norm_full: bool = False,
    norm_activation: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """A product of rows, and its rows normalized: for what reads them as they are beside what reads them normalized.

    Args:
        product: the arguments of ``multiply_rows``, by position.
        norm_affine: float32 ``[2, B, Co]``, scale and offset of a group normalization with known statistics, as
            ``normalize_rows`` takes them, and norm_activation its activation; ``None`` for a layer normalization.
        norm_full: whether these are not known before the rows: then nothing is normalized.
        norm_weight, norm_bias, eps: of the layer normalization, as ``layer_norm_rows`` takes them.
    Returns:
        The rows ``[B, N', Co]``, and the same normalized from what they are rounded to; twice the rows if
        ``norm_full``.
    """
    ops = torch.ops.fisedit
    out = ops.multiply_rows(*product)
    if norm_full:
        return out, out
    names = [argument.name for argument in ops.multiply_rows.default._schema.arguments]
    count = product[names.index("count")]
    if norm_affine is None:
        return out, ops.layer_norm_rows(out, norm_weight, norm_bias, eps, count)
    return out, ops.normalize_rows(out, None, norm_affine, norm_activation, count, False)
