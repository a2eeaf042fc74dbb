"""The published architectures at their full size, with random weights, and calls for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

CROSS, UP = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
SD = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*CROSS, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *UP),
}
ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True}


@dataclass(frozen=True)
class Published:
    """A configuration, the latents it draws, and the width of its pooled text embedding and its size conditions."""

    config: dict[str, Any]
    size: tuple[int, int]
    pooled: int = 0
    ids: int = 0


MODELS = {
    "SD1.5": Published({**SD, "cross_attention_dim": 768, "attention_head_dim": 8}, (64, 64)),
    "SD1.5 inpainting": Published(
        {**SD, "cross_attention_dim": 768, "attention_head_dim": 8, "in_channels": 9}, (64, 64)
    ),
    "SD2.1": Published(
        {**SD, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        (96, 96),
    ),
    "SDXL": Published(
        {**ADDED, "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", *CROSS[:2]),
         "up_block_types": (*UP[:2], "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
         "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
         "projection_class_embeddings_input_dim": 2816}, (128, 128), 1280, 6,
    ),
    "SDXL refiner": Published(
        {**ADDED, "block_out_channels": (384, 768, 1536, 1536),
         "down_block_types": ("DownBlock2D", *CROSS[:2], "DownBlock2D"),
         "up_block_types": ("UpBlock2D", *UP[:2], "UpBlock2D"), "transformer_layers_per_block": 4,
         "attention_head_dim": (6, 12, 24, 24), "cross_attention_dim": 1280,
         "projection_class_embeddings_input_dim": 2560}, (128, 128), 1280, 5,
    ),
}  # fmt: skip

TINY = Published(
    {"in_channels": 4, "out_channels": 4, "layers_per_block": 1, "cross_attention_dim": 32, "norm_num_groups": 8,
     "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (16, 32),
     "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8}, (16, 24),
)  # fmt: skip
"""For trying a script out on any machine."""


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(model: Published, device: torch.device | str, dtype: torch.dtype) -> UNet2DConditionModel:
    """The U-Net with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**model.config).eval().requires_grad_(False)
    return nn.Module.to(unet, dtype)  # diffusers' own only adds a warning


def arguments(
    model: Published, size: tuple[int, int], device: torch.device | str, dtype: torch.dtype
) -> dict[str, Any]:
    """A call of batch 2: sample ``[2, C, H, W]``, text ``[2, 77, D]``, added conditions, timestep 501."""
    channels = model.config.get("in_channels", 4)
    call: dict[str, Any] = {
        "sample": noise(2, channels, *size, seed=1),
        "encoder_hidden_states": noise(2, 77, model.config["cross_attention_dim"], seed=2),
    }
    if model.pooled:
        call["added_cond_kwargs"] = {
            "text_embeds": noise(2, model.pooled, seed=3),
            "time_ids": torch.ones(2, model.ids),
        }
    moved = torch.utils._pytree.tree_map(lambda value: value.to(device, dtype), call)
    return {**moved, "timestep": 501}
