"""What the tests of recordings on tiers share: a small model, its recordings and edits, and where they lie."""

from __future__ import annotations

from typing import Any

import models
import torch
from torch import Tensor, nn
from toy_sampler import TIMESTEPS, corner, other_text, run

import fisedit
from fisedit import CompiledUNet, DetectConfig, Recording
from fisedit.config import CacheConfig

OTHER_TIERS = {"host": {"gpu": 0}, "disk": {"gpu": 0, "host": 0}}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Small(nn.Module):
    """Two convolutions, a norm, attention over positions and over a text: what interpreted kernels do in no time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.middle = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.conv_out, self.norm, self.time = nn.Conv2d(32, 4, 3, padding=1), nn.GroupNorm(4, 32), nn.Linear(1, 32)
        self.own = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(models.TEXT, 32), nn.Linear(models.TEXT, 32)

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, return_dict: bool = True) -> Any:
        time = torch.as_tensor(timestep, device=sample.device).float().reshape(-1, 1).expand(len(sample), 1)
        x = self.conv_in(sample) + self.time(time / 1000)[:, :, None, None]
        x = self.middle(nn.functional.silu(self.norm(x)))
        rows, text = x.flatten(2).transpose(1, 2), encoder_hidden_states
        for operands in ([f(rows) for f in self.own], (self.query(rows), self.key(text), self.value(text))):
            heads = [o.unflatten(-1, (2, 16)).transpose(1, 2) for o in operands]
            rows = rows + nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return (self.conv_out(rows.transpose(1, 2).unflatten(-1, sample.shape[2:])),)


def compiled(model: nn.Module, provider: str = "reference", **cache: Any) -> CompiledUNet:
    return fisedit.compile(model, provider=provider, cache=CacheConfig(**cache), dense="eager")


def recorded(unet: CompiledUNet, call: dict[str, Any], timesteps: Any = TIMESTEPS) -> Recording:
    with unet.record() as base:
        run(unet, call, timesteps)
    return base


def edited(unet: CompiledUNet, call: dict[str, Any], base: Recording, mask: Any = "corner") -> list[Tensor]:
    mask = corner() if isinstance(mask, str) else mask
    with unet.edit(base, mask):
        return run(unet, changed(call), change=0.1)


def changed(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) for name, value in other_text({n: v.cpu() for n, v in call.items()}).items()}


def two_rounds(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> list[Tensor]:
    """An edit whose mask is found, and is recorded; and an edit of that."""
    detect = DetectConfig(steps=2, window=(1, 2), dilation=0, smooth=0)
    with unet.edit(base, detect=detect, record=True) as edit:
        first = run(unet, changed(call), change=0.8)
    assert edit.recording is not None and edit.mask is not None and 0 < edit.mask.sum() < 64
    with unet.edit(edit.recording, corner().flip(0)):
        return first + run(unet, changed(call), change=0.8)


def tiers_of(base: Recording) -> set[str]:
    return {tier for kind, tiers in base.placement().items() for tier in tiers if kind != "small"}


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def sizes(base: Recording) -> dict[str, int]:
    return {kind: sum(tiers.values()) for kind, tiers in base.placement().items()}
