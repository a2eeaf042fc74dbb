"""EditPipeline with lists of prompts and bases, and with photographs: as one by one, backgrounds exact."""

import copy

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from editing import AFTER, BEFORE, PROMPTS, SETTINGS, assert_background_kept, pixels, square
from PIL import Image
from tiny_pipeline import build_tiny_pipeline

from fisedit import DetectConfig, EditPipeline, errors
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


@pytest.mark.supports("Batches and rounds", "EditPipeline.generate([...]) of several prompts")
def test_several_prompts_at_once(editor):
    """Each comes out as it does alone, and is edited alone."""
    made = editor.generate([BEFORE, *PROMPTS[:1]], seed=3, **SETTINGS)
    for number, (prompt, generation) in enumerate(zip([BEFORE, AFTER], made, strict=True)):
        alone = editor.generate(prompt, seed=3 + number, **SETTINGS)
        torch.testing.assert_close(generation.latents, alone.latents, rtol=1e-4, atol=1e-4)
        assert len(generation.images) == 1 and generation.prompt == prompt
        result = generation.edit(PROMPTS[1], mask=square())
        torch.testing.assert_close(result.latents, alone.edit(PROMPTS[1], mask=square()).latents, rtol=1e-3, atol=1e-3)
        assert_background_kept(result, generation)


@pytest.mark.supports("Batches and rounds", "EditPipeline.edit([...]): many edits of one base at once")
@pytest.mark.parametrize("batch_size", [2, 8])
def test_many_edits_at_once_equal_one_by_one(base, batch_size):
    together = base.edit(PROMPTS, mask=[square(), "auto", square(0, 0)], batch_size=batch_size)
    for prompt, mask, result in zip(PROMPTS, [square(), "auto", square(0, 0)], together, strict=True):
        alone = base.edit(prompt, mask=mask)
        assert torch.equal(result.mask, alone.mask)
        torch.testing.assert_close(result.latents, alone.latents, rtol=1e-3, atol=1e-3)
        assert_background_kept(result, base)
        assert result.prompt == prompt and result.report.active_share == alone.report.active_share
    again = together[0].edit(PROMPTS[1:], mask=square(9, 9))
    for result in again:
        assert_background_kept(result, together[0])


@pytest.mark.supports("Batches and rounds", "EditPipeline.edit([...]): edits of several bases at once")
def test_edits_of_several_bases(editor, base):
    """Bases that were sampled otherwise cannot share a call: they run one after the other, as well."""
    other = editor.generate(BEFORE, seed=9, **SETTINGS)
    longer = editor.generate(BEFORE, seed=9, num_inference_steps=3)
    twice = editor.generate(BEFORE, seed=9, num_images_per_prompt=2, **SETTINGS)
    bases = [base, other, longer, twice, other]
    for given, result in zip(bases, editor.edit(bases, AFTER, mask=square()), strict=True):
        assert_background_kept(result, given)
        torch.testing.assert_close(result.latents, given.edit(AFTER, mask=square()).latents, rtol=1e-3, atol=1e-3)
    with pytest.raises(errors.UnknownOptionError, match="one for each of 2 edits"):
        editor.edit([base, other], PROMPTS[:1])
    with pytest.raises(errors.UnknownOptionError, match="base="):
        editor.edit(None, AFTER)


def test_an_edit_that_changes_nothing_among_others(base):
    with pytest.warns(EmptyMaskWarning):
        kept, changed = base.edit([BEFORE, AFTER], detect=DetectConfig(steps=2))
    assert np.array_equal(pixels(kept.image), pixels(base.image)) and torch.equal(kept.latents, base.latents)
    assert not torch.equal(changed.latents, base.latents)


@pytest.mark.supports("Samplers", "a real photograph: EditPipeline.invert")
@pytest.mark.parametrize("size", [(32, 32), (50, 25)])
def test_a_photograph_becomes_a_base(pipe, editor, size):
    """The base ends in the encoded picture, bit for bit, and edits keep it outside their mask."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    photo = coarse.resize(size, Image.Resampling.BICUBIC)
    base = editor.invert(photo, BEFORE, num_inference_steps=6, guidance_scale=5.0)
    scaled = photo.resize(base.image.size, Image.Resampling.LANCZOS)
    with torch.no_grad():
        values = torch.tensor(pixels(scaled) / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
        wanted = pipe.vae.encode(values).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(base.latents, wanted, rtol=1e-5, atol=1e-5)
    result = base.edit(AFTER)
    assert_background_kept(result, base)
    assert result.mask.any() and not torch.equal(result.latents, base.latents)
    side = base.latents.shape[-2:]
    both = base.edit(PROMPTS[:2], mask=torch.ones(side).triu())
    assert_background_kept(both[1], base)
    assert_background_kept(both[0].edit(BEFORE, mask=torch.ones(side).tril()), both[0])


def test_the_way_to_the_photograph_is_no_change(editor):
    """The inversion's latents are not those that the sampler makes, and guidance parts them further. With the same
    words nothing of that is taken for a change."""
    coarse = Image.fromarray(np.random.default_rng(1).integers(0, 255, (5, 5, 3), dtype=np.uint8))
    base = editor.invert(coarse.resize((32, 32)), BEFORE, num_inference_steps=6, guidance_scale=5.0)
    assert max(float(correction.abs().max()) for correction in base.recording.corrections) > 0.1
    with pytest.warns(EmptyMaskWarning):
        assert not base.edit(BEFORE).mask.any()


def test_what_cannot_be_inverted_is_named(editor, pipe):
    with pytest.raises(errors.UnknownOptionError, match="a PIL image"):
        editor.invert("photo.png", BEFORE)
    flow = copy.copy(editor)
    flow.pipe = copy.copy(editor.pipe)
    flow.pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(errors.UnknownOptionError, match="beta schedule"):
        flow.invert(Image.new("RGB", (32, 32)), BEFORE)
