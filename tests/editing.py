"""What the tests of EditPipeline share: prompts, masks, and what must hold after an edit."""

import copy

import numpy as np
import torch
from tiny_pipeline import LATENT

BEFORE = "a red house on the left, on grass, at noon"
AFTER = "a blue house on the left, on grass, at noon"
PROMPTS = [AFTER, "a red tree on the left, on grass, at noon", "a red house on the left, on sand, at noon"]
SETTINGS = {"num_inference_steps": 5, "guidance_scale": 4.0}
QUICK = {**SETTINGS, "num_inference_steps": 3}


def square(top=4, left=5, height=6, width=5):
    mask = torch.zeros(LATENT, LATENT, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def plain(pipe, prompt, seed, **settings):
    """What diffusers alone draws."""
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images[0]


def assert_background_kept(result, base):
    outside = ~result.mask
    assert torch.equal(result.latents[..., outside], base.latents[..., outside])
    assert result.background_is_identical


def pixels(image):
    return np.asarray(image).astype(int)


def with_scheduler(pipeline, kind):
    """A shallow copy with another scheduler."""
    other = copy.copy(pipeline)
    other.scheduler = kind.from_config(pipeline.scheduler.config)
    return other


def sampled_by(editor, kind):
    """The same editor, with another scheduler."""
    other = copy.copy(editor)
    other.pipe = with_scheduler(editor.pipe, kind)
    return other


def assert_edits_alike(one, other, **options):
    """Two bases, edited in the same way, give the same bits."""
    options = {"mask": square(), "record": False, **options}
    first, second = one.edit(AFTER, **options), other.edit(AFTER, **options)
    assert torch.equal(first.latents, second.latents)
    assert all(np.array_equal(a, b) for a, b in zip(first.images, second.images, strict=True))
    return second
