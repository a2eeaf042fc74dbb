"""The published architectures at their full size, weights random: the graphs of real shapes are right.

On a GPU in float16, against the same model in float32; on a CPU the smallest of them in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from harness import Harness, masks

pytestmark = pytest.mark.nightly

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

CASES = [(name, "cuda", torch.float16) for name in MODELS] if torch.cuda.is_available() else []
TOLERANCES = {torch.float32: 2e-5, torch.float16: 1e-2}


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(model: Published, size: tuple[int, int], device: str, dtype: torch.dtype) -> dict[str, Any]:
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


@pytest.mark.parametrize(("name", "device", "dtype"), [("SD1.5", "cpu", torch.float32), *CASES])
def test_published_architectures(name: str, device: str, dtype: torch.dtype) -> None:
    published = MODELS[name]
    size = published.size if device == "cuda" else (16, 24)
    torch.manual_seed(0)
    with torch.device(device):
        model = UNet2DConditionModel(**published.config).eval().requires_grad_(False)
    with torch.no_grad():
        wanted = model(**arguments(published, size, device, torch.float32))[0]
    harness = Harness(model.to(dtype), arguments(published, size, device, dtype))
    assert harness.program.islands == []
    bound = TOLERANCES[dtype] * wanted.abs().max()
    assert (harness.recorded.float() - wanted).abs().max() <= bound
    chosen = masks(size)
    for kind in ("all", "blob", "corners", "ragged"):
        mask = chosen[kind].to(device)
        out = harness.edit(mask)
        assert (out.float() - wanted)[..., mask].abs().max() <= bound, kind
        assert torch.equal(out[..., ~mask], harness.recorded[..., ~mask])
    apart = torch.stack([chosen["blob"], chosen["ragged"]]).to(device)
    out = harness.edit(apart)
    assert all((out[i].float() - wanted[i])[:, apart[i]].abs().max() <= bound for i in (0, 1))
