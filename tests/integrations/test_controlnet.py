"""What the ControlNet page says of residuals around a U-Net alone."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import Tensor

import fisedit
from fisedit.errors import RecordingMismatchError
from fisedit.module import CompiledUNet

pytestmark = pytest.mark.supports("Integrations", "ControlNet")

SIZE = (8, 8)


@pytest.fixture(scope="module")
def unet() -> CompiledUNet:
    return fisedit.compile(models.one_level())


def residuals(seed: int = 0) -> dict[str, Any]:
    """As a ControlNet gives them for this model: one for each skip connection, one for the middle."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(16, 8), (16, 8), (16, 4), (32, 4)]
    maps = [torch.randn(2, c, n, n, generator=generator) for c, n in [*shapes, shapes[-1]]]
    return {"down_block_additional_residuals": maps[:-1], "mid_block_additional_residual": maps[-1]}


def run(unet: Any, control: dict[str, Any]) -> list[Tensor]:
    call = models.arguments(unet, SIZE)
    with torch.no_grad():
        return [unet(**{**call, "timestep": t}, **control, return_dict=False)[0] for t in (900, 500, 100)]


def test_residuals_are_recorded_and_edited(unet: CompiledUNet) -> None:
    dense, other = run(models.one_level(), residuals()), run(models.one_level(), residuals(1))
    with unet.record() as base:
        torch.testing.assert_close(run(unet, residuals()), dense)
    mask = torch.zeros(SIZE)
    mask[2:6, 1:5] = 1
    with unet.edit(base, mask):
        torch.testing.assert_close(run(unet, residuals()), dense, rtol=1e-4, atol=1e-5)
    with unet.edit(base, mask):
        mixed = run(unet, residuals(1))
    with unet.edit(base, torch.ones(SIZE)):
        torch.testing.assert_close(run(unet, residuals(1)), other)
    for made, recorded in zip(mixed, dense, strict=True):
        torch.testing.assert_close(made[..., mask == 0], recorded[..., mask == 0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(made[..., mask == 1], recorded[..., mask == 1], atol=1e-3)


def test_with_and_without_residuals_do_not_mix(unet: CompiledUNet) -> None:
    for recorded, edited in ((residuals(), {}), ({}, residuals())):
        with unet.record() as base:
            run(unet, recorded)
        with pytest.raises(RecordingMismatchError, match="mid_block_additional_residual"), unet.edit(base):
            run(unet, edited)
