"""ComfyUI nodes: generate a picture and keep its feature maps, then compute again only what other words touch.

Copy this file into ComfyUI's `custom_nodes` folder and install fisedit into ComfyUI's Python environment.

    Load Checkpoint ── FISEdit Compile ── FISEdit Record ── FISEdit Edit ── VAE Decode

- Compile makes the U-Net one that can record and edit. Outside the two samplers it is the same dense model.
- Record is a KSampler that also gives a base: all settings of the run, and its feature maps.
- Edit takes a base and a prompt with other words; everything else is the base's. The region is found, or given as a
  mask. Its latent can be decoded, its base edited by further Edit nodes.
"""

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.samplers
import nodes
import torch

import fisedit
from fisedit.module import CompiledUNet
from fisedit.recording import Recording

CATEGORY = "FISEdit"


@dataclass
class Base:
    """What an edit starts from: the patched model, the arguments of its sampler, its latent and its recording."""

    model: Any
    arguments: dict[str, Any]
    latent: dict[str, Any]
    recording: Recording


class Compile:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "compile"
    CATEGORY = CATEGORY
    DESCRIPTION = "The same model, able to record and to edit. Put it after LoRA loaders."

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "kv": (["cached", "active"],)}}

    def compile(self, model, kv):
        if "model_function_wrapper" in model.model_options:
            raise ValueError(
                "Another node wraps the calls of this U-Net (caching, tiling, ...); FISEdit cannot follow it."
            )
        patched = model.clone()
        patched.add_object_patch("diffusion_model", fisedit.compile(patched.get_model_object("diffusion_model"), kv=kv))
        patched.set_model_unet_function_wrapper(call_unet)
        return (patched,)


class Record:
    RETURN_TYPES = ("LATENT", "FISEDIT_BASE")
    RETURN_NAMES = ("latent", "base")
    FUNCTION = "sample"
    CATEGORY = CATEGORY
    DESCRIPTION = "KSampler that keeps what an edit needs. The base holds some gigabytes at large sizes and many steps."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "seed": ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True}),
                "steps": ("INT", {"default": 20, "min": 2, "max": 1000}),
                "cfg": ("FLOAT", {"default": 7.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "sampler_name": (comfy.samplers.KSampler.SAMPLERS,),
                "scheduler": (comfy.samplers.KSampler.SCHEDULERS,),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "latent_image": ("LATENT",),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}),
            }
        }

    def sample(self, model, positive, latent_image, **arguments):
        unet = compiled_unet(model)
        arguments |= {"latent": latent_image}
        with unet.record() as recording:
            (latent,) = nodes.common_ksampler(model, positive=positive, **arguments)
        return latent, Base(model, arguments, latent, recording)


class Edit:
    RETURN_TYPES = ("LATENT", "MASK")
    RETURN_NAMES = ("latent", "region")
    FUNCTION = "sample"
    CATEGORY = CATEGORY
    DESCRIPTION = "Computes again only what the new words touch. Outside the region the latent stays bit for bit."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"base": ("FISEDIT_BASE",), "positive": ("CONDITIONING",)},
            "optional": {"mask": ("MASK",)},
        }

    def sample(self, base, positive, mask=None):
        unet = compiled_unet(base.model)
        with unet.edit(base.recording, mask) as edit:
            (latent,) = nodes.common_ksampler(base.model, positive=positive, **base.arguments)
        region = edit.masks.cpu()  # [1 or K, H, W]
        # A found region leaves small differences of the first, dense steps outside it.
        samples = torch.where(region[:, None], latent["samples"], base.latent["samples"])  # [K, C, H, W]
        return {**latent, "samples": samples}, region.float()


def compiled_unet(model: Any) -> CompiledUNet:
    """The compiled U-Net of a MODEL, in place and with its LoRAs: a model must not change while it is recorded."""
    unet = model.get_model_object("diffusion_model")
    if not isinstance(unet, CompiledUNet):
        raise ValueError("This model was not compiled; put the node FISEdit Compile before the sampler.")
    comfy.model_management.load_models_gpu([model])
    return unet


def call_unet(apply_model: Any, call: dict[str, Any]) -> torch.Tensor:
    """Call the U-Net without `transformer_options` (a unet function wrapper, as ModelPatcher takes it).

    They hold numbers that are new in every run, which no graph may depend on, and functions that others hook into the
    U-Net. A recorded graph would keep running those as they were, so they are refused.
    """
    conditions = dict(call["c"])
    options = conditions.pop("transformer_options", {})
    wrappers = options.get("wrappers", {})
    hooks = {name: options.get(name) for name in ("patches", "patches_replace", "optimized_attention_override")}
    hooks |= {name: wrappers.get(name) for name in ("apply_model", "diffusion_model")}
    if used := [name for name, hook in hooks.items() if _holds_anything(hook)]:
        raise ValueError(f"Another node changes what the U-Net computes ({', '.join(used)}); FISEdit cannot follow it.")
    return apply_model(call["input"], call["timestep"], **conditions, transformer_options={})


def _holds_anything(hook: Any) -> bool:
    values = hook.values() if isinstance(hook, dict) else hook if isinstance(hook, (list, tuple)) else [hook]
    return any(_holds_anything(v) if isinstance(v, (dict, list, tuple)) else v is not None for v in values)


NODE_CLASS_MAPPINGS = {"FISEditCompile": Compile, "FISEditRecord": Record, "FISEditEdit": Edit}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FISEditCompile": "FISEdit Compile",
    "FISEditRecord": "FISEdit Record",
    "FISEditEdit": "FISEdit Edit",
}
