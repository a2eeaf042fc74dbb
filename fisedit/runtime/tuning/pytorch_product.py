"""Products of rows by PyTorch, with kernels before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit.runtime.kernels.finish_rows.triton import finish_norm_rows, finish_rows
from fisedit.runtime.kernels.gather_patches.triton import gather_patches
from fisedit.runtime.kernels.layer_norm_rows.triton import layer_norm_rows


def multiply_by_library(
    rows: Tensor, rows2: Tensor | None, recorded: Tensor | None, sources: Tensor | None, weight: Tensor,
    bias: Tensor | None, affine: Tensor | None, full: bool, residual: Tensor | None,
    count: Tensor, locks: Tensor, activation: str, gated: bool, positions: int,
    rows3: Tensor | None = None, moments: Tensor | None = None,
    center: Tensor | None = None, input_eps: float = 0.0, norm: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """One kernel before PyTorch's product, and one after it, where there is something to do."""
    if moments is not None and moments.shape[1] > 0:
        rows = layer_norm_rows(rows, None, None, input_eps, count)
    parts = [part for part in (rows, rows2, rows3) if part is not None]
    if sources is not None:
        parts = [gather_patches(rows, recorded, sources, count, rows2, rows3).flatten(2)]  # [B, N', ...]
    if full:
        affine, activation = None, activation if gated else "none"
    if norm is not None:
        norm = {name: value for name, value in norm.items() if name != "norm_moments"}
        made = finish_norm_rows(add_products(parts, weight), bias, affine, residual, count, activation, gated, **norm)
        return *made, no_moments(made[0])
    bare = affine is None and residual is None and activation == "none" and not gated and len(parts) == 1
    if bare and (bias is None or bias.dtype == weight.dtype):
        return F.linear(parts[0], weight, bias)  # [B, N', Co]
    return finish_rows(add_products(parts, weight), bias, affine, residual, count, activation, gated)


def add_products(parts: list[Tensor], weight: Tensor) -> Tensor:
    """The product of each part of the channels, added in its place: no copy joins the parts."""
    first, *others = weight.split([part.shape[2] for part in parts], 1)
    out = F.linear(parts[0], first)  # [B, N', Co]
    for part, columns in zip(parts[1:], others, strict=True):
        out.flatten(0, 1).addmm_(part.flatten(0, 1), columns.t())
    return out


def no_moments(rows: Tensor) -> Tensor:
    """What stands for the moments of rows that come without."""
    return rows.new_empty(2, 0, *rows.shape[:2], dtype=torch.float32)  # [2, 0, B, N']
