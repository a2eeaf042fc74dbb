"""Recorded rows as int8 with a scale for each: a quarter of the memory and of the way over PCIe, or half.

Plain PyTorch, so that a compiler fuses it with what makes the rows or reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row by its largest magnitude, which becomes 127: no value is off by more than half a step, its row's scale.

    A row of zeros comes back as zeros; of a row with infinities or NaN nothing finite comes back.

    Args:
        rows: ``[B, R, C]``.
    Returns:
        int8 ``[B, R, C]``, float32 scales ``[B, R]``.
    """
    exact = rows.float()
    # Never 0, nor so small that the quotient is inexact.
    scales = (exact.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    steps = torch.round(exact / scales[..., None]).clamp(-127, 127)
    return steps.to(torch.int8), scales


def dequantize_rows(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values ``[B, R, C]`` of int8 ``rows`` ``[B, R, C]`` with ``scales`` ``[B, R]``, rounded to ``dtype``."""
    return (rows.float() * scales[..., None]).to(dtype)
