"""EditPipeline over a tiny Stable Diffusion pipeline: exact backgrounds, rounds, schedulers, and what bad input gets.

The reference is always the untouched diffusers pipeline, or the recorded run.
"""

import copy
import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from editing import AFTER, BEFORE, PROMPTS, SETTINGS, assert_background_kept, pixels, plain, square, with_scheduler
from PIL import Image
from tiny_pipeline import LATENT, build_tiny_pipeline

from fisedit import CacheConfig, DetectConfig, EditPipeline, errors
from fisedit.warnings import EmptyMaskWarning


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return build_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def editor(pipe):
    return EditPipeline(pipe)


@pytest.fixture(scope="module")
def base(editor):
    return editor.generate(BEFORE, seed=3, **SETTINGS)


def test_generating_draws_what_diffusers_draws(pipe, base):
    theirs = plain(pipe, BEFORE, 3, **SETTINGS)
    assert np.abs(pixels(base.image) - pixels(theirs)).max() <= 1


def test_the_pipeline_given_is_not_changed(pipe, editor):
    assert editor.pipe is not pipe and editor.pipe.unet is not pipe.unet
    assert all(a is b for a, b in zip(editor.pipe.unet.parameters(), pipe.unet.parameters(), strict=True))


def test_an_automatic_mask_keeps_the_background(base):
    result = base.edit(AFTER)
    share = result.report.active_share
    assert 0 < share < 1 and share == pytest.approx(float(result.mask.float().mean()))
    assert_background_kept(result, base)
    assert not torch.equal(result.latents[..., result.mask], base.latents[..., result.mask])
    assert result.report.detect_steps == 2
    assert [len(result.report.timings[kind]) for kind in ("detect", "sparse", "dense")] == [2, 3, 0]


@pytest.mark.parametrize(
    "give",
    [
        lambda m: m,
        lambda m: m.numpy(),
        lambda m: m[None, None].float(),
        lambda m: Image.fromarray(m.numpy().astype("uint8") * 255).resize((128, 128), Image.Resampling.NEAREST),
    ],
    ids=["tensor", "array", "float 4-D", "large picture"],
)
def test_a_user_mask_is_taken_as_it_is(base, give):
    result = base.edit(AFTER, mask=give(square()), record=False)
    assert torch.equal(result.mask, square())
    assert_background_kept(result, base)
    assert len(result.report.timings["sparse"]) == SETTINGS["num_inference_steps"]
    assert not torch.equal(result.latents[..., square()], base.latents[..., square()])


def test_the_same_prompt_computed_sparsely_draws_the_recorded_image(base):
    """Nothing changed, so the computed positions must come out as recorded: every sparse step is right."""
    result = base.edit(BEFORE, mask=square(), record=False)
    assert len(result.report.timings["sparse"]) == SETTINGS["num_inference_steps"]
    torch.testing.assert_close(result.latents, base.latents, rtol=1e-4, atol=1e-4)
    assert_background_kept(result, base)


def test_several_rounds_each_keep_the_background_of_the_one_before(base):
    first = base.edit(AFTER, mask=square(1, 1))
    second = first.edit("a blue tree on the left, on grass, at noon", mask=square(8, 8))
    third = second.edit("a blue tree on the left, on sand, at noon")
    assert_background_kept(first, base)
    assert_background_kept(second, first)
    assert_background_kept(third, second)
    assert torch.equal(second.latents[..., square(1, 1)], first.latents[..., square(1, 1)])


def test_a_base_on_the_disk_gives_the_same_pictures(pipe, base, tmp_path):
    """Generated, edited where a mask is found, and edited again: bit for bit; the report says where the base lies."""
    editor = EditPipeline(pipe, cache=CacheConfig(gpu=0, host=0, disk=tmp_path / "cache"))
    on_disk = editor.generate(BEFORE, seed=3, **SETTINGS)
    detect = DetectConfig(dilation=0)
    results = [base, base.edit(AFTER, detect=detect)]
    others = [on_disk, on_disk.edit(AFTER, detect=detect)]
    for made in (results, others):
        made.append(made[-1].edit("a blue tree on the left, on grass, at noon", mask=square(8, 8)))
    for result, other in zip(results, others, strict=True):
        assert torch.equal(other.latents, result.latents)
        assert np.array_equal(pixels(other.image), pixels(result.image))
    for other, edited in zip(others[1:], others, strict=False):
        assert 0 < other.report.active_share < 1
        placement = other.report.placement
        assert placement == edited.recording.placement()
        assert all(set(placement[kind]) == {"disk"} for kind in ("maps", "keys", "queries"))
    assert "disk" in str(others[1].report) and "disk" not in str(results[1].report)
    assert list((tmp_path / "cache").rglob("*.safetensors"))


def test_many_edits_of_one_base_do_not_touch_it(base):
    latents = base.latents.clone()
    first = base.edit(AFTER, mask=square(), record=False)
    base.edit("a green cat in the middle, on sand, at night", mask=square(0, 0, 9, 9))
    again = base.edit(AFTER, mask=square(), record=False)
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(base.latents, latents)


def test_an_empty_mask_gives_the_recorded_image_and_warns(base):
    with pytest.warns(EmptyMaskWarning):
        result = base.edit(AFTER, mask=torch.zeros(LATENT, LATENT))
    assert np.array_equal(pixels(result.image), pixels(base.image))
    assert torch.equal(result.latents, base.latents)
    assert_background_kept(result.edit(AFTER, mask=square()), base)


def test_equal_prompts_give_the_recorded_image(base):
    with pytest.warns(EmptyMaskWarning):
        result = base.edit(BEFORE)
    assert not result.mask.any()
    assert torch.equal(result.latents, base.latents)
    assert np.array_equal(pixels(result.image), pixels(base.image))


def test_a_full_mask_is_the_dense_rerun(pipe, editor, base):
    result = base.edit(AFTER, mask=torch.ones(LATENT, LATENT))
    theirs = plain(pipe, AFTER, 3, **SETTINGS)
    assert np.abs(pixels(result.image) - pixels(theirs)).max() <= 1
    assert np.array_equal(pixels(editor.rerun(base, AFTER)[0][0]), pixels(theirs))
    assert_background_kept(result.edit(BEFORE, mask=square()), result)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_inference_steps": 6}, "num_inference_steps: recorded 5, edited with 6"),
        ({"guidance_scale": 1.0}, "guidance_scale: recorded 4.0, edited with 1.0"),
        ({"height": 64}, "height: recorded None, edited with 64"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt: recorded 1, edited with 2"),
        ({"negative_prompt": "blurry"}, "negative_prompt: recorded None, edited with 'blurry'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_than_the_recording_are_named(base, change, named):
    with pytest.raises(errors.RecordingMismatchError, match=named):
        base.edit(AFTER, **change)


def test_repeating_the_settings_is_allowed(base):
    assert_background_kept(base.edit(AFTER, mask=square(), record=False, **SETTINGS), base)


def test_an_edit_samples_as_its_base_did(editor, base):
    """Whatever scheduler the pipeline has got since."""
    swapped = copy.copy(editor)
    swapped.pipe = with_scheduler(editor.pipe, PNDMScheduler)
    swapped.pipe.unet = editor.pipe.unet
    result = swapped.edit(base, AFTER, mask=square(), record=False)
    assert torch.equal(result.latents, base.edit(AFTER, mask=square(), record=False).latents)


def test_bfloat16_on_a_cpu_edits_and_another_dtype_is_named(tmp_path):
    editor = EditPipeline(build_tiny_pipeline(tmp_path).to(torch.bfloat16))
    base = editor.generate(BEFORE, seed=0, num_inference_steps=3)
    assert_background_kept(base.edit(AFTER, mask=square()), base)
    editor.pipe.to(torch.float32)
    with pytest.raises(errors.ForeignRecordingError, match="changed since"):
        base.edit(AFTER)


def test_half_precision_on_a_cpu_is_refused(tmp_path):
    pipe = build_tiny_pipeline(tmp_path).to(torch.float16)
    with pytest.raises(errors.UnsupportedDtypeError, match="float16 on cpu"):
        EditPipeline(pipe).generate(BEFORE, seed=0, num_inference_steps=2)


def test_the_form_of_the_output_may_differ_from_the_recording(base):
    result = base.edit(AFTER, mask=square(), output_type="latent")
    assert torch.equal(result.images[0], result.latents[0])
    with pytest.raises(errors.UnknownOptionError, match="'pil', 'np' or 'pt'"):
        result.contact_sheet()


@pytest.mark.parametrize("kind", ["np", "pt"])
def test_arrays_can_be_shown(base, kind):
    result = base.edit(AFTER, mask=square(), output_type=kind)
    assert np.array_equal(pixels(result.pictures[0]), pixels(base.edit(AFTER, mask=square()).image))
    assert result.contact_sheet().width > 0 and "img" in result._repr_html_()


@pytest.mark.parametrize("use", ["generate", "edit"])
def test_a_prompt_that_is_too_long_is_not_cut(editor, base, use):
    long = " ".join(["house"] * 90)
    with pytest.raises(errors.PromptTooLongError, match="92 tokens"):
        editor.generate(long, seed=0, **SETTINGS) if use == "generate" else base.edit(long)


def test_a_recording_of_another_model_is_refused(tmp_path, base):
    other = EditPipeline(build_tiny_pipeline(tmp_path, seed=1))
    with pytest.raises(errors.ForeignRecordingError):
        other.edit(base, AFTER)


def test_an_edit_that_kept_nothing_cannot_be_edited(base):
    result = base.edit(AFTER, mask=square(), record=False)
    with pytest.raises(errors.NotRecordedError, match="record=True"):
        result.edit(BEFORE)


def test_a_released_recording_cannot_be_edited(editor):
    base = editor.generate(BEFORE, seed=0, num_inference_steps=2)
    base.recording.release()
    with pytest.raises(errors.SessionClosedError):
        base.edit(AFTER)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((LATENT, LATENT), float("nan")), "NaN"),
        (torch.full((LATENT, LATENT), 3.0), "in 3..3"),
        (torch.zeros(3, 4, 5), r"\[3, 4, 5\]"),
        (np.zeros((4, 4), dtype=complex), "complex"),
    ],
    ids=["nan", "range", "shape", "dtype"],
)
def test_a_mask_that_cannot_be_meant_is_refused(base, mask, message):
    with pytest.raises(errors.InvalidMaskError, match=message):
        base.edit(AFTER, mask=mask)


def test_an_unknown_argument_is_named(editor):
    with pytest.raises(errors.UnknownOptionError, match="num_steps"):
        editor.generate(BEFORE, num_steps=3)
    for prompt in (None, 3, [BEFORE, None], []):
        with pytest.raises(errors.UnknownOptionError, match="prompt="):
            editor.generate(prompt)
    for name, given in {
        "num_inference_steps": 0,
        "num_images_per_prompt": 1.5,
        "seed": -1,
        "generator": [None],
    }.items():
        with pytest.raises(errors.UnknownOptionError, match=name):
            editor.generate(BEFORE, **{name: given})
    for given in ({"seed": [1]}, {"generator": []}, {"num_images_per_prompt": 2}):
        with pytest.raises(errors.UnknownOptionError, match=next(iter(given))):
            editor.generate([BEFORE, AFTER], **given)


def test_a_pipeline_without_what_we_need_is_named():
    class Transformer:
        def __call__(self, prompt):
            raise AssertionError

    with pytest.raises(errors.UnsupportedPipelineError, match="`unet`.*`scheduler`.*callback_on_step_end"):
        EditPipeline(Transformer())


@pytest.mark.parametrize("moment", ["record", "edit"])
def test_after_an_exception_the_next_call_is_dense_and_right(pipe, editor, base, moment):
    class Stop(Exception):
        pass

    def stop(_, step, __, kwargs):
        if step == 3:
            raise Stop
        return kwargs

    before = base.edit(AFTER, mask=square(), record=False).latents
    with pytest.raises(Stop):
        if moment == "record":
            editor.generate(BEFORE, seed=3, **SETTINGS, callback_on_step_end=stop)
        else:
            base.edit(AFTER, callback_on_step_end=stop)
    ours = plain(editor.pipe, AFTER, 3, **SETTINGS)
    assert np.array_equal(pixels(ours), pixels(plain(pipe, AFTER, 3, **SETTINGS)))
    assert torch.equal(base.edit(AFTER, mask=square(), record=False).latents, before)


def test_seeds(editor):
    settings = {"num_inference_steps": 2}
    one, same = (editor.generate(BEFORE, seed=5, **settings).latents for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one, editor.generate(BEFORE, seed=6, **settings).latents)
    assert not torch.equal(editor.generate(BEFORE, **settings).latents, editor.generate(BEFORE, **settings).latents)


def test_a_generator_takes_the_place_of_the_seed(editor):
    generator = torch.Generator().manual_seed(5)
    given = editor.generate(BEFORE, generator=generator, num_inference_steps=2)
    assert torch.equal(given.latents, editor.generate(BEFORE, seed=5, num_inference_steps=2).latents)
    assert_background_kept(given.edit(AFTER, mask=square()), given)


def test_the_users_callback_is_called_in_every_run(editor):
    seen = []

    def note(_, step, timestep, kwargs):
        seen.append((step, kwargs["latents"].clone()))
        return kwargs

    base = editor.generate(BEFORE, seed=0, num_inference_steps=3, callback_on_step_end=note)
    result = base.edit(AFTER, mask=square())
    assert [step for step, _ in seen] == [0, 1, 2, 0, 1, 2]
    assert torch.equal(seen[2][1], base.latents) and torch.equal(seen[5][1], result.latents)


def test_several_images_of_one_prompt(pipe):
    editor = EditPipeline(pipe)
    base = editor.generate(BEFORE, seed=0, num_inference_steps=4, num_images_per_prompt=2)
    result = base.edit(AFTER)
    assert len(base.images) == len(result.images) == 2
    assert_background_kept(result, base)
    assert base.contact_sheet().width > 2 * 256
    assert result.contact_sheet().height > 2 * 256


def test_no_guidance_and_a_size_that_is_not_square(pipe):
    editor = EditPipeline(pipe)
    base = editor.generate(BEFORE, seed=0, num_inference_steps=3, guidance_scale=1.0, height=24, width=40)
    mask = torch.zeros(12, 20, dtype=torch.bool)
    mask[3:8, 11:17] = True
    result = base.edit(AFTER, mask=mask)
    assert result.image.size == (40, 24)
    assert_background_kept(result, base)


def test_detect_options_reach_the_mask(base):
    small = base.edit(AFTER, detect=DetectConfig(steps=3, dilation=0), record=False)
    large = base.edit(AFTER, detect=DetectConfig(steps=3, dilation=2), record=False)
    assert small.report.detect_steps == 3
    assert (small.mask <= large.mask).all() and small.mask.sum() < large.mask.sum()
    with pytest.raises(errors.UnknownOptionError, match="steps=5"):
        base.edit(AFTER, detect=DetectConfig(steps=5))


def test_a_dropped_base_frees_its_feature_maps(editor):
    base = editor.generate(BEFORE, seed=0, num_inference_steps=2)
    held = [call.cache for call in base.recording.calls.values()]
    assert base.recording.nbytes > 0
    gone = weakref.ref(held[0])
    del base, held
    gc.collect()
    assert gone() is None


def test_no_warning_in_an_ordinary_edit(base):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base.edit(AFTER, mask=square())


def test_an_interrupted_run_is_not_a_base(editor):
    def stop(pipe, step, _, kwargs):
        pipe._interrupt = step == 1
        return kwargs

    base = editor.generate(BEFORE, seed=0, num_inference_steps=4, callback_on_step_end=stop)
    with pytest.raises(errors.IncompleteRecordingError, match="did not finish"):
        base.edit(AFTER)


def test_guidance_cut_off_by_a_diffusers_callback(pipe, editor):
    """Its calls carry half the samples from the cut on."""
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.6)
    base = editor.generate(BEFORE, seed=3, **SETTINGS, callback_on_step_end=cutoff)
    theirs = plain(pipe, BEFORE, 3, **SETTINGS, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.6))
    assert np.abs(pixels(base.image) - pixels(theirs)).max() <= 1
    assert {len(call.sample) for call in base.recording.calls.values()} == {1, 2}
    result = base.edit(AFTER)
    assert_background_kept(result, base)
    assert len(result.report.timings["sparse"]) == 3


def test_settings_are_compared_by_value(pipe):
    editor = EditPipeline(with_scheduler(pipe, EulerDiscreteScheduler))
    sigmas = np.array([10.0, 4.0, 1.0, 0.2])
    negative = torch.randn(1, 77, 32)
    base = editor.generate(BEFORE, seed=0, sigmas=sigmas, negative_prompt_embeds=negative)
    assert_background_kept(base.edit(AFTER, mask=square(), sigmas=sigmas.copy(), negative_prompt_embeds=negative), base)
    for change in ({"sigmas": sigmas / 2}, {"negative_prompt_embeds": negative + 1}, {"sigmas": None}):
        with pytest.raises(errors.RecordingMismatchError, match=next(iter(change))):
            base.edit(AFTER, **change)


def test_two_threads_share_one_editor(editor, base):
    alone = [base.edit(prompt, mask=square()).latents for prompt in PROMPTS[:2]]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda prompt: base.edit(prompt, mask=square()), PROMPTS[:2]))
    for result, latents in zip(results, alone, strict=True):
        assert torch.equal(result.latents, latents)


def test_a_released_base_can_still_be_looked_at(editor):
    base = editor.generate(BEFORE, seed=0, num_inference_steps=2)
    result = base.edit(AFTER, mask=square())
    base.recording.release()
    assert base.latents.shape == (1, 4, LATENT, LATENT) and "img" in base._repr_html_()
    assert_background_kept(result, base)
    assert_background_kept(result.edit(BEFORE, mask=square(0, 0)), result)
