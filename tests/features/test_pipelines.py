"""EditPipeline over the pipelines of diffusers, tiny and with random weights.

The reference is the untouched pipeline with the same generator, or the recorded run itself.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from tiny_pipeline import (
    AFTER,
    BEFORE,
    LATENT,
    TEXT,
    assert_background_kept,
    build_controlnet,
    build_tiny_pipeline,
    build_tiny_sdxl,
    build_unet,
    picture,
    quiet,
    square,
)
from torch import Tensor

import fisedit
from fisedit import DetectConfig, EditPipeline, errors

OTHER = "a red house on the left, on sand, at noon"
SETTINGS: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}

NIGHTLY = pytest.mark.nightly
SEVERAL = pytest.mark.parametrize(
    "several", [False, pytest.param(True, marks=NIGHTLY)], ids=["one prompt", "several prompts"]
)


def as_kind(pipe: Any, kind: type, **parts: Any) -> Any:
    """A pipeline of another kind over the same parts."""
    components = {**pipe.components, **parts}
    for name in ("text_encoder_2", "tokenizer_2", "image_encoder"):
        if components.get(name) is None:
            components.pop(name, None)
    extra = {} if "text_encoder_2" in components else {"requires_safety_checker": False}
    return quiet(kind(**components, **extra))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def text_to_image(folder: Path) -> tuple[Any, Any]:
    """The pipeline as diffusers has it, and one over the same weights whose U-Net is compiled."""
    return compiled(build_tiny_pipeline(folder))


@pytest.fixture(scope="module")
def sdxl(folder: Path) -> tuple[Any, Any]:
    return compiled(build_tiny_sdxl(folder))


def compiled(pipe: Any) -> tuple[Any, Any]:
    ours = copy.copy(pipe)
    ours.unet = fisedit.compile(pipe.unet)
    return pipe, ours


def draw(pipe: Any, prompt: Any, seed: int = 1, **settings: Any) -> Tensor:
    """The final latents of diffusers alone."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt=prompt, generator=generator, **{**settings, "output_type": "latent"}).images


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def check(plain: Any, ours: Any, batches: bool, **settings: Any) -> None:
    """Recording draws what diffusers draws; edits keep the background, alone and at once."""
    editor, settings = EditPipeline(ours), {**SETTINGS, **settings}
    base = editor.generate(BEFORE, seed=1, **settings)
    close(base.latents, draw(plain, BEFORE, **settings))
    assert not torch.allclose(base.latents, draw(plain, AFTER, **settings), atol=1e-3)
    close(base.edit(BEFORE, mask=square(), record=False).latents, base.latents)
    given = base.edit(AFTER, mask=square())
    assert_background_kept(given, base)
    assert not torch.equal(given.latents, base.latents)
    found = base.edit(AFTER, detect=DetectConfig(steps=1, dilation=0))
    assert_background_kept(found, base)
    assert found.mask.any()
    close(base.edit(AFTER, mask=torch.ones(LATENT, LATENT)).latents, draw(plain, AFTER, **settings))
    if batches:
        check_batches(plain, editor, settings)


def check_batches(plain: Any, editor: EditPipeline, settings: dict[str, Any]) -> None:
    """Several prompts at once, then edits of several bases and several edits of one: as they come out alone."""
    made = editor.generate([BEFORE, OTHER], seed=1, **settings)
    for number, (prompt, generation) in enumerate(zip([BEFORE, OTHER], made, strict=True)):
        close(generation.latents, draw(plain, prompt, seed=1 + number, **settings))
        assert_background_kept(generation.edit(AFTER, mask=square()), generation)
    alone = [generation.edit(AFTER, mask=square()) for generation in made]
    for generation, one, result in zip(made, alone, editor.edit(made, AFTER, mask=square()), strict=True):
        close(result.latents, one.latents)
        assert_background_kept(result, generation)
    for prompt, result in zip([AFTER, OTHER], made[0].edit([AFTER, OTHER], mask=square()), strict=True):
        close(result.latents, made[0].edit(prompt, mask=square()).latents)


@pytest.mark.supports("Models", "StableDiffusionPipeline")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"guidance_rescale": 0.7}, marks=pytest.mark.supports("Features", "guidance rescale")),
        pytest.param({"guidance_scale": 1.0}, marks=pytest.mark.supports("Features", "no guidance")),
        pytest.param({"eta": 0.5, "negative_prompt": "a tree"}, marks=pytest.mark.supports("Features", "eta")),
        pytest.param(
            {"cross_attention_kwargs": {"scale": 0.5}},
            marks=pytest.mark.supports("Features", "cross_attention_kwargs (scale)"),
        ),
        pytest.param({"timesteps": [900, 500, 300, 100]}, marks=pytest.mark.supports("Features", "timesteps=[...]")),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_text_to_image(text_to_image: tuple[Any, Any], settings: dict[str, Any]) -> None:
    if "timesteps" in settings:
        text_to_image = tuple(with_scheduler(p, diffusers.EulerDiscreteScheduler) for p in text_to_image)
    check(*text_to_image, "eta" in settings, **settings)


def with_scheduler(pipe: Any, kind: Any) -> Any:
    pipe = copy.copy(pipe)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.supports("Features", "several images of one prompt, stochastic sampler")
def test_several_images_of_a_stochastic_sampler(text_to_image: tuple[Any, Any]) -> None:
    plain, ours = (with_scheduler(pipe, EulerAncestralDiscreteScheduler) for pipe in text_to_image)
    check(plain, ours, False, num_images_per_prompt=2)


@pytest.mark.supports("Models", "StableDiffusionImg2ImgPipeline")
@pytest.mark.parametrize("strength", [0.4, 0.8, pytest.param(1.0, marks=NIGHTLY)])
def test_image_to_image(text_to_image: tuple[Any, Any], strength: float) -> None:
    plain, ours = (as_kind(pipe, diffusers.StableDiffusionImg2ImgPipeline) for pipe in text_to_image)
    check(plain, ours, strength == 0.8, image=picture(), strength=strength, num_inference_steps=5)


@pytest.mark.supports("Models", "StableDiffusionInpaintPipeline, 4 channels")
def test_inpainting_with_four_channels(text_to_image: tuple[Any, Any]) -> None:
    plain, ours = (as_kind(pipe, diffusers.StableDiffusionInpaintPipeline) for pipe in text_to_image)
    check(plain, ours, True, image=picture(), mask_image=picture(1, "L"), height=32, width=32, strength=0.9)


@pytest.mark.supports("Models", "StableDiffusionInpaintPipeline, 9 channels")
@SEVERAL
def test_inpainting_with_nine_channels(folder: Path, several: bool) -> None:
    pipe = build_tiny_pipeline(folder, kind=diffusers.StableDiffusionInpaintPipeline, unet={"in_channels": 9})
    check(*compiled(pipe), several, image=picture(), mask_image=picture(1, "L"), height=32, width=32)


@pytest.mark.supports("Models", "StableDiffusionInstructPix2PixPipeline (three-way guidance)")
@SEVERAL
def test_instruct_pix2pix(folder: Path, several: bool) -> None:
    pipe = build_tiny_pipeline(folder, kind=diffusers.StableDiffusionInstructPix2PixPipeline, unet={"in_channels": 8})
    check(*compiled(pipe), several, image=picture(), image_guidance_scale=1.5)


@pytest.mark.supports("Models", "StableDiffusionControlNetPipeline")
@pytest.mark.parametrize(
    "settings",
    [
        {"control_guidance_end": 0.5},
        pytest.param({"guess_mode": True}, marks=NIGHTLY),
        pytest.param({"controlnet_conditioning_scale": 0.5}, marks=NIGHTLY),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_controlnet(text_to_image: tuple[Any, Any], settings: dict[str, Any]) -> None:
    control = build_controlnet(text_to_image[0].unet)
    kind = diffusers.StableDiffusionControlNetPipeline
    plain, ours = (as_kind(pipe, kind, controlnet=control) for pipe in text_to_image)
    check(plain, ours, "controlnet_conditioning_scale" in settings, image=picture(), **settings)


@pytest.mark.supports("Models", "StableDiffusionControlNetPipeline with several ControlNets")
@NIGHTLY
def test_several_controlnets(text_to_image: tuple[Any, Any]) -> None:
    controls = [build_controlnet(text_to_image[0].unet, seed) for seed in (0, 1)]
    kind = diffusers.StableDiffusionControlNetPipeline
    plain, ours = (as_kind(pipe, kind, controlnet=controls) for pipe in text_to_image)
    check(plain, ours, True, image=[picture(), picture(1)], controlnet_conditioning_scale=[1.0, 0.5])


@pytest.mark.supports("Models", "StableDiffusionXLPipeline")
@SEVERAL
def test_sdxl(sdxl: tuple[Any, Any], several: bool) -> None:
    check(*sdxl, several, original_size=(64, 48), crops_coords_top_left=(3, 5), guidance_rescale=0.5)


@pytest.mark.supports("Features", "clip_skip")
def test_clip_skip(sdxl: tuple[Any, Any]) -> None:
    check(*sdxl, False, clip_skip=1)
    assert not torch.equal(draw(sdxl[0], BEFORE, **SETTINGS), draw(sdxl[0], BEFORE, **SETTINGS, clip_skip=1))


@pytest.mark.supports("Models", "StableDiffusionXLPipeline")
def test_sdxl_with_a_second_prompt(sdxl: tuple[Any, Any]) -> None:
    check(*sdxl, False, prompt_2="a green tree", negative_prompt_2="at night", negative_original_size=(16, 16))
    base = EditPipeline(sdxl[1]).generate(BEFORE, seed=1, prompt_2=BEFORE, **SETTINGS)
    result = base.edit(BEFORE, prompt_2=AFTER, detect=DetectConfig(steps=1, dilation=0))
    assert_background_kept(result, base)
    assert result.mask.any() and not torch.equal(result.latents, base.latents)


@pytest.mark.supports("Models", "SDXL refiner (StableDiffusionXLImg2ImgPipeline with the second text encoder alone)")
@SEVERAL
def test_sdxl_refiner(folder: Path, several: bool) -> None:
    base = build_tiny_sdxl(folder)
    unet = build_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=5 * 8 + 16
    )
    pipe = as_kind(
        base, diffusers.StableDiffusionXLImg2ImgPipeline, unet=unet, text_encoder=None, tokenizer=None,
        requires_aesthetics_score=True,
    )  # fmt: skip
    check(*compiled(pipe), several, image=picture(), strength=0.8, aesthetic_score=5.0, num_inference_steps=5)


@pytest.mark.supports("Models", "IP-Adapter through a pipeline (ip_adapter_image_embeds)")
@pytest.mark.parametrize("guidance", [3.0, pytest.param(1.0, marks=NIGHTLY)])
def test_ip_adapter(folder: Path, guidance: float) -> None:
    """Prompts of a list run one after the other: a pipeline does not spread the picture over several prompts."""
    plain = build_tiny_pipeline(folder)
    plain.unet._load_ip_adapter_weights([ip_adapter_weights(plain.unet)])
    embeds = torch.randn(2 if guidance > 1 else 1, 1, 24, generator=torch.Generator().manual_seed(3))
    check(*compiled(plain), guidance > 1, ip_adapter_image_embeds=[embeds], guidance_scale=guidance)


def ip_adapter_weights(unet: Any) -> dict[str, dict[str, Tensor]]:
    """Random weights of an IP-Adapter of 4 tokens over image embeddings ``[N, 24]``."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    cross = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    pairs = {}
    for number, attention in enumerate(cross):
        for kind in ("k", "v"):
            pairs[f"{2 * number + 1}.to_{kind}_ip.weight"] = weight(attention.to_v.out_features, TEXT)
    projection = {"proj.weight": weight(4 * TEXT, 24), "proj.bias": torch.zeros(4 * TEXT),
                  "norm.weight": torch.ones(TEXT), "norm.bias": torch.zeros(TEXT)}  # fmt: skip
    return {"image_proj": projection, "ip_adapter": pairs}


@pytest.mark.supports("Models", "LatentConsistencyModelPipeline (embedded guidance)")
@pytest.mark.parametrize("steps", [4, pytest.param(8, marks=NIGHTLY)])
def test_latent_consistency(folder: Path, steps: int) -> None:
    pipe = build_tiny_pipeline(folder, kind=diffusers.LatentConsistencyModelPipeline, unet={"time_cond_proj_dim": 16})
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    check(*compiled(pipe), steps == 8, num_inference_steps=steps, guidance_scale=8.0)


@pytest.mark.supports("Batches and rounds", "EditPipeline.generate([...]) with a picture and negative words of each")
def test_pictures_and_words_of_each_prompt(text_to_image: tuple[Any, Any]) -> None:
    plain, ours = (as_kind(pipe, diffusers.StableDiffusionImg2ImgPipeline) for pipe in text_to_image)
    editor, negatives = EditPipeline(ours), ["at night", "a tree"]
    pictures = [picture(), picture(1)]
    made = editor.generate([BEFORE, OTHER], seed=1, image=pictures, negative_prompt=negatives, **SETTINGS)
    for number, generation in enumerate(made):
        own = {"image": pictures[number], "negative_prompt": negatives[number], **SETTINGS}
        close(generation.latents, draw(plain, [BEFORE, OTHER][number], seed=1 + number, **own))
    for generation, result in zip(made, editor.edit(made, AFTER, mask=square()), strict=True):
        assert_background_kept(result, generation)
        close(result.latents, generation.edit(AFTER, mask=square()).latents)
    with pytest.raises(errors.UnknownOptionError, match="one for each of 2 prompts"):
        editor.generate([BEFORE, OTHER], image=[picture()] * 3, **SETTINGS)
    with pytest.raises(errors.UnknownOptionError, match="image='2 of them'.*one for a prompt"):
        editor.generate(BEFORE, image=pictures, **SETTINGS)
    single = editor.generate(BEFORE, seed=1, image=pictures[:1], negative_prompt=negatives[:1], **SETTINGS)
    close(single.latents, made[0].latents)
    with pytest.raises(errors.UnsupportedPipelineError, match="it takes `image`"):
        editor.invert(picture(), BEFORE)


@pytest.mark.supports("Models", "T2I-Adapter (StableDiffusionAdapterPipeline), through record() and edit()")
def test_t2i_adapter(text_to_image: tuple[Any, Any]) -> None:
    """It has no ``callback_on_step_end``; the U-Net's own sessions serve it."""
    torch.manual_seed(0)
    adapter = diffusers.T2IAdapter(channels=[32, 64], num_res_blocks=1, downscale_factor=2, in_channels=3)
    kind = diffusers.StableDiffusionAdapterPipeline
    plain, ours = (as_kind(pipe, kind, adapter=adapter) for pipe in text_to_image)
    with pytest.raises(errors.UnsupportedPipelineError, match="callback_on_step_end"):
        EditPipeline(ours)
    settings = {"image": picture(), **SETTINGS}
    with ours.unet.record() as base:
        close(draw(ours, BEFORE, **settings), draw(plain, BEFORE, **settings))
    recorded = draw(plain, BEFORE, **settings)
    with ours.unet.edit(base, square()):
        close(draw(ours, BEFORE, **settings), recorded)
    with ours.unet.edit(base, square()) as edit:
        edited = draw(ours, AFTER, **settings)
    close(edited[..., ~square()], recorded[..., ~square()])
    assert not torch.allclose(edited, recorded, atol=1e-3) and len(edit.timings["sparse"]) == 4
    with ours.unet.edit(base, detect=DetectConfig(steps=1, dilation=0)) as edit:
        draw(ours, AFTER, **settings)
    assert edit.mask is not None and edit.mask.any()
    assert [len(edit.timings[kind]) for kind in ("detect", "sparse")] == [1, 3]


@pytest.mark.supports("Models", "StableDiffusionDepth2ImgPipeline")
@SEVERAL
def test_depth_to_image(folder: Path, several: bool) -> None:
    pipe = build_tiny_pipeline(folder, unet={"in_channels": 5})
    parts = {k: v for k, v in pipe.components.items() if k not in ("safety_checker", "image_encoder")}
    pipe = quiet(diffusers.StableDiffusionDepth2ImgPipeline(**parts | {"depth_estimator": None}))
    depth = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0))
    check(*compiled(pipe), several, image=picture(), depth_map=depth, strength=0.8, num_inference_steps=5)


@NIGHTLY
def test_a_panorama_of_views_is_named(text_to_image: tuple[Any, Any]) -> None:
    editor = EditPipeline(as_kind(text_to_image[1], diffusers.StableDiffusionPanoramaPipeline))
    with pytest.raises(errors.UnsupportedPipelineError, match=r"whole latent \(64, 72\).*views of \(64, 64\)"):
        editor.generate(BEFORE, seed=1, height=128, width=144, num_inference_steps=1)
