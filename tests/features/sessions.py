"""A compiled model's sessions against the untouched model, in one line."""

from __future__ import annotations

from typing import Any

import models
import torch
from diffusers import UNet2DConditionModel
from harness import relative_error
from torch import Tensor, nn

from fisedit import CompiledUNet, Recording

SIZE = (8, 8)


def tiny(**config: Any) -> UNet2DConditionModel:
    """A model of one level and no middle, for tests that capture often."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return models.one_level(**{**blocks, "block_out_channels": (16,), "mid_block_type": None, **config})


def corner() -> Tensor:
    """A mask, bool ``[8, 8]``."""
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[:3, :4] = True
    return mask


def dense(model: nn.Module, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model(**call)
    return out if isinstance(out, Tensor) else out[0]


def check_sessions(
    unet: CompiledUNet, reference: nn.Module, call: dict[str, Any], tolerance: float = 1e-5
) -> Recording:
    """Outside sessions, recorded, and with a part computed again from the recording, a call gives ``reference``'s."""
    wanted = dense(reference, call)
    assert relative_error(dense(unet, call), wanted) <= tolerance
    with unet.record() as base:
        assert relative_error(dense(unet, call), wanted) <= tolerance
    with unet.edit(base, corner()) as edit:
        assert relative_error(dense(unet, call), wanted) <= tolerance
    assert len(edit.timings["sparse"]) == 1
    return base
