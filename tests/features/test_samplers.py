"""Samplers of diffusers through EditPipeline. The reference is plain diffusers, or the recorded run itself."""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

import diffusers
import models
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipeline import AFTER, BEFORE, assert_background_kept, build_tiny_pipeline, square
from torch import Tensor

import fisedit
from fisedit import CompiledUNet, DetectConfig, EditPipeline, EditResult, Recording
from fisedit.edit import Edit

Pipes = tuple[StableDiffusionPipeline, EditPipeline]


class Sampler(NamedTuple):
    """A scheduler of diffusers, its options, and what the pipeline's call takes with it."""

    scheduler: str
    options: dict[str, Any] = {}
    call: dict[str, Any] = {}


KARRAS = {"use_karras_sigmas": True}
SAMPLERS = {
    "DDIM": Sampler("DDIMScheduler"),
    "DDIM, eta above 0": Sampler("DDIMScheduler", call={"eta": 0.7}),
    "DDPM": Sampler("DDPMScheduler"),
    "PNDM (Runge-Kutta, then linear multistep)": Sampler("PNDMScheduler"),
    "PLMS (PNDM, skip_prk_steps)": Sampler("PNDMScheduler", {"skip_prk_steps": True}),
    "DPM-Solver++ 2M": Sampler("DPMSolverMultistepScheduler"),
    "DPM-Solver++ 2M, Karras sigmas": Sampler("DPMSolverMultistepScheduler", KARRAS),
    "DPM-Solver++ 3M": Sampler("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DPM-Solver++ 2M SDE": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM-Solver++ 2M SDE, Karras sigmas": Sampler(
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **KARRAS}
    ),
    "DPM-Solver++ 2S (singlestep)": Sampler("DPMSolverSinglestepScheduler"),
    "DEIS": Sampler("DEISMultistepScheduler"),
    "UniPC": Sampler("UniPCMultistepScheduler"),
    "SA-Solver": Sampler("SASolverScheduler"),
    "Euler": Sampler("EulerDiscreteScheduler"),
    "Euler, Karras sigmas": Sampler("EulerDiscreteScheduler", KARRAS),
    "Euler, trailing timesteps": Sampler("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "Euler ancestral": Sampler("EulerAncestralDiscreteScheduler"),
    "Heun": Sampler("HeunDiscreteScheduler"),
    "KDPM2": Sampler("KDPM2DiscreteScheduler"),
    "KDPM2 ancestral": Sampler("KDPM2AncestralDiscreteScheduler"),
    "IPNDM": Sampler("IPNDMScheduler"),
    "LCM": Sampler("LCMScheduler"),
    "TCD": Sampler("TCDScheduler", call={"eta": 0.3}),
    "EDM Euler": Sampler("EDMEulerScheduler"),
    "EDM DPM-Solver++ 2M": Sampler("EDMDPMSolverMultistepScheduler"),
    "v-prediction": Sampler("DDIMScheduler", {"prediction_type": "v_prediction"}),
    "zero terminal SNR, trailing timesteps, guidance rescale": Sampler(
        "DDIMScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"guidance_rescale": 0.7},
    ),
}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Pipes:
    pipe = build_tiny_pipeline(tmp_path_factory.mktemp("samplers"))
    return pipe, EditPipeline(pipe)


def with_scheduler(pipes: Pipes, sampler: Sampler) -> Pipes:
    """Copies with another scheduler, over the same U-Nets."""
    scheduler = getattr(diffusers, sampler.scheduler).from_config(pipes[0].scheduler.config, **sampler.options)
    plain, editor = copy.copy(pipes[0]), copy.copy(pipes[1])
    editor.pipe = copy.copy(editor.pipe)
    plain.scheduler, editor.pipe.scheduler = copy.deepcopy(scheduler), scheduler
    return plain, editor


def draw(pipe: Any, prompt: str, seed: int, **settings: Any) -> Tensor:
    """The final latents of diffusers alone."""
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images


def counts(result: EditResult) -> list[int]:
    return [len(result.report.timings[kind]) for kind in ("detect", "sparse", "dense")]


def check(pipes: Pipes, sampler: Sampler, steps: int, rounds: bool = True) -> None:
    plain, editor = with_scheduler(pipes, sampler)
    settings = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "latent", **sampler.call}
    base = editor.generate(BEFORE, seed=1, **settings)
    torch.testing.assert_close(base.latents, draw(plain, BEFORE, 1, **settings), rtol=1e-3, atol=1e-3)
    timesteps = [float(t) for t in plain.scheduler.timesteps]
    assert [timestep for timestep, _ in base.recording.calls] == timesteps

    found = base.edit(AFTER, detect=DetectConfig(dilation=0), record=rounds)
    assert_background_kept(found, base)
    assert 0 < float(found.mask.float().mean()) < 1
    dense = DetectConfig().resolve(len(set(timesteps)))[0]
    detected, sparse, _ = counts(found)
    # The last dense step of a second-order sampler ends with its first call.
    assert detected == timesteps.index(list(dict.fromkeys(timesteps))[dense - 1]) + 1
    assert detected + sparse == len(timesteps)

    given = base.edit(AFTER, mask=square(), record=rounds)
    assert_background_kept(given, base)
    assert counts(given) == [0, len(timesteps), 0]
    assert not torch.allclose(given.latents, base.latents, atol=1e-3)

    same = base.edit(BEFORE, mask=square(), record=False)
    torch.testing.assert_close(same.latents, base.latents, rtol=1e-3, atol=1e-3)
    if rounds:  # one that takes the words back
        back = given.edit(BEFORE, mask=square(), record=False)
        torch.testing.assert_close(back.latents, base.latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.supports("Samplers", name)) for name in SAMPLERS]
)
def test_sampler(pipes: Pipes, name: str) -> None:
    check(pipes, SAMPLERS[name], steps=4, rounds=False)


@pytest.mark.nightly
@pytest.mark.parametrize("steps", [8, 25])
@pytest.mark.parametrize("name", SAMPLERS)
def test_longer_schedules(pipes: Pipes, name: str, steps: int) -> None:
    check(pipes, SAMPLERS[name], steps)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["DDIM", "DPM-Solver++ 2M SDE, Karras sigmas"])
def test_a_hundred_steps(pipes: Pipes, name: str) -> None:
    """Karras sigmas round to timesteps that come several times."""
    check(pipes, SAMPLERS[name], 100)


SIZE = (8, 8)


@pytest.fixture(scope="module")
def unet() -> CompiledUNet:
    return fisedit.compile(models.one_level())


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(edited: bool = False) -> tuple[Tensor, Tensor]:
    """The embeddings of the empty prompt and of a prompt, ``[1, 7, 32]``; an edit changes one token of it."""
    empty, prompt = noise(1, 1, 7, models.TEXT), noise(2, 1, 7, models.TEXT)
    if edited:
        prompt[:, 3] = 3 * noise(3, models.TEXT)
    return empty, prompt


def corner() -> Tensor:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[:3, :4] = True
    return mask


@torch.no_grad()
def loop(
    unet: Any, texts: tuple[Tensor, Tensor], on_step_end: Any = None, guidance: str = "one call",
    kind: Any = lambda timestep: timestep, scheduler: Any = None, rescale: float = 0.0, steps: int = 5,
) -> Tensor:  # fmt: skip
    """A sampling loop of one's own; ``kind`` converts the timesteps."""
    scheduler = copy.deepcopy(scheduler or diffusers.DDIMScheduler(clip_sample=False))
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(1, 4, *SIZE, generator=generator) * scheduler.init_noise_sigma
    empty, prompt = texts
    for step, timestep in enumerate(scheduler.timesteps):
        sample, given = scheduler.scale_model_input(latents, timestep), kind(timestep)
        if guidance == "one call":
            first, second = unet(torch.cat([sample] * 2), given, torch.cat(texts)).sample.chunk(2)
        else:
            second = unet(sample, given, prompt).sample
            first = second if guidance == "off" else unet(sample, given, empty).sample
        predicted = first + 3 * (second - first)
        if rescale:
            same_contrast = predicted * second.std() / predicted.std()
            predicted = rescale * same_contrast + (1 - rescale) * predicted
        arguments = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents = scheduler.step(predicted, timestep, latents, **arguments).prev_sample
        if on_step_end is not None:
            latents = on_step_end(None, step, timestep, {"latents": latents})["latents"]
    return latents


def record(unet: CompiledUNet, **options: Any) -> Recording:
    with unet.record() as base:
        drawn = loop(unet, words(), base.on_step_end, **options)
    torch.testing.assert_close(drawn, loop(unet._unet, words(), **options), rtol=1e-4, atol=1e-4)
    return base


def edited(
    unet: CompiledUNet, base: Recording, mask: Tensor | None = None, change: bool = True, **options: Any
) -> Edit:
    detect = options.pop("detect", DetectConfig(dilation=0))
    with unet.edit(base, mask, detect=detect) as edit:
        drawn = loop(unet, words(change), edit.on_step_end, **options)
    assert edit.mask is not None and torch.equal(drawn, edit.latents[-1])
    assert torch.equal(drawn[..., ~edit.mask], base.latents[-1][..., ~edit.mask])
    return edit


KINDS = {
    "int64 tensors": lambda t: t.long(),
    "float32 tensors": lambda t: t.float(),
    "tensors [B]": lambda t: t[None],
    "Python integers": int,
    "Python floats": float,
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.supports("Samplers", f"timesteps as {n}")) for n in KINDS]
)
def test_kinds_of_timesteps(unet: CompiledUNet, name: str) -> None:
    """Recorded with one kind, edited with another."""
    base = record(unet, kind=KINDS[name])
    others = list(KINDS.values())
    other = others[list(KINDS).index(name) - 1]
    same = edited(unet, base, corner(), change=False, kind=other)
    torch.testing.assert_close(same.latents[-1], base.latents[-1], rtol=1e-4, atol=1e-4)
    assert len(edited(unet, base, kind=other).timings["sparse"]) == 3


@pytest.mark.supports("Samplers", "guidance in two calls, with cross-attention control")
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "HeunDiscreteScheduler"])
def test_guidance_in_two_calls_equals_one(unet: CompiledUNet, scheduler: str) -> None:
    """The detect steps too: each call is controlled by the text that its own recorded call had."""
    options = {"scheduler": getattr(diffusers, scheduler)()}
    made: dict[str, dict[bool, Edit]] = {}
    for guidance in ("one call", "two calls"):
        base = record(unet, guidance=guidance, **options)
        configs = {control: DetectConfig(steps=3, dilation=0, control=control) for control in (True, False)}
        made[guidance] = {c: edited(unet, base, guidance=guidance, detect=d, **options) for c, d in configs.items()}
        same = edited(unet, base, corner(), change=False, guidance=guidance, **options)
        torch.testing.assert_close(same.latents[-1], base.latents[-1], rtol=1e-4, atol=1e-4)
    for control in (True, False):
        one, two = made["one call"][control], made["two calls"][control]
        assert torch.equal(one.mask, two.mask) and one.mask.any()
        assert len(two.timings["detect"]) == 2 * len(one.timings["detect"]) > 0
        assert len(two.timings["sparse"]) == 2 * len(one.timings["sparse"]) > 0
        for first, second in zip(one.latents, two.latents, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    controlled, free = made["one call"][True].latents[1], made["one call"][False].latents[1]
    assert not torch.allclose(controlled, free, atol=1e-3)


@pytest.mark.supports("Samplers", "a loop without guidance")
@pytest.mark.supports("Samplers", "guidance rescale in a loop")
@pytest.mark.parametrize("options", [{"guidance": "off"}, {"rescale": 0.7}], ids=str)
def test_loops_of_ones_own(unet: CompiledUNet, options: dict[str, Any]) -> None:
    base = record(unet, **options)
    assert edited(unet, base, **options).mask.any()
    same = edited(unet, base, corner(), change=False, **options)
    torch.testing.assert_close(same.latents[-1], base.latents[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.supports("Samplers", "a stochastic loop with a generator")
def test_a_stochastic_loop(unet: CompiledUNet) -> None:
    options: dict[str, Any] = {"scheduler": diffusers.EulerAncestralDiscreteScheduler()}
    base = record(unet, **options)
    edited(unet, base, **options)
    same = edited(unet, base, corner(), change=False, **options)
    torch.testing.assert_close(same.latents[-1], base.latents[-1], rtol=1e-4, atol=1e-4)
