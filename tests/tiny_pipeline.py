"""Stable Diffusion pipelines with random weights that draw an image in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fisedit import EditResult, Generation
from fisedit.demo.tokenizer import build_tokenizer

LATENT = 16
"""Height and width of the latents; images are twice as large."""
TEXT = 32

BEFORE = "a red house on the left, on grass, at noon"
AFTER = "a blue house on the left, on grass, at noon"


def square(top: int = 4, left: int = 5, height: int = 6, width: int = 5) -> Tensor:
    """A mask, bool ``[H, W]``."""
    mask = torch.zeros(LATENT, LATENT, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def picture(seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth random picture of the pipelines' size; mode ``L`` is black and white, as for inpainting."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((2 * LATENT, 2 * LATENT), Image.Resampling.BILINEAR).convert(mode)
    return image if mode != "L" else image.point(lambda value: 255 * (value > 127))


def assert_background_kept(result: EditResult, base: Generation) -> None:
    """Outside its mask, an edit's latents are its base's, bit for bit."""
    outside = ~result.mask
    assert outside.any() and torch.equal(result.latents[..., outside], base.latents[..., outside])
    assert result.background_is_identical and result.latents.isfinite().all()


def build_unet(**config: Any) -> UNet2DConditionModel:
    """Cross-attention at the upper level and in the middle, a stride-2 and a nearest-upsampling convolution: every op
    kind of the big ones. Random weights hardly hear the text; theirs do."""
    defaults: dict[str, Any] = {
        "sample_size": LATENT, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
        "cross_attention_dim": TEXT, "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    unet = UNet2DConditionModel(**{**defaults, **config}).eval()
    for name, parameter in unet.named_parameters():
        if "attn2.to_v" in name or "attn2.to_q" in name:
            parameter.data *= 4
    return unet


def build_components(folder: Path, **unet: Any) -> dict[str, Any]:
    """The parts of a Stable Diffusion pipeline; ``folder`` takes the tokenizer's files, ``unet`` its config."""
    tokenizer = build_tokenizer(folder / "tokenizer")
    text = _text_config(tokenizer)
    made = build_unet(**unet)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=2 * LATENT,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    return {"vae": vae, "text_encoder": CLIPTextModel(text).eval(), "tokenizer": tokenizer, "unet": made,
            "scheduler": scheduler}  # fmt: skip


def _text_config(tokenizer: Any, **config: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=64, num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **{"num_hidden_layers": 1, **config},
    )  # fmt: skip


def build_tiny_pipeline(
    folder: Path, seed: int = 0, kind: type = StableDiffusionPipeline, unet: dict[str, Any] | None = None, **parts: Any
) -> Any:
    """A pipeline of ``kind``; ``unet`` changes the U-Net's config, ``parts`` are further components."""
    torch.manual_seed(seed)
    components = build_components(folder, **(unet or {}))
    unsafe = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return quiet(kind(**components, **unsafe, **parts))


def build_tiny_sdxl(folder: Path, seed: int = 0) -> StableDiffusionXLPipeline:
    """Two text encoders side by side, pooled text and sizes as added conditions."""
    torch.manual_seed(seed)
    components = build_components(
        folder, cross_attention_dim=2 * TEXT, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    tokenizer = components["tokenizer"]
    first = CLIPTextModel(_text_config(tokenizer, num_hidden_layers=2)).eval()
    second = CLIPTextModelWithProjection(_text_config(tokenizer, num_hidden_layers=2, projection_dim=16)).eval()
    components |= {"text_encoder": first, "text_encoder_2": second, "tokenizer_2": tokenizer}
    return quiet(StableDiffusionXLPipeline(**components, add_watermarker=False))


def build_controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """A ControlNet for a U-Net, whose residuals are not zero."""
    torch.manual_seed(seed)
    made = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16), load_weights_from_unet=False)
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


def quiet(pipe: Any) -> Any:
    """Without progress bars."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
