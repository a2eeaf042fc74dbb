"""Every device and dtype that this machine has, against the float64 model on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import triton
from diffusers import EulerAncestralDiscreteScheduler
from harness import Harness, masks, relative_error
from tiny_pipeline import build_tiny_pipeline

import fisedit
from fisedit.errors import UnavailableProviderError, UnsupportedDtypeError
from fisedit.runtime.cuda_graph import Replay

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
TARGETS = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
if torch.cuda.is_available():
    TARGETS += [("cuda", dtype) for dtype in TOLERANCES]
DEVICES = list(dict.fromkeys(device for device, _ in TARGETS))
OTHERS = ["cuda:1"] if torch.cuda.device_count() > 1 else []
"""A GPU that is not the current one."""


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_reference_kernels(device: str, dtype: torch.dtype) -> None:
    model = models.one_level()
    call = models.arguments(model, (10, 12))
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        wanted = exact(call["sample"].double(), 500, call["encoder_hidden_states"].double())[0]
    for name in ("sample", "encoder_hidden_states"):
        call[name] = call[name].to(device, dtype)
    h = Harness(model.to(device, dtype), call, provider="reference")
    assert relative_error(h.recorded.cpu().double(), wanted) <= TOLERANCES[dtype]
    for name, mask in masks((10, 12)).items():
        out = h.edit(mask.to(device)).cpu().double()
        # Relative to the whole map's largest value: that of a single pixel may be small by chance.
        assert (out - wanted)[..., mask].abs().max() <= TOLERANCES[dtype] * wanted.abs().max(), name
        assert torch.equal(out[..., ~mask], h.recorded.cpu().double()[..., ~mask])


@pytest.mark.parametrize("device", DEVICES + OTHERS)
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


@pytest.mark.supports("Features", "channels_last, on CPU and GPU")
@pytest.mark.parametrize("device", DEVICES)
def test_channels_last(device: str) -> None:
    model = models.sd2().to(device, memory_format=torch.channels_last)
    call = models.arguments(model, (8, 12))
    call["sample"] = call["sample"].to(device).contiguous(memory_format=torch.channels_last)
    call["encoder_hidden_states"] = call["encoder_hidden_states"].to(device)
    h = Harness(model, call, provider="reference")
    assert relative_error(h.recorded, h.dense) <= 1e-5
    for name, mask in masks((8, 12)).items():
        assert (h.edit(mask.to(device)) - h.dense)[..., mask].abs().max() <= 1e-5 * h.dense.abs().max(), name


@pytest.mark.parametrize("device", DEVICES + OTHERS)
def test_edits_at_once(device: str) -> None:
    """Masks of their own, found and given, in common calls: as one by one."""
    unet = fisedit.compile(models.one_level().to(device))
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    text = torch.randn(3, 7, models.TEXT, generator=torch.Generator().manual_seed(2)).to(device)
    mask = torch.zeros(8, 8)
    mask[1:4, 2:7] = 1

    def sample(latents: torch.Tensor, words: torch.Tensor, on_step_end: Any) -> torch.Tensor:
        for step, timestep in enumerate((900, 500, 300, 100)):
            with torch.no_grad():
                latents = latents - 0.2 * unet(latents, timestep, words)[0]
            latents = on_step_end(None, step, timestep, {"latents": latents})["latents"]
        return latents

    with unet.record() as base:
        sample(noise[:1], text[:1], base.on_step_end)
    detect = fisedit.DetectConfig(steps=2, dilation=0)
    together = noise[:1].repeat(2, 1, 1, 1)
    with unet.edit([base, base], [None, mask], detect=detect, record=True) as edits:
        out = sample(together, text[1:], edits.on_step_end)
    for number, given in enumerate((None, mask)):
        with unet.edit(base, given, detect=detect) as edit:
            alone = sample(noise[:1], text[number + 1 : number + 2], edit.on_step_end)
        assert torch.equal(edits[number].masks, edit.masks)
        torch.testing.assert_close(out[number : number + 1], alone, rtol=1e-3, atol=1e-3)
        outside = ~edit.mask
        assert torch.equal(out[number : number + 1][..., outside], base.latents[-1][..., outside])


@pytest.mark.parametrize(
    ("device", "offload"), [(d, False) for d in DEVICES + OTHERS] + [("cuda", True)][: len(DEVICES) - 1]
)
def test_pipeline(device: str, offload: bool, tmp_path: Path) -> None:
    """A stochastic sampler with a generator on the CPU; with ``enable_model_cpu_offload`` where there is a GPU."""
    pipe = build_tiny_pipeline(tmp_path)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    editor = fisedit.EditPipeline(pipe)
    if offload:
        editor.pipe.enable_model_cpu_offload()
    else:
        editor.pipe.to(device)
    base = editor.generate("a red house on the left, on grass, at noon", seed=3, num_inference_steps=5)
    theirs = pipe("a red house on the left, on grass, at noon", generator=torch.Generator().manual_seed(3),
                  num_inference_steps=5, output_type="latent").images  # fmt: skip
    torch.testing.assert_close(base.latents, theirs, rtol=1e-3, atol=1e-3)
    results = base.edit(["a blue house on the left, on grass, at noon", "a red tree on the left, on grass, at noon"])
    for result in results:
        assert result.background_is_identical and 0 < result.mask.float().mean() < 1
        assert result.edit("a blue tree on the left, on grass, at noon", mask=~result.mask).background_is_identical


def test_half_precision_on_a_cpu_is_refused() -> None:
    unet = fisedit.compile(models.one_level().half())
    call = models.arguments(unet, (8, 8))
    sample, text = call["sample"].half(), call["encoder_hidden_states"].half()
    with pytest.raises(UnsupportedDtypeError, match="float16 on cpu"), unet.record():
        unet(sample, 5, text)


@pytest.mark.parametrize("reason", ["Triton is not installed", "they are for GPUs of NVIDIA"])
def test_triton_on_a_cpu(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is recorded, where it was asked for and is not interpreted."""
    if reason == "they are for GPUs of NVIDIA":
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = models.one_level()
    call = models.arguments(model, (8, 8))
    unet = fisedit.compile(model, provider="triton")
    with pytest.raises(UnavailableProviderError, match=f"cannot be launched here: {reason}"), unet.record() as base:
        unet(**call)
    assert not base.calls
    for provider in ("auto", "reference"):
        other = fisedit.compile(model, provider=provider)
        with other.record() as base:
            other(**call)
        assert base.calls


@pytest.mark.skipif(not OTHERS, reason="needs two GPUs")
def test_graphs_are_captured_on_the_gpu_of_a_call() -> None:
    """Whichever GPU the process captured on before."""
    for device in ("cuda:0", *OTHERS, "cuda:0"):
        unet = fisedit.compile(models.one_level().to(device))
        call = models.arguments(unet, (8, 8))
        call |= {name: value.to(device) for name, value in call.items() if isinstance(value, torch.Tensor)}
        with unet.record() as base:
            recorded = unet(**call)[0]
        with unet.edit(base, torch.eye(8)):
            assert relative_error(unet(**call)[0], recorded) <= 1e-5


def test_the_gpu_of_a_call_is_the_current_one_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched on the current GPU, and graphs are captured there."""
    current: list[torch.Tensor] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    unet = fisedit.compile(models.one_level().to(DEVICES[-1]), provider="triton")
    call = models.arguments(unet, (8, 8))
    call |= {name: value.to(DEVICES[-1]) for name, value in call.items() if isinstance(value, torch.Tensor)}
    run, calls = Replay.run, list[torch.Tensor]()

    def watched(self: Replay, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        calls.append(current[-1])
        return run(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(Replay, "run", watched)
    with unet.record() as base:
        unet(**call)
    with unet.edit(base, torch.eye(8)):
        unet(**call)
    assert calls == [call["sample"]] and not current
