"""LoRA by peft: whatever is loaded, scaled, fused or removed, before compile or after, is what runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from diffusers import UNet2DConditionModel
from harness import Harness, masks, relative_error
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from sessions import SIZE, check_sessions, corner, dense, tiny
from tiny_pipeline import build_tiny_pipeline

import fisedit
from fisedit.errors import ForeignRecordingError, ModelChangedError, RecordingMismatchError

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "ff.net.0.proj"]


def adapt(unet: UNet2DConditionModel, name: str = "default", seed: int = 1, **config: Any) -> UNet2DConditionModel:
    """Add an adapter whose update is not zero."""
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "conv1"], **config}), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in unet.named_parameters():
            if f"lora_B.{name}" in key:
                parameter.normal_(std=0.2, generator=generator)
    return unet.eval().requires_grad_(False)


def adapted(**config: Any) -> UNet2DConditionModel:
    return adapt(tiny(), **config)


@pytest.fixture(scope="module")
def call() -> dict[str, Any]:
    return models.arguments(models.one_level(), SIZE)


@pytest.mark.supports("Features", "LoRA loaded before compile")
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_loaded_before_compile(call: dict[str, Any], use_dora: bool) -> None:
    model = adapt(models.one_level(), use_dora=use_dora, target_modules=TARGETS)
    assert relative_error(dense(model, call), dense(models.one_level(), call)) > 0.01
    h = Harness(model, call)
    assert relative_error(h.recorded, h.dense) <= 1e-5
    for name in ("all", "ragged"):
        mask = masks(SIZE)[name]
        assert relative_error(h.edit(mask)[..., mask], h.dense[..., mask]) <= 2e-5, name
    assert not h.program.islands


@torch.no_grad()
def multiply(unet: UNet2DConditionModel, data: bool) -> None:
    for name, parameter in unet.named_parameters():
        if "lora_A" in name:
            (parameter.data if data else parameter).mul_(2)


# One after the other, each on what the former left.
CHANGES: dict[str, Callable[[UNet2DConditionModel], Any]] = {
    "rescaled": lambda unet: unet.set_adapters("default", 0.25),
    "other weights": lambda unet: multiply(unet, data=False),
    "other weights through .data": lambda unet: multiply(unet, data=True),
    "disabled": lambda unet: unet.disable_adapters(),
    "mixed": lambda unet: (
        unet.enable_adapters(),
        adapt(unet, "second", seed=2),
        unet.set_adapters(["default", "second"], [0.3, 0.9]),
    ),
    "deleted": lambda unet: unet.delete_adapters("default"),
    "fused": lambda unet: unet.fuse_lora(0.5),
    "unloaded": lambda unet: unet.unload_lora(),
}


@pytest.mark.supports("Features", "LoRA rescaled after compile")
@pytest.mark.supports("Features", "LoRA fused or unloaded after compile")
@pytest.mark.supports("Features", "several LoRA adapters with weights")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_changed_after_compile(call: dict[str, Any]) -> None:
    """Each change is what runs, in the next recording and edit; recordings made before it are refused."""
    unet, reference = fisedit.compile(adapted()), adapted()
    before, old = check_sessions(unet, reference, call), dense(reference, call)
    for name, change in CHANGES.items():
        change(unet), change(reference)
        new = dense(reference, call)
        assert name == "unloaded" or relative_error(new, old) > 1e-3, name
        with pytest.raises(ForeignRecordingError, match="which was changed since"), unet.edit(before, corner()):
            pass
        before, old = check_sessions(unet, reference, call), new


@pytest.mark.supports("Features", "LoRA fused and unfused, disabled and enabled")
def test_there_and_back(call: dict[str, Any]) -> None:
    unet, reference = fisedit.compile(adapted()), adapted()
    base = check_sessions(unet, reference, call)
    unet.disable_adapters()
    unet.enable_adapters()
    with unet.edit(base, corner()):  # nothing of the model is another than it was
        assert relative_error(dense(unet, call), dense(reference, call)) <= 1e-5
    unet.fuse_lora()
    with pytest.raises(ForeignRecordingError), unet.edit(base, corner()):
        pass
    unet.unfuse_lora()
    check_sessions(unet, reference, call)


@pytest.mark.supports("Features", "LoRA loaded after compile")
def test_loaded_after_compile(call: dict[str, Any], tmp_path: Path) -> None:
    source = adapted()
    save_file(get_peft_model_state_dict(source), tmp_path / "lora.safetensors")
    unet = fisedit.compile(tiny())
    before = check_sessions(unet, tiny(), call)
    unet.load_lora_adapter(tmp_path / "lora.safetensors", prefix=None, network_alphas=None)
    unet.eval().requires_grad_(False)
    unet.set_adapters(unet.active_adapters(), 1.5)  # the file has no alpha: 3 / 2
    with pytest.raises(ForeignRecordingError), unet.edit(before, corner()):
        pass
    check_sessions(unet, source, call)


@pytest.mark.supports("Features", "LoRA scale in cross_attention_kwargs")
def test_scale_of_a_call(call: dict[str, Any]) -> None:
    unet, reference = fisedit.compile(adapted()), adapted()
    half, third = ({**call, "cross_attention_kwargs": {"scale": scale}} for scale in (0.5, 0.3))
    base = check_sessions(unet, reference, half)
    check_sessions(unet, reference, call)
    with (
        pytest.raises(RecordingMismatchError, match="cross_attention_kwargs_scale: recorded 0.5, edited with 0.3"),
        unet.edit(base, corner()),
    ):
        dense(unet, third)


def test_changed_inside_a_session(call: dict[str, Any]) -> None:
    unet = fisedit.compile(adapted())
    with pytest.raises(ModelChangedError, match=r"record\(\).*scaling"), unet.record() as base:
        dense(unet, call)
        unet.set_adapters("default", 0.5)
    assert not base.complete


@pytest.mark.supports("Features", "LoRA through pipe.load_lora_weights")
def test_through_the_pipeline(tmp_path: Path) -> None:
    pipe, plain = (build_tiny_pipeline(tmp_path / str(i)) for i in (0, 1))
    generator = torch.Generator().manual_seed(3)
    source = build_tiny_pipeline(tmp_path / "2").unet
    source.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"]))
    state = {
        f"unet.{key}": torch.randn(value.shape, generator=generator) * 0.3
        for key, value in get_peft_model_state_dict(source).items()
    }
    pipe.unet = fisedit.compile(pipe.unet)
    for p in (pipe, plain):
        p.load_lora_weights(dict(state), adapter_name="style")
    arguments = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0}

    def draw(p: Any) -> torch.Tensor:
        return p("a red house", generator=torch.Generator().manual_seed(0), **arguments).images

    with pipe.unet.record() as base:
        assert relative_error(draw(pipe), draw(plain)) <= 1e-5
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:5, :5] = True
    with pipe.unet.edit(base, mask):
        assert relative_error(draw(pipe), draw(plain)) <= 1e-5
    for p in (pipe, plain):
        p.unload_lora_weights()
    with pytest.raises(ForeignRecordingError), pipe.unet.edit(base, mask):
        pass
    with pipe.unet.record():
        assert relative_error(draw(pipe), draw(plain)) <= 1e-5
