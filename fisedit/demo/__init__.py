"""A small Stable Diffusion pipeline that ships with the package, and everything that made it.

It draws captioned scenes of 256x256 pixels ("a red house with a flag on the left, on grass, at noon"); see
`MODEL_CARD.md` beside this file.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from .clip import DemoClip

__all__ = ["image_encoder_path", "load_clip", "load_pipeline", "model_path"]


def model_path() -> Path:
    """Returns the folder that `StableDiffusionPipeline.from_pretrained` loads the demo model from."""
    return Path(str(files(__name__) / "model"))


def image_encoder_path() -> Path:
    """Returns the folder of the image encoder and the text projection."""
    return Path(str(files(__name__) / "image_encoder"))


def load_pipeline(
    torch_dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", folder: Path | None = None
) -> StableDiffusionPipeline:
    """Loads the demo model (or one trained into `folder`) with no network."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        folder or model_path(), dtype=torch_dtype, local_files_only=True, safety_checker=None
    )
    return pipe.to(device)


def load_clip(device: str | torch.device = "cpu") -> DemoClip:
    """Loads the text and image encoders in float32: `.embed_text`, `.embed_images`, `.confirms`."""
    from .clip import DemoClip

    return DemoClip.load(model_path(), image_encoder_path(), device)
