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


def multiply_rows(
    rows: Tensor,
    rows2: Tensor | None,
    recorded: Tensor | None,
    sources: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    affine: Tensor | None,
    full: bool,
    residual: Tensor | None,
    count: Tensor,
    locks: Tensor,
    activation: str,
    gated: bool,
    positions: int,
    rows3: Tensor | None = None,
    moments: Tensor | None = None,
    center: Tensor | None = None,
    input_eps: float = 0.0,
    **blocks: Tensor | None,
) -> Tensor:
    """A linear layer or a convolution of active rows, and all that follows it row by row.

    ``out = act((cat(patches, rows2, rows3) @ weight.T + bias) * affine[0] + affine[1]) + residual``; ``patches`` are

    - the rows themselves; where their moments are given, normalized first (``aten.layer_norm`` without weights);
    - with ``sources``, the ``taps`` input rows that each output reads: a convolution (implicit GEMM).

    Args:
        rows: ``[B, N, C]``. rows2, rows3: further channels of each output's own row, ``[B, N', C2]``, ``[B, N', C3]``.
        recorded: ``[B, R, C]``: the recorded map that inactive inputs are read from.
        sources: int32 ``[M, N', taps]``: v < N is active row v, v >= N recorded position v - N, -1 a row of zeros.
        weight: ``[Co, taps * C + C2 + C3]``, taps outermost. bias: ``[Co]``, in any dtype.
        affine: float32 ``[2, B, Co]``, scale and offset of each sample; not applied, nor the activation, if ``full``.
        residual: ``[B, N', Co]``, added last.
        count: int32 ``[1]``: rows past it need not be computed. locks: int32, zeros; for kernels that split their work.
        activation: a key of ``ACTIVATIONS``.
        positions: all rows of the outputs' level; not read here.
        moments: float32 ``[2, T, B, N]``: sums of each row's channels and of their squares, in T parts; ``None``, or
            T = 0: rows are multiplied as they are. input_eps: of the normalization.
        center: float32 ``[Co]``, sums of each output's weights, for kernels that normalize afterwards.
        gated: the first half of the outputs is multiplied by the activation of the second (GEGLU, Shazeer 2020).
        blocks: what it takes to compute a convolution by fewer products, as ``winograd.py`` has it; not read here.
    Returns: ``[B, N', Co]``, half of that if gated; in the dtype of ``rows``.
    """
    rows = rows if moments is None or moments.shape[1] == 0 else _normalized(rows, moments, input_eps)
    parts = (rows if sources is None else _patches(rows, recorded, sources), rows2, rows3)  # [B, N', taps*C], ...
    patches = torch.cat([part for part in parts if part is not None], -1)
    if bias is None or bias.dtype == weight.dtype:
        out = F.linear(patches, weight, bias)  # [B, N', Co]
    else:
        out = F.linear(patches, weight) + bias
    if gated:
        out, gate = out.chunk(2, -1)
        out = out * ACTIVATIONS[activation](gate)
    elif not full:
        if affine is not None:
            out = out * affine[0][:, None] + affine[1][:, None]
        out = ACTIVATIONS[activation](out)
    return (out if residual is None else out + residual).to(rows.dtype)


def _normalized(rows: Tensor, moments: Tensor, eps: float) -> Tensor:
    mean, square = moments.sum(1)[..., None] / rows.shape[2]  # [B, N, 1] each
    return ((rows - mean) * (square - mean * mean + eps).rsqrt()).to(rows.dtype)


def _patches(rows: Tensor, recorded: Tensor | None, sources: Tensor) -> Tensor:
    batch, number, channels = rows.shape
    parts = [rows, rows.new_zeros(batch, 1, channels)]
    if recorded is not None:
        parts.insert(1, recorded)
    everything = torch.cat(parts, 1)  # [B, N+R+1, C]
    index = sources.long().where(sources >= 0, everything.shape[1] - 1).expand(batch, -1, -1)
    return torch.take_along_dim(everything, index.reshape(batch, -1, 1), 1).view(batch, sources.shape[1], -1)
