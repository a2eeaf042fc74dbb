"""Models that something has patched: what depends on the call alone is right, the rest is refused by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from harness import Harness, masks, relative_error
from patches import (
    GLOBAL_CACHE,
    DeepCache,
    OutsideLoRA,
    ScaledProcessor,
    StoringProcessor,
    cache_globally,
    merge_tokens,
)
from sessions import SIZE, check_sessions, corner, dense, tiny
from torch import Tensor, nn

import fisedit
from fisedit import CompiledUNet
from fisedit.errors import ForeignRecordingError, UnsupportedCaptureError
from fisedit.warnings import DenseIslandsWarning


@pytest.fixture(scope="module")
def call() -> dict[str, Any]:
    return models.arguments(tiny(), SIZE)


def feature(name: str) -> pytest.MarkDecorator:
    return pytest.mark.supports("Features", name)


def check_refused(unet: CompiledUNet, call: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCaptureError, match=message), unet.record():
        dense(unet, call)


# State between calls


@feature("DeepCache: refused while enabled")
@pytest.mark.parametrize("when", ["before", "after"])
def test_feature_caches_are_refused(call: dict[str, Any], when: str) -> None:
    """And the attempt leaves the helper usable: nothing of tracing is in its caches."""
    unet = tiny()
    helper = DeepCache(unet, [unet.down_blocks[0].resnets[0], unet.up_blocks[0].resnets[1]])
    if when == "before":
        helper.enable()
    compiled = fisedit.compile(unet)
    if when == "after":
        base = check_sessions(compiled, tiny(), call)
        helper.unet = compiled
        helper.enable()
        with pytest.raises(ForeignRecordingError, match="forward"), compiled.edit(base, corner()):
            pass
    check_refused(compiled, call, r"changes the model's own state \(.*forward.*Undo the patch")
    helper.start, helper.step = 0, -1
    assert relative_error(dense(compiled, call), dense(tiny(), call)) <= 1e-5
    helper.disable()
    check_sessions(compiled, tiny(), call)


def test_caches_in_global_variables_are_refused(call: dict[str, Any]) -> None:
    """State that no attribute shows: its value would be in the graph as a constant."""
    GLOBAL_CACHE.clear()
    unet = fisedit.compile(tiny())
    cache_globally(unet.down_blocks[0].resnets[0])
    check_refused(unet, call, "down_blocks.0.* reads what an earlier call computed.*feature caching")
    GLOBAL_CACHE.clear()


@feature("stateful attention processors: refused")
def test_stateful_processors_are_refused(call: dict[str, Any]) -> None:
    unet, processor = fisedit.compile(tiny()), StoringProcessor()
    unet.set_attn_processor(processor)
    check_refused(unet, call, r"state \(.*processor")
    assert all(type(stored) is Tensor for stored in processor.store)


def test_hooks_with_state_are_refused(call: dict[str, Any]) -> None:
    unet, seen = fisedit.compile(tiny()), {}
    handle = unet.conv_in.register_forward_hook(lambda module, args, out: seen.update(last=out))
    check_refused(unet, call, r"state \(conv_in._forward_hooks")
    handle.remove()


@feature("random numbers in the forward: refused")
def test_random_numbers_are_refused(call: dict[str, Any]) -> None:
    unet = fisedit.compile(tiny())
    handle = unet.conv_in.register_forward_hook(lambda module, args, out: out + 1e-6 * torch.randn_like(out))
    check_refused(unet, call, r"aten.randn_like.default in conv_in draws random numbers")
    handle.remove()
    merge_tokens(unet, random=True)
    check_refused(unet, call, "aten.randint.* draws random numbers")


def test_buffers_that_calls_write_are_refused(call: dict[str, Any]) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.norm(self.conv(sample)) + 0 * torch.as_tensor(timestep).float().mean()

    torch.manual_seed(0)
    unet = fisedit.compile(Normed())
    arguments = {"sample": call["sample"], "timestep": 5}
    check_refused(unet, arguments, r"state \(norm.running_mean")
    check_sessions(unet.eval(), unet._unet, arguments)


def test_a_forward_that_fails_is_named(call: dict[str, Any]) -> None:
    """A patch that wants the timestep as a number: its error is given, and what to undo."""
    unet = tiny()
    original = unet.forward
    unet.forward = lambda *args, **kwargs: original(*args, **kwargs) if kwargs["timestep"].item() else None
    message = r"its forward raised RuntimeError .*Undo what replaced forward on the U-Net"
    check_refused(fisedit.compile(unet), {**call, "timestep": torch.tensor(500)}, message)


# What depends on the call alone


@feature("ToMe: token merging without random destinations")
def test_token_merging(call: dict[str, Any]) -> None:
    model = tiny()
    merge_tokens(model)
    assert relative_error(dense(model, call), dense(tiny(), call)) > 1e-3
    h = Harness(model, call)
    assert relative_error(h.recorded, h.dense) <= 1e-5
    for name in ("all", "ragged", "corners"):
        mask = masks(SIZE)[name]
        assert relative_error(h.edit(mask)[..., mask], h.dense[..., mask]) <= 2e-5, name
    assert any("transformer_blocks" in island for island in h.program.islands)


@feature("LoRA modules outside the U-Net (sd-scripts)")
def test_lora_in_place_of_forward(call: dict[str, Any]) -> None:
    def patched() -> tuple[Any, OutsideLoRA]:
        torch.manual_seed(4)
        unet = tiny()
        return unet, OutsideLoRA(unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q)

    (unet, lora), (reference, other) = patched(), patched()
    compiled = fisedit.compile(unet)
    base = check_sessions(compiled, reference, call)
    for module in (lora, other):
        module.multiplier = 0.4
    with pytest.raises(ForeignRecordingError, match="multiplier"), compiled.edit(base, corner()):
        pass
    with compiled.record() as base:
        assert relative_error(dense(compiled, call), dense(reference, call)) <= 1e-5
    for module in (lora, other):
        module.lora_up.weight.mul_(3)
    with pytest.raises(ForeignRecordingError, match="lora_up.weight"), compiled.edit(base, corner()):
        pass
    check_sessions(compiled, reference, call)


@feature("forward hooks and closures without state")
def test_closures(call: dict[str, Any]) -> None:
    """A hook that adds a tensor it closes over: that is in the graph, and a change of it is noticed."""

    def patched() -> tuple[Any, Tensor]:
        unet, direction = tiny(), torch.linspace(-1, 1, 16).view(1, 16, 1, 1).clone()
        unet.conv_in.register_forward_hook(lambda module, args, out: out + direction)
        return unet, direction

    (unet, mine), (reference, theirs) = patched(), patched()
    compiled = fisedit.compile(unet)
    base = check_sessions(compiled, reference, call)
    mine.mul_(2), theirs.mul_(2)
    with pytest.raises(ForeignRecordingError, match="conv_in._forward_hooks"), compiled.edit(base, corner()):
        pass
    check_sessions(compiled, reference, call)


@feature("custom attention processors without state")
def test_custom_processors(call: dict[str, Any]) -> None:
    unet, reference = fisedit.compile(tiny()), tiny()
    mine, theirs = ScaledProcessor(2.0), ScaledProcessor(2.0)
    unet.set_attn_processor(mine), reference.set_attn_processor(theirs)
    before = check_sessions(unet, reference, call)
    mine.scale = theirs.scale = 0.5
    with pytest.raises(ForeignRecordingError, match="processor"), unet.edit(before, corner()):
        pass
    check_sessions(unet, reference, call)
    assert "dense islands: none" in unet.inspect()


@feature("fused QKV projections")
def test_fused_projections(call: dict[str, Any]) -> None:
    unet = fisedit.compile(tiny())
    before = check_sessions(unet, tiny(), call)
    unet.fuse_qkv_projections()
    with pytest.raises(ForeignRecordingError), unet.edit(before, corner()):
        pass
    check_sessions(unet, tiny(), call)
    assert "dense islands: none" in unet.inspect() and "to_qkv" in unet.inspect()


def enable_freeu(unet: Any) -> None:
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


@feature("FreeU, as a dense island")
def test_freeu(call: dict[str, Any]) -> None:
    reference = tiny()
    plain = dense(reference, call)
    enable_freeu(reference)
    assert relative_error(dense(reference, call), plain) > 1e-3
    h = Harness(reference, call)
    for name in ("all", "ragged", "corners"):
        mask = masks(SIZE)[name]
        assert relative_error(h.edit(mask)[..., mask], h.dense[..., mask]) <= 2e-5, name
    unet = fisedit.compile(tiny())
    before = check_sessions(unet, tiny(), call)
    enable_freeu(unet)
    with pytest.raises(ForeignRecordingError, match=re.escape("up_blocks.0.s1")), unet.edit(before, corner()):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseIslandsWarning)
        after = check_sessions(unet, reference, call)
    assert "fft_fftn" in unet.inspect()
    unet.disable_freeu()
    with pytest.raises(ForeignRecordingError), unet.edit(after, corner()):
        pass


@feature("attention slicing: right, with a warning that it is slow")
def test_attention_slicing(call: dict[str, Any]) -> None:
    unet, reference = fisedit.compile(tiny()), tiny()
    for model in (unet, reference):
        model.set_attention_slice("auto")
    with pytest.warns(DenseIslandsWarning, match=r"ops of the model stay dense.*disable_attention_slicing"):
        check_sessions(unet, reference, call)


PATCHES: dict[str, Callable[[nn.Module], Any]] = {
    "parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach() * 2)),
    "element in place": lambda m: m.weight.data.view(-1)[0].mul_(3),
    "data exchanged": lambda m: setattr(m.weight, "data", m.weight.detach() * 2),
    "class": lambda m: setattr(m, "__class__", type("Other", (type(m),), {})),
    "padding": lambda m: setattr(m, "padding_mode", "circular"),
    "dict setting": lambda m: m.options["scale"].append(2),
    "tensor in a list": lambda m: m.options["tensors"][0].add_(1),
    "numpy setting": lambda m: m.options["array"].fill(2),
    "hook": lambda m: m.register_forward_hook(lambda module, args, out: out * 2),
    "pre hook": lambda m: m.register_forward_pre_hook(lambda module, args: args),
    "buffer": lambda m: m.register_buffer("extra", torch.ones(2)),
    "forward": lambda m: setattr(m, "forward", lambda x: x),
    "training": lambda m: m.train(),
}


@pytest.mark.parametrize("name", PATCHES)
def test_every_kind_of_change_is_noticed(name: str) -> None:
    """And nothing is, if there is no change."""
    from fisedit.fingerprint import Fingerprinter

    model = tiny()
    model.conv_out.options = {"scale": [1.0], "tensors": (torch.ones(2),), "array": torch.ones(3).numpy()}
    fingerprinter = Fingerprinter()
    before = fingerprinter.read(model)
    assert fingerprinter.read(model) == before == Fingerprinter().read(model)
    PATCHES[name](model.conv_out)
    after = fingerprinter.read(model)
    assert after != before and all(change.startswith("conv_out") for change in before.changes(after))
    assert Fingerprinter().read(model) == after
