"""Every architecture of the support table against its own untouched forward."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import architectures as a
import pytest
import torch
from architectures import Built, noise
from equivalence import check_equivalence

LABELS = {"class_labels": torch.tensor([1, 3])}
TIMES = {"class_labels": torch.tensor([3.0, 4.0])}
POOLED = {"class_labels": noise(2, 10)}
PROJECTED = {"projection_class_embeddings_input_dim": 10}
MASKED = {"encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])}
RESAMPLING = {"downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift"}

# Feature: how to build it. Nothing in these stays dense.
PACKED: dict[str, Callable[[], Built]] = {
    "SDXL refiner: added conditioning, several transformer layers": a.sdxl_refiner,
    "inpainting U-Nets (9 input channels)": partial(a.conditional, in_channels=9),
    "InstructPix2Pix (8 input channels, three-way guidance)": partial(a.conditional, in_channels=8, batch=3),
    "ControlNet residuals": a.controlnet,
    "T2I-Adapter features": a.t2i_adapter,
    "IP-Adapter": a.ip_adapter,
    "text masks (`encoder_attention_mask`)": partial(a.with_inputs, MASKED),
    "pruned U-Nets: no middle block": partial(a.conditional, mid_block_type=None),
    "pruned U-Nets: layers and transformer depth by level": partial(
        a.conditional, layers_per_block=(1, 2), transformer_layers_per_block=(2, 1)
    ),
    "class labels": partial(a.with_inputs, LABELS, num_class_embeds=10),
    "class labels as timesteps": partial(a.with_inputs, TIMES, class_embed_type="timestep"),
    "class embeddings, projected and concatenated": partial(
        a.with_inputs, POOLED, class_embed_type="projection", class_embeddings_concat=True, **PROJECTED
    ),
    "class embeddings, simple projection": partial(
        a.with_inputs, POOLED, class_embed_type="simple_projection", **PROJECTED
    ),
    "guidance embedding (`timestep_cond`, LCM)": partial(
        a.with_inputs, {"timestep_cond": noise(2, 6)}, time_cond_proj_dim=6, timestep_post_act="silu"
    ),
    "`only_cross_attention`, `upcast_attention`": partial(
        a.conditional, only_cross_attention=True, upcast_attention=True, act_fn="mish"
    ),
    '`resnet_time_scale_shift="scale_shift"`': partial(
        a.conditional, resnet_time_scale_shift="scale_shift", act_fn="relu"
    ),
    "other kernels of the first and last convolution": partial(
        a.conditional, conv_in_kernel=5, conv_out_kernel=1, act_fn="gelu"
    ),
    "`resnet_skip_time_act`, `resnet_out_scale_factor`, Fourier timesteps": partial(
        a.conditional, resnet_skip_time_act=True, resnet_out_scale_factor=0.7, time_embedding_type="fourier"
    ),
    "unconditional `UNet2DModel`": a.unconditional,
    "unconditional `UNet2DModel`, asymmetric padding": partial(a.unconditional, downsample_padding=0),
    "unconditional `UNet2DModel`, residual blocks that resample": partial(a.unconditional, **RESAMPLING),
    "DeepFloyd IF blocks with `only_cross_attention`": partial(a.if_style, only_cross_attention=True),
}

# Feature: how to build it, and what of it stays a dense island.
WITH_ISLANDS: dict[str, tuple[Callable[[], Built], set[str]]] = {
    "GLIGEN (its joint attention stays dense)": (a.gligen, {"cat"}),
    "DeepFloyd IF blocks (attention over text and positions stays dense)": (
        a.if_style,
        {"cat", "scaled_dot_product_attention"},
    ),
    "K blocks of the latent upscaler (resampling stays dense)": (a.latent_upscaler, {"pad", "conv_transpose2d"}),
}


def supported(table: dict[str, Any]) -> list[Any]:
    return [
        pytest.param(*(row if isinstance(row, tuple) else (row,)), id=name, marks=pytest.mark.supports("Models", name))
        for name, row in table.items()
    ]


@pytest.mark.parametrize("build", supported(PACKED))
def test_packed(build: Callable[[], Built]) -> None:
    h = check_equivalence(*build())
    assert not h.program.islands


@pytest.mark.parametrize(("build", "islands"), supported(WITH_ISLANDS))
def test_with_islands(build: Callable[[], Built], islands: set[str]) -> None:
    h = check_equivalence(*build())
    assert {re.sub(r"_\d+$", "", island.split()[0]) for island in h.program.islands} == islands
