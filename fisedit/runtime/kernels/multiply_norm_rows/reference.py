from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from fisedit.runtime.kernels.layer_norm_rows.reference import layer_norm_rows
from fisedit.runtime.kernels.multiply_rows.reference import multiply_rows
from fisedit.runtime.kernels.normalize_rows.reference import normalize_rows


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
        product: the arguments of ``multiply_rows``.
        norm_affine: float32 ``[2, B, Co]``, scale and offset of a group normalization with known statistics, as
            ``normalize_rows`` takes them, and norm_activation its activation; ``None`` for a layer normalization.
        norm_full: whether these are not known before the rows: then nothing is normalized.
        norm_weight, norm_bias, eps: of the layer normalization, as ``layer_norm_rows`` takes them.
    Returns:
        The rows ``[B, N', Co]``, and the same normalized from what they are rounded to; twice the rows if
        ``norm_full``.
    """
    out, count = multiply_rows(*product), inspect.signature(multiply_rows).bind(*product).arguments["count"]
    if norm_affine is None:
        return out, layer_norm_rows(out, norm_weight, norm_bias, eps, count)
    return out, normalize_rows(out, None, norm_affine, norm_activation, count, norm_full)
