"""From a photograph to a run that ends in it: DDIM inversion (Song et al. 2021, arXiv 2010.02502)."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from fisedit.errors import UnknownOptionError, UnsupportedPipelineError
from fisedit.recording import Recording
from fisedit.runtime.cache.store import clone_detached
from fisedit.sampling import Callback

INVERTIBLE = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
"""Settings under which DDIM can be run back and forth."""


def check_invertible(pipe: Any) -> None:
    """Raise unless a pipeline draws from a prompt and latents alone, with any scheduler.

    Raises:
        UnsupportedPipelineError: one that also takes a picture, or a consistency model's.
    """
    known = inspect.signature(pipe.__call__).parameters
    also = [name for name in ("image", "original_inference_steps") if name in known]
    if also or "latents" not in known:
        took = f" (it takes {', '.join(f'`{name}`' for name in also)})" if also else ""
        missing = [f"runs from a prompt and latents alone, which inversion needs{took}"]
        raise UnsupportedPipelineError(pipeline=type(pipe).__name__, missing=missing)


def encode(pipe: Any, image: Any, settings: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """A picture as scaled latents ``[1, C, H, W]``, and the settings with the size it was scaled to.

    The size is ``height`` by ``width`` if the settings have them; else the picture's proportions on about the area
    that the pipeline draws by default, in steps of 8 latent pixels.

    Raises:
        UnknownOptionError: no PIL image. UnsupportedPipelineError: the pipeline has no autoencoder.
    """
    if not isinstance(image, Image.Image):
        raise UnknownOptionError(option="image", given=type(image).__name__, allowed="a PIL image")
    if getattr(pipe, "vae", None) is None:
        raise UnsupportedPipelineError(pipeline=type(pipe).__name__, missing=["an autoencoder (`vae`)"])
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    side = pipe.unet.config.sample_size * factor
    scale = side / math.sqrt(image.width * image.height)
    grid = 8 * factor
    height = settings.get("height") or max(grid, round(image.height * scale / grid) * grid)
    width = settings.get("width") or max(grid, round(image.width * scale / grid) * grid)
    processor = VaeImageProcessor(vae_scale_factor=factor)
    pixels = processor.preprocess(image.convert("RGB"), height=height, width=width)
    with torch.no_grad():
        mode = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
    latents = (mode - (getattr(pipe.vae.config, "shift_factor", None) or 0)) * pipe.vae.config.scaling_factor
    return latents, {**settings, "height": height, "width": width}


def ddim_trajectory(
    pipe: Any, latents: Tensor, prompt: str, settings: Mapping[str, Any]
) -> tuple[DDIMScheduler, list[Tensor]]:
    """Carry latents to noise, without guidance.

    Returns:
        The scheduler that leads back, and the latents ``[1, C, H, W]`` at each noise level: the picture first, then
        one for each step, the noise last.

    Raises:
        UnknownOptionError: the pipeline's scheduler is not over variance-preserving noise with a beta schedule.
    """
    config = pipe.scheduler.config
    if "beta_schedule" not in config or config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        allowed = "a scheduler with a beta schedule that predicts epsilon or v"
        raise UnknownOptionError(option="scheduler", given=type(pipe.scheduler).__name__, allowed=allowed)
    inverse = copy.copy(pipe)
    inverse.scheduler = DDIMInverseScheduler.from_config(config, **INVERTIBLE)
    trajectory = [latents]

    def note(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        trajectory.append(clone_detached(kwargs["latents"]))
        return kwargs

    plain = {name: settings[name] for name in ("num_inference_steps", "height", "width")}
    inverse(
        prompt=prompt, latents=latents, guidance_scale=1.0, output_type="latent", callback_on_step_end=note, **plain
    )
    return leading_back(pipe), trajectory


def leading_back(pipe: Any) -> DDIMScheduler:
    """The scheduler that leads from an inversion's noise back to the picture."""
    return DDIMScheduler.from_config(pipe.scheduler.config, **INVERTIBLE)


def follow(trajectory: list[Tensor], recording: Recording) -> Callback:
    """A callback that puts the latents of an inversion in the place of a run's own, step by step.

    How far apart the two are is kept. While an edit seeks its mask it is moved by as much: then what tells the two runs
    apart is the words, not the way from the sampler's picture to the photograph (Direct Inversion, Ju et al. 2023,
    corrects its source branch so).
    """

    def on_step_end(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kept = trajectory[len(trajectory) - 2 - step]
        recording.corrections.append(kept - kwargs["latents"])
        return recording.on_step_end(pipe, step, timestep, {**kwargs, "latents": kept})

    return on_step_end
