"""Every architecture of the support table against its own untouched forward. One model may prove several rows."""

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

TEXT_MASK = {"encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])}
PROJECTED = {"projection_class_embeddings_input_dim": 10}
RESAMPLING = {"downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift"}

# Rows of the table: a model that has all of it. Nothing in these stays dense.
PACKED: dict[tuple[str, ...], Callable[[], Built]] = {
    ("SDXL refiner: added conditioning, several transformer layers",): a.sdxl_refiner,
    ("inpainting U-Nets (9 input channels)", "text masks (`encoder_attention_mask`)",
     "guidance embedding (`timestep_cond`, LCM)"): partial(
        a.with_inputs, {**TEXT_MASK, "timestep_cond": noise(2, 6)},
        in_channels=9, time_cond_proj_dim=6, timestep_post_act="silu",
    ),
    ("InstructPix2Pix (8 input channels, three-way guidance)", "class labels",
     "`resnet_skip_time_act`, `resnet_out_scale_factor`, Fourier timesteps"): partial(
        a.with_inputs, {"class_labels": torch.tensor([1, 3, 5])}, in_channels=8, batch=3, num_class_embeds=10,
        resnet_skip_time_act=True, resnet_out_scale_factor=0.7, time_embedding_type="fourier",
    ),
    ("ControlNet residuals", "T2I-Adapter features"): a.controlnet_and_t2i_adapter,
    ("IP-Adapter",): a.ip_adapter,
    ("pruned U-Nets: no middle block; layers and transformer depth by level", "class labels as timesteps"): partial(
        a.with_inputs, {"class_labels": torch.tensor([3.0, 4.0])}, class_embed_type="timestep",
        mid_block_type=None, layers_per_block=(1, 2), transformer_layers_per_block=(2, 1),
    ),
    ("class embeddings, projected and concatenated", "`only_cross_attention`, `upcast_attention`"): partial(
        a.with_inputs, {"class_labels": noise(2, 10)}, class_embed_type="projection", class_embeddings_concat=True,
        only_cross_attention=True, upcast_attention=True, act_fn="mish", **PROJECTED,
    ),
    ("class embeddings, simple projection", '`resnet_time_scale_shift="scale_shift"`',
     "other kernels of the first and last convolution"): partial(
        a.with_inputs, {"class_labels": noise(2, 10)}, class_embed_type="simple_projection",
        resnet_time_scale_shift="scale_shift", act_fn="relu", conv_in_kernel=5, conv_out_kernel=1, **PROJECTED,
    ),
    ("unconditional `UNet2DModel`, asymmetric padding",): partial(a.unconditional, downsample_padding=0),
    ("unconditional `UNet2DModel`, residual blocks that resample",): partial(a.unconditional, **RESAMPLING),
}  # fmt: skip

# The same, with what of it stays a dense island.
WITH_ISLANDS: dict[tuple[str, ...], tuple[Callable[[], Built], set[str]]] = {
    ("DeepFloyd IF blocks (attention over text and positions stays dense)",): (
        a.if_style, {"cat", "scaled_dot_product_attention"},
    ),
    ("GLIGEN (its joint attention stays dense)",): (a.gligen, {"cat"}),
    ("K blocks of the latent upscaler (padding by reflection stays dense)",): (a.latent_upscaler, {"pad"}),
}  # fmt: skip


def supported(table: dict[tuple[str, ...], Any], *marks: pytest.MarkDecorator) -> list[Any]:
    return [
        pytest.param(case, id=", ".join(names), marks=[*marks, *(pytest.mark.supports("Models", n) for n in names)])
        for names, case in table.items()
    ]


@pytest.mark.parametrize("build", supported(PACKED))
def test_packed(build: Callable[[], Built]) -> None:
    h = check_equivalence(*build())
    assert not h.program.islands


@pytest.mark.parametrize("case", supported(WITH_ISLANDS, pytest.mark.nightly))
def test_with_islands(case: tuple[Callable[[], Built], set[str]]) -> None:
    build, islands = case
    h = check_equivalence(*build())
    assert {re.sub(r"_\d+$", "", island.split()[0]) for island in h.program.islands} == islands
