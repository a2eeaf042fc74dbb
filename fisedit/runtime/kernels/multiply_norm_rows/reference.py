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
    norm_moments: bool = False,
    **blocks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A product of rows, and its rows normalized: for what reads them as they are beside what reads them normalized.

    Args:
        product: the arguments of ``multiply_rows``, by position.
        norm_affine: float32 ``[2, B, Co]``, scale and offset of a group normalization with known statistics, as
            ``normalize_rows`` takes them, and norm_activation its activation; ``None`` for a layer normalization.
        norm_full: whether these are not known before the rows: then nothing is normalized.
        norm_weight, norm_bias, eps: of the layer normalization, as ``layer_norm_rows`` takes them.
        norm_moments: whether moments may be given in the place of normalized rows.
        blocks: of ``multiply_rows``, too.
    Returns:
        The rows ``[B, N', Co]``; the same normalized from what they are rounded to, or the rows again if
        ``norm_full``; and moments of no part, float32 ``[2, 0, B, N']``. Instead of the last two, if ``norm_moments``:
        the rows again, and their moments, as ``multiply_rows`` takes them.
    """
    ops = torch.ops.fisedit
    out = ops.multiply_rows(*product, **blocks)
    moments = out.new_empty(2, 0, *out.shape[:2], dtype=torch.float32)
    if norm_full:
        return out, out, moments
    names = [argument.name for argument in ops.multiply_rows.default._schema.arguments]
    count = product[names.index("count")]
    if norm_affine is None:
        return out, ops.layer_norm_rows(out, norm_weight, norm_bias, eps, count), moments
    return out, ops.normalize_rows(out, None, norm_affine, norm_activation, count, False), moments
