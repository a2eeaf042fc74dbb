"""The example nodes against stand-ins of the interfaces of ComfyUI that they touch, compared with the plain sampler."""

import importlib.util
import sys
from pathlib import Path

import comfy_standins
import pytest
import torch
from comfy_standins import BaseModel, ModelPatcher, common_ksampler
from models import TEXT

from fisedit import FISEditError, errors

pytestmark = pytest.mark.supports("Integrations", "ComfyUI")

SIZE = (16, 16)


def assert_close(made, expected):
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).resolve().parents[2] / "examples" / "comfyui_fisedit.py"
    spec = importlib.util.spec_from_file_location("comfyui_fisedit", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, made in comfy_standins.modules().items():
            patch.setitem(sys.modules, name, made)
        patch.setitem(sys.modules, "comfyui_fisedit", module)
        spec.loader.exec_module(module)
        yield module


def conditioning(change=0.0, **more):
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(1, 7, TEXT, generator=generator)
    text[:, 3] += change
    return [[text, more]]


@pytest.fixture
def settings():
    return {
        "seed": 11, "steps": 5, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
        "negative": [[torch.zeros(1, 7, TEXT), {}]], "latent_image": {"samples": torch.zeros(1, 4, *SIZE)},
    }  # fmt: skip


def plain(positive, settings, model=None):
    """What ComfyUI's own sampler draws with the untouched model."""
    arguments = {name: value for name, value in settings.items() if name != "latent_image"}
    patcher = model or ModelPatcher(BaseModel())
    return common_ksampler(patcher, positive=positive, latent=settings["latent_image"], **arguments)[0]["samples"]


def compiled(example, model=None):
    return example.Compile().compile(model or ModelPatcher(BaseModel()), "cached")[0]


def corner():
    mask = torch.zeros(1, *SIZE)
    mask[:, 2:9, 3:8] = 1
    return mask


def test_the_nodes_are_what_comfyui_loads(example):
    assert set(example.NODE_CLASS_MAPPINGS) == set(example.NODE_DISPLAY_NAME_MAPPINGS)
    for node in example.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        assert callable(getattr(node, node.FUNCTION)) and node.CATEGORY and node.RETURN_TYPES
        assert all(isinstance(kind, tuple) for group in inputs.values() for kind in group.values())
    record = example.Record.INPUT_TYPES()["required"]
    assert record["sampler_name"] == (["euler", "euler_ancestral"],)


def test_a_compiled_model_is_the_same_in_other_samplers(example, settings):
    made = plain(conditioning(), settings, compiled(example))
    assert_close(made, plain(conditioning(), settings))


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
@pytest.mark.parametrize("parts", [1, 2], ids=["guidance in two calls", "guidance in one call"])
def test_record_and_edit(example, settings, monkeypatch, sampler, parts):
    monkeypatch.setattr(comfy_standins, "PARTS_IN_ONE_CALL", parts)
    settings["sampler_name"] = sampler
    latent, base = example.Record().sample(compiled(example), positive=conditioning(), **settings)
    assert_close(latent["samples"], plain(conditioning(), settings))

    same, _ = example.Edit().sample(base, conditioning(), corner())
    assert_close(same["samples"], latent["samples"])

    other, region = example.Edit().sample(base, conditioning(2.0), corner())
    assert torch.equal(region, corner())
    inside = corner()[:, None].bool().expand_as(latent["samples"])
    assert torch.equal(other["samples"][~inside], latent["samples"][~inside])
    assert (other["samples"] - latent["samples"])[inside].abs().max() > 1e-2

    full, _ = example.Edit().sample(base, conditioning(2.0), torch.ones(1, *SIZE))
    assert_close(full["samples"], plain(conditioning(2.0), settings))


def test_the_region_is_found(example, settings):
    latent, base = example.Record().sample(compiled(example), positive=conditioning(), **settings)
    edited, region = example.Edit().sample(base, conditioning(2.0))
    outside = ~region[:, None].bool().expand_as(edited["samples"])
    assert region.shape == (1, *SIZE) and 0 < region.mean() <= 1
    assert torch.equal(edited["samples"][outside], latent["samples"][outside])
    assert not torch.equal(edited["samples"], latent["samples"])


def test_a_batch_of_latents_and_an_image_to_start_from(example, settings):
    generator = torch.Generator().manual_seed(2)
    settings |= {"latent_image": {"samples": torch.randn(2, 4, *SIZE, generator=generator)}, "denoise": 0.6}
    latent, base = example.Record().sample(compiled(example), positive=conditioning(), **settings)
    assert_close(latent["samples"], plain(conditioning(), settings))
    same, _ = example.Edit().sample(base, conditioning(), corner())
    assert_close(same["samples"], latent["samples"])


def test_controlnet_residuals_reach_the_model(example, settings):
    control = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(3))
    positive = conditioning(control=control)
    latent, base = example.Record().sample(compiled(example), positive=positive, **settings)
    assert_close(latent["samples"], plain(positive, settings))
    assert not torch.allclose(latent["samples"], plain(conditioning(), settings))
    same, _ = example.Edit().sample(base, positive, corner())
    assert_close(same["samples"], latent["samples"])
    with pytest.raises(errors.RecordingMismatchError, match="control"):
        example.Edit().sample(base, conditioning(2.0), corner())


def test_loras_that_are_applied_when_the_model_is_loaded(example, settings):
    def with_lora():
        model = ModelPatcher(BaseModel())
        generator = torch.Generator().manual_seed(4)
        weight = model.model.diffusion_model.middle.in_layers[2].weight
        model.loras = {
            "diffusion_model.middle.in_layers.2.weight": 0.2 * torch.randn(weight.shape, generator=generator)
        }
        return model

    latent, base = example.Record().sample(compiled(example, with_lora()), positive=conditioning(), **settings)
    assert_close(latent["samples"], plain(conditioning(), settings, with_lora()))
    assert not torch.allclose(latent["samples"], plain(conditioning(), settings))
    same, _ = example.Edit().sample(base, conditioning(), corner())
    assert_close(same["samples"], latent["samples"])


@pytest.mark.parametrize(
    "options",
    [
        {"patches": {"input": [lambda x: x * 2]}},
        {"patches_replace": {"attn1": {("middle", 0): lambda q, k, v: v}}},
        {"wrappers": {"diffusion_model": {None: [lambda *_: None]}}},
        {"optimized_attention_override": lambda *_: None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_hooks_of_other_nodes_are_refused(example, settings, options, monkeypatch):
    model = compiled(example)
    original = example.call_unet

    def with_options(apply_model, call):
        call["c"]["transformer_options"] |= options
        return original(apply_model, call)

    model.set_model_unet_function_wrapper(with_options)
    with pytest.raises(ValueError, match=next(iter(options.get("wrappers", options)))):
        example.Record().sample(model, positive=conditioning(), **settings)


def test_what_the_nodes_refuse(example, settings):
    with pytest.raises(ValueError, match="FISEdit Compile"):
        example.Record().sample(ModelPatcher(BaseModel()), positive=conditioning(), **settings)
    wrapped = ModelPatcher(BaseModel())
    wrapped.set_model_unet_function_wrapper(lambda apply_model, call: None)
    with pytest.raises(ValueError, match="Another node wraps"):
        compiled(example, wrapped)
    model = compiled(example)
    _, base = example.Record().sample(model, positive=conditioning(), **settings)
    with pytest.raises(FISEditError, match="2 masks|\\[2, 16, 16\\]"):
        example.Edit().sample(base, conditioning(2.0), corner().repeat(2, 1, 1))
    longer = [[torch.zeros(1, 14, TEXT), {}]]
    with pytest.raises(errors.RecordingMismatchError, match="context shape"):
        example.Edit().sample(base, longer, corner())
