from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def finish_rows(
    product: Tensor,
    bias: Tensor | None,
    affine: Tensor | None,
    residual: Tensor | None,
    count: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    """What follows a product of rows, row by row: what ``multiply_rows`` does after multiplying.

    ``act((product + bias) * affine[0] + affine[1]) + residual``, or gated ``a * act(b) + residual`` of the halves
    ``a, b`` of ``product + bias`` (GEGLU, Shazeer 2020).

    Args:
        product: ``[B, N, Co]``, twice the channels if gated.
        bias: of the product's channels, in any dtype.
        affine: float32 ``[2, B, Co]``, the last dimension contiguous; ``None`` if gated.
        residual: ``[B, N, Co]``, the last dimension contiguous.
        count: int32 ``[1]``: rows from here on are not needed; what stands there is undefined.
        activation: ``"none"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
    Returns:
        ``[B, N, Co]`` in the dtype of ``product``; half precision is computed in float32.
    """
    out = product.to(torch.promote_types(product.dtype, torch.float32))
    if bias is not None:
        out = out + bias
    if gated:
        value, gate = out.chunk(2, -1)
        out = value * ACTIVATIONS[activation](gate)
    else:
        if affine is not None:
            out = torch.addcmul(affine[1, :, None], out, affine[0, :, None])
        out = ACTIVATIONS[activation](out)
    return (out if residual is None else out + residual).to(product.dtype)


def finish_norm_rows(
    product: Tensor,
    bias: Tensor | None,
    affine: Tensor | None,
    residual: Tensor | None,
    count: Tensor,
    activation: str,
    gated: bool,
    norm_affine: Tensor | None,
    norm_activation: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """:func:`finish_rows`, and its result normalized: what ``multiply_norm_rows`` does after multiplying.

    Args:
        norm_affine, norm_activation: as ``normalize_rows`` takes them; without them, it is a layer normalization.
        norm_weight, norm_bias, eps: as ``layer_norm_rows`` takes them.
    Returns:
        The rows ``[B, N, Co]``, and the same normalized from what they are rounded to.
    """
    out = finish_rows(product, bias, affine, residual, count, activation, gated)
    if norm_affine is None:
        return out, torch.ops.fisedit.layer_norm_rows(out, norm_weight, norm_bias, eps, count)
    return out, torch.ops.fisedit.normalize_rows(out, None, norm_affine, norm_activation, count, False)
