"""A model, dense and compiled by us, and loops of its calls as samplers make them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from published import Published, arguments, build
from torch import Tensor, nn

import fisedit


@dataclass(frozen=True)
class Loop:
    """Milliseconds of a call in a loop: by the wall, and between events on the GPU."""

    wall: float
    gpu: float


@dataclass
class Subject:
    """A model, dense and ours, and the calls that are made of it."""

    name: str
    published: Published
    unet: nn.Module
    call: dict[str, Any]
    timesteps: list[Tensor]
    ours: fisedit.CompiledUNet
    dense: Callable[..., Any]
    wanted: Tensor | None = None  # float32, at the last timestep

    @property
    def device(self) -> torch.device:
        return self.call["sample"].device

    def step(self, model: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda timestep: model(timestep=timestep, return_dict=False, **self.call)[0]

    @property
    def graph(self) -> torch.fx.Graph:
        """The dense graph that was captured for these calls."""
        return next(iter(self.ours._live.programs.values())).captured.module.graph


def wait(device: torch.device) -> float:
    """Seconds on a clock, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def loop(step: Callable[[Tensor], Tensor], timesteps: Sequence[Tensor], device: torch.device) -> tuple[Loop, Tensor]:
    """The time of a call, and the last call's output."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    start = wait(device)
    for event in events[:1]:
        event.record()
    for timestep in timesteps:
        out = step(timestep)
    for event in events[1:]:
        event.record()
    wall = (wait(device) - start) * 1e3 / len(timesteps)
    return Loop(wall, events[0].elapsed_time(events[1]) / len(timesteps) if events else wall), out


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    start = wait(device)
    call()
    return (wait(device) - start) * 1e3


def prepare(
    name: str, published: Published, device: torch.device, dtype: torch.dtype, steps: int, **options: Any
) -> Subject:
    """``options``: of ``fisedit.compile``."""
    unet = build(published, device, dtype)
    unet.to(memory_format=torch.channels_last)
    call = arguments(published, published.size, device, dtype)
    call.pop("timestep")
    call["sample"] = call["sample"].contiguous(memory_format=torch.channels_last)
    timesteps = torch.linspace(950, 50, steps).long().to(device)
    dense = compiled(unet, "reduce-overhead") if device.type == "cuda" else unet
    return Subject(name, published, unet, call, list(timesteps), fisedit.compile(unet, **options), dense)


def compiled(unet: nn.Module, mode: str) -> Callable[..., Any]:
    """The model under ``torch.compile``, each call a step of its own for Inductor's CUDA graphs."""
    model = torch.compile(unet, mode=mode)

    def call(**arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return model(**arguments)

    return call


def float32_output(subject: Subject) -> Tensor:
    """The dense output at the last timestep in float32, without TF32."""
    exact = copy.deepcopy(subject.unet).float()
    call = torch.utils._pytree.tree_map(lambda value: value.float(), subject.call)
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    out = exact(timestep=subject.timesteps[-1], return_dict=False, **call)[0]
    torch.backends.cudnn.allow_tf32 = allowed
    return out


def relative_error(out: Tensor, wanted: Tensor, mask: Tensor) -> float:
    """``max |out - wanted| / max |wanted|`` over the active positions."""
    return float((out.float() - wanted)[..., mask].abs().max() / wanted[..., mask].abs().max())
