"""Samplers of diffusers through EditPipeline. The reference is plain diffusers, or the recorded run itself."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipeline import AFTER, BEFORE, assert_background_kept, build_tiny_pipeline, square
from torch import Tensor

from fisedit import DetectConfig, EditPipeline, EditResult

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
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="latent", **settings).images


def counts(result: EditResult) -> list[int]:
    return [len(result.report.timings[kind]) for kind in ("detect", "sparse", "dense")]


def check(pipes: Pipes, sampler: Sampler, steps: int) -> None:
    plain, editor = with_scheduler(pipes, sampler)
    settings = {"num_inference_steps": steps, "guidance_scale": 3.0, **sampler.call}
    base = editor.generate(BEFORE, seed=1, **settings)
    torch.testing.assert_close(base.latents, draw(plain, BEFORE, 1, **settings), rtol=1e-3, atol=1e-3)
    timesteps = [float(t) for t in plain.scheduler.timesteps]
    assert [timestep for timestep, _ in base.recording.calls] == timesteps

    found = base.edit(AFTER, detect=DetectConfig(dilation=0))
    assert_background_kept(found, base)
    assert 0 < float(found.mask.float().mean()) < 1
    dense = DetectConfig().resolve(len(set(timesteps)))[0]
    detected, sparse, _ = counts(found)
    # The last dense step of a second-order sampler ends with its first call.
    assert detected == timesteps.index(list(dict.fromkeys(timesteps))[dense - 1]) + 1
    assert detected + sparse == len(timesteps)

    given = base.edit(AFTER, mask=square())
    assert_background_kept(given, base)
    assert counts(given) == [0, len(timesteps), 0]
    assert not torch.equal(given.latents, base.latents)

    same = base.edit(BEFORE, mask=square(), record=False)
    torch.testing.assert_close(same.latents, base.latents, rtol=1e-3, atol=1e-3)
    again = given.edit(BEFORE, mask=square(9, 9))
    assert_background_kept(again, given)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.supports("Samplers", name)) for name in SAMPLERS]
)
def test_sampler(pipes: Pipes, name: str) -> None:
    check(pipes, SAMPLERS[name], steps=4)
