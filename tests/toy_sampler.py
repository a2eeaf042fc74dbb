"""A toy sampler over a small U-Net, whose edits change a corner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TIMESTEPS = (900, 700, 500, 300, 100)
SIZE = (8, 8)


def run(unet: nn.Module, call: dict[str, Any], timesteps: Any = TIMESTEPS, change: float = 0.0) -> list[Tensor]:
    """A toy sampler: the sample moves a little with each output; ``change`` is added to a corner."""
    sample, outputs = call["sample"].clone(), []
    for timestep in timesteps:
        out = unet(sample, timestep, call["encoder_hidden_states"], return_dict=False)[0]
        outputs.append(out)
        sample = sample - 0.1 * out
        sample[..., :3, :3] += change
    return outputs


def corner() -> Tensor:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[:3, :3] = True
    return mask


def other_text(call: dict[str, Any]) -> dict[str, Any]:
    text = call["encoder_hidden_states"].clone()
    text[1, 3:] = torch.randn(text[1, 3:].shape, generator=torch.Generator().manual_seed(5))
    return {**call, "encoder_hidden_states": text}
