"""What people do with a model around compile: save, copy, move, cast, compile, offload."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model
from accelerate.hooks import remove_hook_from_module
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from harness import Harness, relative_error
from sessions import SIZE, check_sessions, corner, dense, tiny
from tiny_pipeline import build_tiny_pipeline
from torch import nn

import fisedit
from fisedit import CompiledUNet
from fisedit.errors import (
    ForeignRecordingError,
    InvalidTimestepError,
    RecordingMismatchError,
    UnsupportedCaptureError,
)


@pytest.fixture(scope="module")
def call() -> dict[str, Any]:
    return models.arguments(tiny(), SIZE)


def feature(name: str) -> pytest.MarkDecorator:
    return pytest.mark.supports("Features", name)


def nightly(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.nightly)


# The class


@feature("isinstance, attributes and methods of the original's class")
def test_it_is_an_instance_of_the_originals_class() -> None:
    original = tiny()
    unet = fisedit.compile(original)
    assert isinstance(unet, UNet2DConditionModel) and isinstance(unet, CompiledUNet)
    assert type(unet).__name__ == "UNet2DConditionModel" and "compiled by fisedit" in repr(unet)
    assert inspect.signature(unet.forward) == inspect.signature(original.forward)
    assert unet.config is original.config and unet.attn_processors.keys() == original.attn_processors.keys()
    unet.extra, original.other = 1, 2
    assert original.extra == 1 and unet.other == 2
    assert type(type(unet)(**original.config)) is UNet2DConditionModel


def test_names_of_ours_do_not_hide_the_models(call: dict[str, Any]) -> None:
    """A model with attributes and methods named like the compiled one's still calls its own."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.program, self.out = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

        def edit(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(x)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.out(self.edit(self.program(sample)) * (1 + 0 * torch.as_tensor(timestep).float().mean()))

    model = Named().eval()
    check_sessions(fisedit.compile(copy.deepcopy(model)), model, {"sample": call["sample"], "timestep": 5})


# Saving and copying


@feature("save_pretrained of the compiled U-Net and its pipeline")
def test_pipelines_save_and_move_it(tmp_path: Path) -> None:
    pipe = build_tiny_pipeline(tmp_path / "tokenizer")
    original = pipe.unet
    pipe.unet = fisedit.compile(pipe.unet)
    assert pipe.components["unet"] is pipe.unet
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.unet.save_pretrained(tmp_path / "unet")
    for loaded in (
        StableDiffusionPipeline.from_pretrained(tmp_path / "pipe").unet,
        type(pipe.unet).from_pretrained(tmp_path / "unet"),
    ):
        assert type(loaded) is UNet2DConditionModel
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True))
    pipe.to(torch.float64)
    assert original.dtype == torch.float64 and pipe.unet.dtype == torch.float64


@feature("state_dict round trips, torch.save, pickle")
def test_state_dicts_and_pickles(call: dict[str, Any]) -> None:
    unet, other = fisedit.compile(tiny()), tiny(seed=5)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    base = check_sessions(unet, tiny(), call)
    unet.load_state_dict(torch.load(file))
    with pytest.raises(ForeignRecordingError, match=r"changed since \(.* and \d+ more\)"), unet.edit(base, corner()):
        pass
    check_sessions(unet, other, call)
    other.load_state_dict(fisedit.compile(tiny(seed=6)).state_dict(), assign=True)
    assert relative_error(dense(other, call), dense(tiny(seed=6), call)) == 0
    again = pickle.loads(pickle.dumps(fisedit.compile(tiny(seed=6), cost="paper")))
    assert isinstance(again, CompiledUNet) and again.compile_config.cost == "paper"
    check_sessions(again, other, call)


@feature("copy.copy and copy.deepcopy")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies(call: dict[str, Any], copied: Callable[[CompiledUNet], CompiledUNet]) -> None:
    unet = fisedit.compile(tiny())
    base = check_sessions(unet, tiny(), call)
    twin = copied(unet)
    with pytest.raises(ForeignRecordingError, match="another compiled model .* by the compiled model that made it"):
        twin.edit(base, corner()).__enter__()
    check_sessions(twin, tiny(), call)
    if copied is copy.deepcopy:
        twin.load_state_dict(tiny(seed=5).state_dict())
        with unet.edit(base, corner()):  # the first has its own weights
            assert relative_error(dense(unet, call), dense(tiny(), call)) <= 1e-5


# Modes and dtypes


@feature("train and eval mode, requires_grad_")
def test_train_and_eval(call: dict[str, Any]) -> None:
    unet = fisedit.compile(tiny().train().requires_grad_(True))
    check_sessions(unet, tiny(), call)
    unet(**call).sample.sum().backward()
    assert unet.conv_in.weight.grad is not None and unet.training
    dropping = fisedit.compile(tiny(dropout=0.5))
    base = check_sessions(dropping, tiny(dropout=0.5), call)
    dropping.train()
    with pytest.raises(ForeignRecordingError, match="training"), dropping.edit(base, corner()):
        pass
    with pytest.raises(UnsupportedCaptureError, match=r"dropout is active in .*resnets"), dropping.record():
        dropping(**call)


@feature("channels_last")
def test_channels_last(call: dict[str, Any]) -> None:
    unet = fisedit.compile(tiny())
    base = check_sessions(unet, tiny(), call)
    unet.to(memory_format=torch.channels_last)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    with unet.edit(base, corner()):  # the same numbers in another order
        assert relative_error(dense(unet, call), dense(tiny(), call)) <= 1e-5
    strided = {**call, "sample": call["sample"].to(memory_format=torch.channels_last)}
    check_sessions(unet, tiny(), strided)


@feature("fp32, fp16 and bf16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, nightly(torch.float64)])
def test_cast_after_compile(call: dict[str, Any], dtype: torch.dtype) -> None:
    unet = fisedit.compile(tiny())
    base = check_sessions(unet, tiny(), call)
    unet.to(dtype)
    with pytest.raises(ForeignRecordingError, match="changed since"), unet.edit(base, corner()):
        pass
    cast = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    check_sessions(unet, tiny().to(dtype), cast, tolerance=0.03 if dtype == torch.bfloat16 else 1e-6)


@feature("autocast")
def test_autocast(call: dict[str, Any]) -> None:
    unet = fisedit.compile(tiny())
    with torch.autocast("cpu", torch.bfloat16):
        base = check_sessions(unet, tiny(), call, tolerance=0.02)
    for made in base.calls.values():
        assert made.outputs[0].dtype == torch.bfloat16
    message = "autocast: recorded 'torch.bfloat16', edited with None"
    with pytest.raises(RecordingMismatchError, match=message), unet.edit(base, corner()):
        dense(unet, call)
    outside = check_sessions(unet, tiny(), call)
    with (
        pytest.raises(RecordingMismatchError, match="autocast"),
        torch.autocast("cpu", torch.bfloat16),
        unet.edit(outside, corner()),
    ):
        dense(unet, call)


@feature("autocast")
def test_autocast_in_the_forward(call: dict[str, Any]) -> None:
    """Blocks that switch autocast themselves: the graph has its casts, not its switch."""

    class Switching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                hidden = self.first(sample)
            return self.last(hidden.float()) + 0 * timestep.view(-1, 1, 1, 1)

    h = Harness(Switching().eval(), {"sample": call["sample"], "timestep": torch.tensor([5, 5])})
    assert torch.equal(h.recorded, h.dense)
    assert relative_error(h.edit(corner())[..., corner()], h.dense[..., corner()]) <= 1e-2


@pytest.mark.parametrize("timesteps", [[900, 500], [float("nan")] * 2])
def test_timesteps_that_are_none(call: dict[str, Any], timesteps: list[float]) -> None:
    unet = fisedit.compile(tiny())
    mixed = {**call, "timestep": torch.tensor(timesteps)}
    dense(unet, mixed)  # outside sessions it is the model
    with pytest.raises(InvalidTimestepError, match="share one"), unet.record():
        dense(unet, mixed)
    check_sessions(unet, tiny(), {**call, "timestep": torch.tensor([500, 500])})


# torch.compile


@feature("torch.compile around the compiled U-Net")
def test_torch_compile_around_us(call: dict[str, Any]) -> None:
    """The dense model is one graph, without a break; sessions are ours, and leave that graph as it was."""
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    outside = torch.compile(fisedit.compile(tiny()), backend=backend)
    wanted = dense(tiny(), call)
    assert relative_error(dense(outside, call), wanted) <= 1e-5 and len(graphs) == 1
    check_sessions(outside, tiny(), call)
    made = len(graphs)
    assert relative_error(dense(outside, call), wanted) <= 1e-5 and len(graphs) == made == 1


@feature("torch.compile under the compiled U-Net")
@pytest.mark.parametrize(
    "kind",
    ["torch.compile", *(pytest.param(k, marks=pytest.mark.nightly) for k in ("Module.compile", "of a submodule"))],
)
def test_torch_compile_under_us(call: dict[str, Any], kind: str) -> None:
    torch.compiler.reset()
    runs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            runs.append(graph)
            return graph(*arguments)

        return counted

    under: Any = tiny()
    if kind == "torch.compile":
        under = torch.compile(under, backend=backend)
    elif kind == "Module.compile":
        under.compile(backend=backend)
    else:
        under.up_blocks[0].resnets[0].compile(backend=backend)
    unet = fisedit.compile(under)
    dense(unet, call)
    assert len(runs) > 0  # the dense model runs as torch.compile made it
    check_sessions(unet, tiny(), call)


@pytest.mark.parametrize("part", ["whole", "conv_in"])
def test_torchscript_is_refused(call: dict[str, Any], part: str) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_in = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.conv_in(sample) + 0 * timestep.mean()

    arguments = {"sample": call["sample"], "timestep": torch.tensor(5.0)}
    model = Small().eval()
    if part == "whole":
        model = torch.jit.trace(model, example_kwarg_inputs=arguments)
    else:
        model.conv_in = torch.jit.trace(model.conv_in, call["sample"])
    unet = fisedit.compile(model)
    assert torch.equal(dense(unet, arguments), dense(model, arguments))
    with pytest.raises(UnsupportedCaptureError, match="is TorchScript.*made from"), unet.record():
        dense(unet, arguments)


# Offloading


@feature("accelerate's enable_model_cpu_offload")
@pytest.mark.parametrize("when", ["before", "after"])
def test_model_offload(call: dict[str, Any], when: str) -> None:
    if when == "before":
        original = tiny()
        cpu_offload_with_hook(original, execution_device="cpu")
        unet = fisedit.compile(original)
        base = check_sessions(unet, tiny(), call)
    else:
        unet = fisedit.compile(tiny())
        base = check_sessions(unet, tiny(), call)
        cpu_offload_with_hook(unet, execution_device="cpu")
    loads: list[str] = []
    hook, load = unet._hf_hook, unet._hf_hook.pre_forward
    hook.pre_forward = lambda *args, **kwargs: (loads.append("loaded"), load(*args, **kwargs))[1]
    with unet.edit(base, corner()):
        assert relative_error(dense(unet, call), dense(tiny(), call)) <= 1e-5
    assert loads == ["loaded"]
    remove_hook_from_module(unet, recurse=True)
    with unet.edit(base, corner()):
        assert relative_error(dense(unet, call), dense(tiny(), call)) <= 1e-5


@feature("accelerate's enable_model_cpu_offload")
def test_pipeline_offload(tmp_path: Path) -> None:
    """The pipeline hooks the U-Net anew after each image."""
    pipe, plain = (build_tiny_pipeline(tmp_path / str(i)) for i in (0, 1))
    pipe.unet = fisedit.compile(pipe.unet)
    pipe.enable_model_cpu_offload(device="cpu")

    def draw(p: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return p("a red house", generator=generator, num_inference_steps=2, output_type="latent").images

    with pipe.unet.record() as base:
        assert relative_error(draw(pipe), draw(plain)) <= 1e-5
    with pipe.unet.edit(base, torch.nn.functional.pad(torch.ones(5, 5), (0, 11, 0, 11))):
        assert relative_error(draw(pipe), draw(plain)) <= 1e-5


def test_sequential_offload_is_refused(call: dict[str, Any]) -> None:
    unet = fisedit.compile(tiny())
    cpu_offload(unet, execution_device="cpu")
    assert relative_error(dense(unet, call), dense(tiny(), call)) <= 1e-5
    with pytest.raises(UnsupportedCaptureError, match="loaded piece by piece.*enable_model_cpu_offload"), unet.record():
        dense(unet, call)
    assert relative_error(dense(unet, call), dense(tiny(), call)) <= 1e-5


@feature("accelerate's dispatch_model on one device")
def test_dispatched(call: dict[str, Any]) -> None:
    unet = fisedit.compile(dispatch_model(tiny(), {"": "cpu"}, force_hooks=True))
    check_sessions(unet, tiny(), call)


def group_offload(unet: CompiledUNet) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def layerwise_casting(unet: CompiledUNet) -> None:
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.parametrize("patch", [group_offload, layerwise_casting])
def test_hooks_that_exchange_weights_are_refused(call: dict[str, Any], patch: Callable[[CompiledUNet], None]) -> None:
    unet = fisedit.compile(tiny())
    patch(unet)
    wanted = dense(unet, call)
    with pytest.raises(UnsupportedCaptureError, match=r"Undo what replaced forward on .*conv_in"), unet.record():
        dense(unet, call)
    assert torch.equal(dense(unet, call), wanted)  # the attempt has left the model as it was
