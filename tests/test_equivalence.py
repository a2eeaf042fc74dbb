"""The record and edit graphs against the untouched model, in float32."""

from __future__ import annotations

from functools import cache

import models
import pytest
import torch
from harness import Harness, masks, relative_error
from torch.utils.flop_counter import FlopCounterMode

from fisedit.passes.count_macs import count_macs
from fisedit.runtime.cost_model import COSTS, CostModel
from fisedit.runtime.executor import Memo
from fisedit.runtime.plan import MaskPlan

TOLERANCE = 1e-5
# Sides that are odd, not square, not divisible by 8, and a size whose deepest level is one position.
CASES = {
    "sd1": (models.sd1, (16, 16)),
    "sd1 odd": (models.sd1, (9, 13)),
    "sd2": (models.sd2, (16, 16)),
    "sd2 not divisible": (models.sd2, (12, 20)),
    "sd2 one position": (models.sd2, (8, 8)),
    "sdxl": (models.sdxl, (10, 14)),
    "sdxl odd": (models.sdxl, (7, 16)),
}
FAMILIES = {
    "sd1": "Stable Diffusion 1.x (1x1-convolution projections)",
    "sd2": "Stable Diffusion 2.x (linear projections, heads of equal width)",
    "sdxl": "Stable Diffusion XL (deep transformers, added conditioning)",
}
EACH = [pytest.param(case, marks=pytest.mark.supports("Models", FAMILIES[case.split()[0]])) for case in CASES]
MASKS = ("all", "blob", "ragged", "pixel", "last pixel", "corners", "top row", "right column", "all but one")


@cache
def harness(case: str) -> Harness:
    build, size = CASES[case]
    model = build()
    return Harness(model, models.arguments(model, size))


@pytest.mark.parametrize("case", EACH)
def test_record_is_dense(case: str) -> None:
    h = harness(case)
    assert relative_error(h.recorded, h.dense) <= TOLERANCE
    assert not h.program.islands


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("case", EACH)
def test_edit_is_dense_on_active_rows(case: str, name: str) -> None:
    """Same inputs, fresh caches, active cache rows NaN: active rows are the dense model's, the rest recorded."""
    h = harness(case)
    mask = masks(CASES[case][1])[name]
    out = h.edit(mask)
    assert torch.equal(out[..., ~mask], h.recorded[..., ~mask])
    # A level of one position normalizes groups of six values: its conditioning, not ours, sets the limit there.
    limit = TOLERANCE * (20 if case == "sd2 one position" else 1)
    assert relative_error(out[..., mask], h.dense[..., mask]) <= limit


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("case", ["sd1 odd", "sdxl"])
def test_every_cut_gives_the_same(case: str, cost: str) -> None:
    h = harness(case)
    mask = masks(CASES[case][1])["ragged"]
    assert relative_error(h.edit(mask, cost)[..., mask], h.dense[..., mask]) <= TOLERANCE


def test_other_words_and_latents_with_everything_active() -> None:
    """New inputs, old caches: with all rows active nothing of the recording is left, its statistics included."""
    h = harness("sd2")
    generator = torch.Generator().manual_seed(3)
    tensors = {name: value.clone() for name, value in h.call.tensors.items()}
    for name in ("sample", "encoder_hidden_states"):
        tensors[name] += torch.randn(tensors[name].shape, generator=generator)
    with torch.no_grad():
        wanted = h.model(**h.call.arguments(tensors))[0]
    assert relative_error(h.edit(torch.ones(16, 16, dtype=torch.bool), tensors=tensors), wanted) <= TOLERANCE
    assert relative_error(h.recorded, wanted) > 0.1


def test_kv_active_reads_no_keys_or_values() -> None:
    """``kv="active"``: exact where all rows are active, and no key or value slot is recorded."""
    model = models.one_level()
    cached, active = (Harness(model, models.arguments(model, (8, 8)), kv=kv) for kv in ("cached", "active"))
    assert relative_error(active.edit(torch.ones(8, 8, dtype=torch.bool)), active.dense) <= TOLERANCE
    assert active.cache.nbytes < cached.cache.nbytes
    assert relative_error(active.edit(masks((8, 8))["blob"]), cached.edit(masks((8, 8))["blob"])) > TOLERANCE


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_control_of_the_same_prompt_changes_nothing(weight: float) -> None:
    """The detect graph, its own prompt recorded: attention maps old and new are equal, so any mix is dense."""
    h = harness("sd2")
    index = torch.arange(7).expand(2, 7)
    inputs = {**h.call.tensors, "control_index": index, "control_weight": torch.full((2, 7), weight)}
    (out,) = h.program.executable("detect").run(inputs, source=h.cache)
    assert relative_error(out, h.dense) <= TOLERANCE


def test_control_keeps_recorded_maps() -> None:
    """Tokens in another order, each aligned with its old place: an alignment applied wrongly would move the maps."""
    h = harness("sd2")
    tensors = dict(h.call.tensors)
    tensors["encoder_hidden_states"] = tensors["encoder_hidden_states"].roll(1, 1)
    index = torch.arange(7).roll(1).expand(2, 7)
    inputs = {**tensors, "control_index": index, "control_weight": torch.ones(2, 7)}
    (out,) = h.program.executable("detect").run(inputs, source=h.cache)
    assert relative_error(out, h.dense) <= TOLERANCE  # tokens moved, and their maps with them: nothing changes


def test_openai_style_unet() -> None:
    """Einsum attention, float32 norms, no diffusers: all of it is recognized."""
    torch.manual_seed(0)
    model = models.OpenAIStyleUNet().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 10, 12, generator=generator), torch.randn(2, 5, models.TEXT, generator=generator)
    h = Harness(model, {"x": x, "timesteps": torch.tensor([7, 7]), "context": context})
    assert relative_error(h.recorded, h.dense) <= TOLERANCE
    assert not h.program.islands
    for name, mask in masks((10, 12)).items():
        assert relative_error(h.edit(mask)[..., mask], h.dense[..., mask]) <= TOLERANCE, name


@pytest.mark.parametrize("case", ["sd1", "sdxl odd"])
def test_macs_agree_with_torchs_counter(case: str) -> None:
    """Our count of both graphs against ``FlopCounterMode``, which counts what PyTorch executes."""
    h = harness(case)
    size = CASES[case][1]
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        h.run_dense(h.call)
    assert count_macs(h.program.captured.module.graph) == pytest.approx(counter.get_total_flops() / 2, rel=0.002)
    plan = MaskPlan(masks(size)["ragged"], CostModel())
    executable, memo = h.program.executable("edit"), Memo()
    executable.run(h.call.tensors, plan=plan, source=h.cache, memo=memo)
    inputs = {**h.call.tensors, "timestep": h.call.tensors["timestep"].clone()}
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        executable.run(inputs, plan=plan, source=h.cache, memo=memo)  # what runs once per edit has run
    ours = count_macs(h.program.graphs["edit"].graph, plan)
    assert ours == pytest.approx(counter.get_total_flops() / 2, rel=0.002)


def test_demo_unet() -> None:
    """The model that ships, at its full 64x64 latent."""
    from fisedit.demo import load_pipeline

    unet = load_pipeline().unet.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    h = Harness(unet, {"sample": torch.randn(1, 4, 64, 64, generator=generator), "timestep": 500,
                       "encoder_hidden_states": text})  # fmt: skip
    assert relative_error(h.recorded, h.dense) <= TOLERANCE and not h.program.islands
    for name, mask in masks((64, 64)).items():
        if name in ("all", "blob", "ragged"):
            out = h.edit(mask)
            assert relative_error(out[..., mask], h.dense[..., mask]) <= TOLERANCE, name
            assert torch.equal(out[..., ~mask], h.recorded[..., ~mask])
