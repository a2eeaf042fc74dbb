"""Narrow U-Nets with random weights, of the real architectures' shapes, and calls for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

TEXT = 32
CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
CROSS_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3


def _unet(seed: int = 0, **config: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    defaults = {"in_channels": 4, "out_channels": 4, "layers_per_block": 1, "cross_attention_dim": TEXT}
    model = UNet2DConditionModel(**{**defaults, "norm_num_groups": 8, **config})
    return model.eval().requires_grad_(False)


def sd1(**config: Any) -> UNet2DConditionModel:
    """Stable Diffusion 1: 1x1-convolution projections around the transformer, heads of growing width."""
    return _unet(
        **{"sample_size": 16, "down_block_types": CROSS, "up_block_types": CROSS_UP,
           "block_out_channels": (16, 32, 48, 48), "attention_head_dim": 4, **config}
    )  # fmt: skip


def sd2(**config: Any) -> UNet2DConditionModel:
    """Stable Diffusion 2: linear projections, heads of equal width."""
    return _unet(
        **{"sample_size": 16, "down_block_types": CROSS, "up_block_types": CROSS_UP, "use_linear_projection": True,
           "block_out_channels": (16, 32, 48, 48), "attention_head_dim": (2, 4, 6, 6), **config}
    )  # fmt: skip


def sdxl(**config: Any) -> UNet2DConditionModel:
    """Stable Diffusion XL: three levels, deep transformers, added conditioning."""
    return _unet(
        **{"sample_size": 16, "down_block_types": ("DownBlock2D", *CROSS[:2]), "use_linear_projection": True,
           "up_block_types": (*CROSS_UP[1:3], "UpBlock2D"), "block_out_channels": (16, 32, 48),
           "attention_head_dim": (2, 4, 6), "transformer_layers_per_block": (1, 1, 3),
           "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
           "projection_class_embeddings_input_dim": 6 * 8 + 16, **config}
    )  # fmt: skip


def one_level(**config: Any) -> UNet2DConditionModel:
    """A small model of two levels, for tests that are not about the architecture: captured in a second."""
    return _unet(
        **{"sample_size": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
           "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (16, 32),
           "attention_head_dim": 8, **config}
    )  # fmt: skip


def arguments(model: nn.Module, size: tuple[int, int], batch: int = 2, seed: int = 1) -> dict[str, Any]:
    """Keyword arguments of one call: sample ``[B, C, H, W]``, timestep, text ``[B, 7, 32]``, added conditions."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    call: dict[str, Any] = {
        "sample": noise(batch, model.config.in_channels, *size),
        "timestep": 500,
        "encoder_hidden_states": noise(batch, 7, TEXT),
    }
    if model.config.addition_embed_type == "text_time":
        call["added_cond_kwargs"] = {"text_embeds": noise(batch, 16), "time_ids": noise(batch, 6)}
    return call


class OpenAIStyleUNet(nn.Module):
    """A U-Net in the style of the original Stable Diffusion code: nothing of diffusers in it.

    Attention by einsum over ``(b h) n d``, GroupNorm through float32, a sequential timestep embedding, stride-2
    downsampling, interpolation by factor.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(width, width * 2), nn.SiLU(), nn.Linear(width * 2, width * 2))
        self.width = width
        self.stem = nn.Conv2d(4, width, 3, padding=1)
        self.down_block = ResidualStyle(width, width, width * 2)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.middle = ResidualStyle(width, width * 2, width * 2)
        self.attention = EinsumTransformer(width * 2, heads=4)
        self.up = nn.Conv2d(width * 2, width * 2, 3, padding=1)
        self.up_block = ResidualStyle(width * 3, width, width * 2)
        self.out = nn.Sequential(Float32GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(self.width // 2, device=x.device) / 2.0)
        angles = timesteps[:, None].float() * frequencies[None]
        embedding = self.time(torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype))
        skip = self.down_block(self.stem(x), embedding)
        h = self.attention(self.middle(self.down(skip), embedding), context)
        h = self.up(nn.functional.interpolate(h, scale_factor=2, mode="nearest"))
        return self.out(self.up_block(torch.cat([h, skip], 1), embedding))


class Float32GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class ResidualStyle(nn.Module):
    def __init__(self, source: int, target: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(Float32GroupNorm(4, source), nn.SiLU(), nn.Conv2d(source, target, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, target))
        self.out_layers = nn.Sequential(
            Float32GroupNorm(4, target), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(target, target, 3, padding=1)
        )
        self.skip = nn.Conv2d(source, target, 1) if source != target else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip(x) + self.out_layers(h)


class EinsumTransformer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = Float32GroupNorm(4, width)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.q1, self.k1, self.v1, self.o1 = (nn.Linear(width, width) for _ in range(4))
        self.q2, self.o2 = nn.Linear(width, width), nn.Linear(width, width)
        self.k2, self.v2 = nn.Linear(TEXT, width), nn.Linear(TEXT, width)
        self.gate, self.back = nn.Linear(width, width * 4), nn.Linear(width * 2, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(b, c, h * w).permute(0, 2, 1).contiguous()
        normed = self.norms[0](tokens)
        tokens = tokens + self.o1(self.attend(self.q1(normed), self.k1(normed), self.v1(normed)))
        normed = self.norms[1](tokens)
        tokens = tokens + self.o2(self.attend(self.q2(normed), self.k2(context), self.v2(context)))
        value, gate = self.gate(self.norms[2](tokens)).chunk(2, -1)
        tokens = tokens + self.back(value * nn.functional.gelu(gate))
        return x + self.proj_out(tokens.permute(0, 2, 1).reshape(b, c, h, w))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch = query.shape[0]

        def split(t: Tensor) -> Tensor:
            b, n, c = t.shape
            return t.view(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3).reshape(b * self.heads, n, -1)

        query, key, value = map(split, (query, key, value))
        scores = torch.einsum("b i d, b j d -> b i j", query, key) * query.shape[-1] ** -0.5
        out = torch.einsum("b i j, b j d -> b i d", scores.softmax(dim=-1), value)
        out = out.view(batch, self.heads, out.shape[1], -1).permute(0, 2, 1, 3)
        return out.reshape(batch, out.shape[1], -1)
