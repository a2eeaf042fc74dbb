"""What people build of diffusers' U-Nets, narrow: each function gives a model and the arguments of one call."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DModel
from models import TEXT, arguments, one_level, sdxl
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]
SIZE = (6, 10)


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditional(batch: int = 2, size: tuple[int, int] = SIZE, **config: Any) -> Built:
    """A text-conditioned U-Net of two levels."""
    model = one_level(**config)
    return model, arguments(model, size, batch)


def with_inputs(inputs: dict[str, Any], **config: Any) -> Built:
    model, call = conditional(**config)
    return model, call | inputs


def sdxl_refiner() -> Built:
    """Four levels, attention in the middle ones, two transformer layers each, an aesthetic score in the time ids."""
    model = sdxl(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32, 48, 48), attention_head_dim=(2, 4, 6, 6), transformer_layers_per_block=2,
        projection_class_embeddings_input_dim=5 * 8 + 16,
    )  # fmt: skip
    call = arguments(model, (8, 16))
    call["added_cond_kwargs"]["time_ids"] = noise(2, 5)
    return model, call


def controlnet_and_t2i_adapter() -> Built:
    """Residuals of a ControlNet made from the U-Net, its zero convolutions moved off zero, and a T2I-Adapter's."""
    model, call = conditional()
    control = ControlNetModel.from_unet(model, conditioning_channels=3).eval()
    for name, parameter in control.named_parameters():
        if name.startswith("controlnet_") and name.endswith("weight"):
            parameter.detach().add_(0.1 * torch.eye(parameter.shape[0], parameter.shape[1])[:, :, None, None])
    adapter = T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=8).eval()
    picture = noise(2, 3, 8 * SIZE[0], 8 * SIZE[1])
    with torch.no_grad():
        down, middle = control(**call, controlnet_cond=picture, return_dict=False)
        features = adapter(picture)
    return model, call | {
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": middle,
        "down_intrablock_additional_residuals": features,
    }


def ip_adapter() -> Built:
    """Weights of an image prompt adapter, loaded as diffusers loads them; one picture's embedding of width 20."""
    model, call = conditional()
    torch.manual_seed(0)
    layers: dict[str, Tensor] = {}
    names = [name for name in model.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(names):
        width = model.get_submodule(name.removesuffix(".processor")).to_k.out_features
        layers |= {f"{2 * i + 1}.to_{kind}_ip.weight": torch.randn(width, TEXT) / 4 for kind in "kv"}
    projection = nn.ModuleDict({"proj": nn.Linear(20, 4 * TEXT), "norm": nn.LayerNorm(TEXT)}).state_dict()
    model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}], low_cpu_mem_usage=False)
    model.eval().requires_grad_(False)
    return model, call | {"added_cond_kwargs": {"image_embeds": [noise(2, 1, 20)]}}


def gligen() -> Built:
    """Boxes and phrases through gated self-attention, the gates open."""
    model, call = conditional(attention_type="gated")
    for name, parameter in model.named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):
            parameter.fill_(0.6)
    boxes = {"boxes": noise(2, 3, 4).sigmoid(), "positive_embeddings": noise(2, 3, TEXT), "masks": torch.ones(2, 3)}
    return model, call | {"cross_attention_kwargs": {"gligen": boxes}}


def if_style(**config: Any) -> Built:
    """DeepFloyd IF's blocks: attention over text and positions at once, residual blocks that resample."""
    return conditional(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift", act_fn="gelu", cross_attention_norm="group_norm",
        encoder_hid_dim=TEXT, addition_embed_type="text", addition_embed_type_num_heads=4, **config,
    )  # fmt: skip


def latent_upscaler() -> Built:
    """The x2 upscaler's K blocks: resampling by padded strided and transposed convolutions."""
    down, up = "KCrossAttnDownBlock2D", "KCrossAttnUpBlock2D"
    return conditional(
        size=(8, 16),
        down_block_types=("KDownBlock2D", down, down), mid_block_type=None, up_block_types=(up, up, "KUpBlock2D"),
        block_out_channels=(32, 64, 64), time_embedding_dim=64, time_embedding_type="fourier", act_fn="gelu",
        conv_in_kernel=1, conv_out_kernel=1, resnet_time_scale_shift="scale_shift", timestep_post_act="gelu",
    )  # fmt: skip


def unconditional(**config: Any) -> Built:
    """A U-Net without text, as DDPM's: attention over positions only."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8, "attention_head_dim": 8,
    }  # fmt: skip
    model = UNet2DModel(**defaults | config).eval().requires_grad_(False)
    return model, {"sample": noise(2, 3, *SIZE), "timestep": 5}
