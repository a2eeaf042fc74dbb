"""Stand-ins for the few interfaces of ComfyUI that the example nodes touch, written from its documentation.

`nodes.common_ksampler`, `comfy.samplers.KSampler`, `comfy.model_management.load_models_gpu`, a ModelPatcher and a
BaseModel. They do what ComfyUI does as far as the nodes can notice: patches take effect when the model is loaded, LoRAs
replace parameters, conditions run in one call or in several, every call carries options that are new in every run.
"""

from __future__ import annotations

import copy
import math
import types
import uuid
from collections.abc import Callable
from typing import Any

import torch
from models import OpenAIStyleUNet
from torch import Tensor, nn


class ComfyUNet(OpenAIStyleUNet):
    """A U-Net of ComfyUI's calling convention: ControlNet residuals, hooks, options that it writes to."""

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None,
        control: dict[str, list[Tensor]] | None = None, transformer_options: dict[str, Any] = {}, **kwargs: Any,  # noqa: B006
    ) -> Tensor:  # fmt: skip
        transformer_options["original_shape"] = list(x.shape)
        for hook in transformer_options.get("patches", {}).get("input", []):
            x = hook(x)
        if control is not None:
            x = x + control["input"].pop()
        return super().forward(x, timesteps, context)


class BaseModel(nn.Module):
    """What holds the U-Net: sample and sigma in, denoised sample out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.diffusion_model = ComfyUNet()
        self.eval().requires_grad_(False)
        self.register_buffer("sigmas", torch.logspace(-1.5, 1.2, 1000))

    def apply_model(
        self, x: Tensor, t: Tensor, c_crossattn: Tensor | None = None, control: Any = None,
        transformer_options: dict[str, Any] = {}, **kwargs: Any,  # noqa: B006
    ) -> Tensor:  # fmt: skip
        sigma = t[:, None, None, None]
        timestep = (t[:, None] - self.sigmas).abs().argmin(1).float()
        options = {**transformer_options, "prefetch_dynamic_vbars": False}
        noise = self.diffusion_model(
            x / (sigma**2 + 1).sqrt(), timestep, context=c_crossattn, control=control, transformer_options=options,
            **kwargs,
        )  # fmt: skip
        return x - noise * sigma


class ModelPatcher:
    """A model with patches that take effect when it is loaded."""

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.object_patches: dict[str, Any] = {}
        self.loras: dict[str, Tensor] = {}

    def clone(self) -> ModelPatcher:
        made = ModelPatcher(self.model)
        made.model_options = copy.deepcopy(self.model_options)
        made.object_patches, made.loras = dict(self.object_patches), dict(self.loras)
        return made

    def get_model_object(self, name: str) -> Any:
        return self.object_patches.get(name, self.model.get_submodule(name))

    def add_object_patch(self, name: str, value: Any) -> None:
        self.object_patches[name] = value

    def set_model_unet_function_wrapper(self, wrapper: Callable[..., Tensor]) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def load(self) -> None:
        for name, value in self.object_patches.items():
            setattr(self.model, name, value)
        for name, change in self.loras.items():
            owner, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(owner)
            changed = getattr(module, attribute) + change
            setattr(module, attribute, nn.Parameter(changed, requires_grad=False))
        self.loras = {}


def load_models_gpu(models: list[ModelPatcher]) -> None:
    for model in models:
        model.load()


PARTS_IN_ONE_CALL = 2
"""How many conditions fit in memory at once."""


def _denoise(model: ModelPatcher, x: Tensor, sigma: Tensor, conds: list[Tensor], cfg: float, control: Any) -> Tensor:
    done: list[Tensor] = []
    length = math.lcm(*(cond.shape[1] for cond in conds))
    conds = [cond.repeat(1, length // cond.shape[1], 1) for cond in conds]
    for first in range(0, len(conds), PARTS_IN_ONE_CALL):
        parts = conds[first : first + PARTS_IN_ONE_CALL]
        options = {
            **model.model_options["transformer_options"], "uuids": [uuid.uuid4() for _ in parts], "sigmas": sigma,
            "cond_or_uncond": list(range(len(parts))), "callbacks": {"on_load": {None: [lambda *_: None]}},
            "wrappers": {"outer_sample": {None: [lambda *_: None]}, "diffusion_model": {}},
        }  # fmt: skip
        c: dict[str, Any] = {
            "c_crossattn": torch.cat([part.expand(len(x), -1, -1) for part in parts]), "transformer_options": options
        }  # fmt: skip
        if control is not None:
            c["control"] = {"input": [control.expand(len(parts) * len(x), -1, -1, -1)]}
        samples, timestep = torch.cat([x] * len(parts)), sigma.expand(len(parts) * len(x))
        wrapper = model.model_options.get("model_function_wrapper")
        if wrapper is None:
            out = model.model.apply_model(samples, timestep, **c)
        else:
            call = {"input": samples, "timestep": timestep, "c": c, "cond_or_uncond": options["cond_or_uncond"]}
            out = wrapper(model.model.apply_model, call)
        done += out.chunk(len(parts))
    positive, negative = done
    return negative + (positive - negative) * cfg


@torch.inference_mode()
def common_ksampler(
    model: ModelPatcher, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, positive: Any,
    negative: Any, latent: dict[str, Tensor], denoise: float = 1.0,
) -> tuple[dict[str, Tensor]]:  # fmt: skip
    """Euler, ancestral or not."""
    load_models_gpu([model])
    generator = torch.manual_seed(seed)
    image = latent["samples"]
    noise = torch.randn(image.shape, generator=generator)
    schedule = model.model.sigmas.flip(0)[:: 1000 // round(steps / denoise)][-steps:]
    sigmas = torch.cat([schedule, torch.zeros(1)])
    x = image + noise * sigmas[0]
    conds, control = [positive[0][0], negative[0][0]], positive[0][1].get("control")
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        denoised = _denoise(model, x, sigma[None], conds, cfg, control)
        down = after**2 / sigma if sampler_name == "euler_ancestral" else after
        x = denoised + (x - denoised) * down / sigma
        if sampler_name == "euler_ancestral" and after > 0:
            x = x + torch.randn(x.shape, generator=generator) * (after**2 - down**2).sqrt()
    return ({**latent, "samples": x},)


def modules() -> dict[str, types.ModuleType]:
    """What `import nodes, comfy.samplers, comfy.model_management` is to find."""
    made = {name: types.ModuleType(name) for name in ("nodes", "comfy", "comfy.samplers", "comfy.model_management")}
    vars(made["nodes"])["common_ksampler"] = common_ksampler
    sampler = type("KSampler", (), {"SAMPLERS": ["euler", "euler_ancestral"], "SCHEDULERS": ["normal"]})
    vars(made["comfy.samplers"])["KSampler"] = sampler
    vars(made["comfy.model_management"])["load_models_gpu"] = load_models_gpu
    for name in ("samplers", "model_management"):
        vars(made["comfy"])[name] = made[f"comfy.{name}"]
    return made
