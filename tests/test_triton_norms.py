"""Normalization of active rows and what follows a product of them, references and Triton kernels, against float64.

Without a GPU the kernels run interpreted.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from fisedit.runtime.kernels.finish_rows import reference as finish_reference  # noqa: E402
from fisedit.runtime.kernels.finish_rows.triton import finish_norm_rows, finish_rows  # noqa: E402
from fisedit.runtime.kernels.fold_group_norms import reference as fold_reference  # noqa: E402
from fisedit.runtime.kernels.fold_group_norms.triton import fold_group_norms  # noqa: E402
from fisedit.runtime.kernels.layer_norm_rows import reference as layer_reference  # noqa: E402
from fisedit.runtime.kernels.layer_norm_rows.triton import layer_norm_rows  # noqa: E402
from fisedit.runtime.kernels.normalize_rows import reference as normalize_reference  # noqa: E402
from fisedit.runtime.kernels.normalize_rows.triton import normalize_rows  # noqa: E402

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of the largest result: half a unit in its last place, and a little."""


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(out: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert (out.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("c1", "c2", "activation"), [(40, 0, "silu"), (136, 24, "none"), (9, 130, "silu")])
def test_normalize_rows(dtype: torch.dtype, c1: int, c2: int, activation: str) -> None:
    """Slices of wider buffers; rows past the count are left alone."""
    number, count = 21, 12
    rows = random(2, number, 160, seed=0, dtype=dtype)[..., :c1]
    rows2 = random(2, number, c2, seed=1, dtype=dtype) if c2 else None
    affine = random(2, 2, 200, seed=2)[..., 24 : 24 + c1 + c2]
    joined = rows.double() if rows2 is None else torch.cat([rows, rows2], -1).double()
    wanted = torch.empty_like(joined)
    for sample in range(2):
        for channel in range(c1 + c2):
            scale, offset = affine[:, sample, channel].tolist()
            wanted[sample, :, channel] = joined[sample, :, channel] * scale + offset
    if activation == "silu":
        wanted = wanted / (1 + torch.exp(-wanted))
    limit = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    check(normalize_reference.normalize_rows(rows, rows2, affine, activation, limit), wanted, dtype)
    out = normalize_rows(rows, rows2, affine, activation, limit)
    assert out.shape == wanted.shape and out.dtype == dtype
    check(out[:, :count], wanted[:, :count], dtype)


@pytest.mark.parametrize("shifted", [None, 1, 2])
@pytest.mark.parametrize("addresses", [False, True])
def test_folded_norms_are_group_norms(shifted: int | None, addresses: bool) -> None:
    """Three norms of one network: each one's slice of the scales and offsets does what ``F.group_norm`` does."""
    channels, groups, eps = [40, 6, 256], [8, 3, 32], 1e-5
    total = sum(channels)
    weight, bias = random(total, seed=0), random(total, seed=1)
    shift = random(shifted, total, seed=2, dtype=torch.float16) if shifted else None
    recorded, wanted, inputs = [], [], []
    for number, (size, group, w, b) in enumerate(
        zip(channels, groups, weight.split(channels), bias.split(channels), strict=True)
    ):
        x = random(2, size, 11, seed=10 + number).double()
        moved = x if shift is None else x + shift.double().split(channels, 1)[number][..., None]
        wanted.append(F.group_norm(moved, group, w.double(), b.double(), eps))
        inputs.append(x)
        variance, mean = torch.var_mean(moved.unflatten(1, (group, -1)), (2, 3), correction=0)
        recorded += [mean, torch.rsqrt(variance + eps)]
    given = ([4, 0, 2], [5, 1, 3])  # the third norm's statistics were recorded first
    recorded = [recorded[i] for i in (2, 3, 4, 5, 0, 1)]
    rest = (*given, groups, channels, weight, bias, shift)
    exact = fold_reference.fold_group_norms(recorded, *rest)
    assert exact.dtype == torch.float64
    single = [t.float() for t in recorded]
    table = torch.tensor([[row.data_ptr() for row in t] for t in single], device=DEVICE)
    out = fold_group_norms(table if addresses else single, *rest)
    assert out.dtype == torch.float32 and out.is_contiguous()
    for affine, tolerance in ((exact, 1e-10), (out.double(), 1e-5)):
        for x, y, (scale, offset) in zip(inputs, wanted, affine.split(channels, 2), strict=True):
            torch.testing.assert_close(x * scale[..., None] + offset[..., None], y, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("channels", "parts"), [(40, "weight, bias"), (1300, "weight"), (320, "")])
def test_layer_norm_rows(dtype: torch.dtype, channels: int, parts: str) -> None:
    rows = random(2, 9, 3 * channels, seed=0, dtype=dtype)[..., channels : 2 * channels] + 5
    weight = random(channels, seed=1, dtype=dtype) if "weight" in parts else None
    bias = random(channels, seed=2, dtype=dtype) if "bias" in parts else None
    x = rows.double()
    wanted = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 0.1).sqrt()
    if weight is not None:
        wanted = wanted * weight.double()
    if bias is not None:
        wanted = wanted + bias.double()
    limit = torch.tensor([6], dtype=torch.int32, device=DEVICE)
    check(layer_reference.layer_norm_rows(rows, weight, bias, 0.1, limit), wanted, dtype)
    out = layer_norm_rows(rows, weight, bias, 0.1, limit)
    assert out.dtype == dtype
    check(out[:, :6], wanted[:, :6], dtype)


def activate(x: Tensor, name: str) -> Tensor:
    """Activations as their papers write them."""
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    if name == "gelu_tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("parts", "activation"),
    [
        ("bias affine", "silu"), ("bias gated", "gelu"), ("wide bias, residual", "none"), ("affine residual", "gelu"),
        ("gated residual", "gelu_tanh"), ("wide bias, gated", "gelu"),
    ],
)  # fmt: skip
def test_finish_rows(dtype: torch.dtype, parts: str, activation: str) -> None:
    """Slices of wider buffers; rows past the count are left alone; the bias may be more exact than the product."""
    number, count, channels = 11, 6, 136
    width = 2 * channels if "gated" in parts else channels
    product = random(2, number, width + 24, seed=0, dtype=dtype)[..., 8 : 8 + width]
    bias = random(width, seed=1, dtype=torch.float32 if "wide" in parts else dtype) if "bias" in parts else None
    affine = random(2, 2, 200, seed=2)[..., 24 : 24 + channels] if "affine" in parts else None
    residual = random(2, number, 160, seed=3, dtype=dtype)[..., 16 : 16 + channels] if "residual" in parts else None
    wanted = product.double() if bias is None else product.double() + bias.double()
    if affine is not None:
        wanted = wanted * affine[0].double().unsqueeze(1) + affine[1].double().unsqueeze(1)
    if "gated" in parts:
        wanted = wanted[..., :channels] * activate(wanted[..., channels:], activation)
    else:
        wanted = activate(wanted, activation)
    if residual is not None:
        wanted = wanted + residual.double()
    limit = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    rest = (bias, affine, residual, limit, activation, "gated" in parts)
    check(finish_reference.finish_rows(product, *rest), wanted, dtype)
    out = finish_rows(product, *rest)
    assert out.shape == wanted.shape and out.dtype == dtype
    check(out[:, :count], wanted[:, :count], dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("channels", "parts"),
    [
        (136, "bias residual layer norm"), (1300, "residual layer norm, no parameters"), (40, "gated layer norm"),
        (136, "bias residual affine"), (40, "affine silu"),
    ],
)  # fmt: skip
def test_finished_rows_are_normalized_too(dtype: torch.dtype, channels: int, parts: str) -> None:
    """From what they are rounded to: exactly what the kernels of the norms make of them."""
    number, count, gated = 11, 6, "gated" in parts
    width = 2 * channels if gated else channels
    product = random(2, number, width + 24, seed=0, dtype=dtype)[..., 8 : 8 + width] + 3
    bias = random(width, seed=1, dtype=dtype) if "bias" in parts else None
    residual = random(2, number, 1400, seed=3, dtype=dtype)[..., 16 : 16 + channels] if "residual" in parts else None
    affine = random(2, 2, 200, seed=2)[..., 24 : 24 + channels] if "affine" in parts else None
    weight, offset = (random(channels, seed=4 + i, dtype=dtype) for i in range(2))
    if "no parameters" in parts:
        weight = offset = None
    limit = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    rest = (bias, None, residual, limit, "gelu" if gated else "none", gated)
    norm = (affine, "silu" if "silu" in parts else "none", weight, offset, 0.1)
    out, normalized = finish_norm_rows(product, *rest, *norm)
    assert torch.equal(out[:, :count], finish_rows(product, *rest)[:, :count])
    alone = (layer_norm_rows(out, weight, offset, 0.1, limit) if affine is None
             else normalize_rows(out, None, affine, norm[1], limit))  # fmt: skip
    assert normalized.dtype == dtype and torch.equal(normalized[:, :count], alone[:, :count])
    x = out.double()
    if affine is None:
        wanted = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 0.1).sqrt()
        wanted = wanted if weight is None else wanted * weight.double() + offset.double()
    else:
        wanted = activate(x * affine[0].double().unsqueeze(1) + affine[1].double().unsqueeze(1), norm[1])
    check(normalized[:, :count], wanted[:, :count], dtype)
    rounded, reference = finish_reference.finish_norm_rows(product, *rest, *norm)
    assert rounded.dtype == reference.dtype == dtype
    torch.testing.assert_close(reference[:, :count].double(), wanted[:, :count], atol=0.05, rtol=0.02)
