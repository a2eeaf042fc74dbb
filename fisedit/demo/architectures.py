"""The untrained parts of the demo model: small editions of what Stable Diffusion 2 is made of."""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from .tokenizer import MAX_LENGTH

TEXT_WIDTH = 192
"""Channels of the text features that the U-Net attends to."""


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Returns the text and image encoders with their projections (about 2 and 2.4 M parameters)."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=128,
        patch_size=8,
        projection_dim=128,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    return CLIPModel(config)


def build_vae() -> AutoencoderKL:
    """Returns the autoencoder: 256x256 images to 64x64 latents of 4 channels (about 2 M parameters)."""
    return AutoencoderKL(
        sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Returns the SD2-shaped denoiser: cross-attention at three levels, linear projections, 14.9 M parameters."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 6, 6),
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    """Returns the noise schedule that training and sampling share.

    Its last step holds no trace of the image (Lin et al. 2023, "Common diffusion noise schedules and sample steps are
    flawed"), so that night is dark and snow is bright; that asks for v-prediction and for timesteps that start at the
    last one ("trailing").
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
