"""Every device and dtype that this machine has, against the float64 model on the CPU."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from harness import Harness, masks, relative_error

import fisedit
from fisedit.errors import UnsupportedDtypeError

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
TARGETS = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
if torch.cuda.is_available():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    TARGETS += [("cuda", dtype) for dtype in TOLERANCES]


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_reference_kernels(device: str, dtype: torch.dtype) -> None:
    model = models.one_level()
    call = models.arguments(model, (10, 12))
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        wanted = exact(call["sample"].double(), 500, call["encoder_hidden_states"].double())[0]
    for name in ("sample", "encoder_hidden_states"):
        call[name] = call[name].to(device, dtype)
    h = Harness(model.to(device, dtype), call)
    assert relative_error(h.recorded.cpu().double(), wanted) <= TOLERANCES[dtype]
    for name, mask in masks((10, 12)).items():
        out = h.edit(mask.to(device)).cpu().double()
        # Relative to the whole map's largest value: that of a single pixel may be small by chance.
        assert (out - wanted)[..., mask].abs().max() <= TOLERANCES[dtype] * wanted.abs().max(), name
        assert torch.equal(out[..., ~mask], h.recorded.cpu().double()[..., ~mask])


@pytest.mark.parametrize("device", dict.fromkeys(device for device, _ in TARGETS))
def test_detect_and_edit(device: str) -> None:
    """The whole way on the device: record, detect with control, sparse steps, an edit recorded and edited."""
    unet = fisedit.compile(models.one_level().to(device))
    call = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in models.arguments(unet, (8, 8)).items()}
    text = call.pop("encoder_hidden_states")
    call.pop("timestep")
    with unet.record() as base:
        outputs = [unet(**call, timestep=t, encoder_hidden_states=text)[0] for t in (9, 8, 7, 6, 5)]
    other = text.clone()
    other[1, 3:] = other[1, 3:].flip(0)
    for corner in (2, 4):
        sample = call["sample"].clone()
        with unet.edit(base, record=True, detect=fisedit.DetectConfig(steps=2)) as edit:
            for t in (9, 8, 7, 6, 5):
                out = unet(sample, t, other)[0]
                sample[..., corner : corner + 3, corner : corner + 3] += 0.5
        assert edit.mask is not None and 0 < edit.mask.sum() < 64
        assert torch.equal(out[..., ~edit.mask], outputs[-1][..., ~edit.mask])
        assert edit.recording is not None
        base = edit.recording


def test_half_precision_on_a_cpu_is_refused() -> None:
    unet = fisedit.compile(models.one_level().half())
    call = models.arguments(unet, (8, 8))
    sample, text = call["sample"].half(), call["encoder_hidden_states"].half()
    with pytest.raises(UnsupportedDtypeError, match="float16 on cpu"), unet.record():
        unet(sample, 5, text)
