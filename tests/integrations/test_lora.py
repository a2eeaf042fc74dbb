"""What the LoRA page says of scales and fusing, on a tiny pipeline, against diffusers alone."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tiny_pipeline import LATENT, build_tiny_pipeline

from fisedit import EditPipeline, errors

pytestmark = pytest.mark.supports("Integrations", "LoRA")

BEFORE, AFTER = "a red house on the left, on grass", "a blue house on the left, on grass"
SETTINGS = {"num_inference_steps": 3, "output_type": "np"}


@pytest.fixture
def pipe(tmp_path):
    return build_tiny_pipeline(tmp_path)


def add_lora(pipe):
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")


def plain(pipe):
    """What diffusers alone draws; the pipeline's own U-Net is not the compiled one."""
    return pipe(BEFORE, generator=torch.Generator().manual_seed(1), **SETTINGS).images[0]


def mask():
    made = torch.zeros(LATENT, LATENT)
    made[4:10, 2:8] = 1
    return made


def test_a_lora_loaded_before_compile(pipe):
    add_lora(pipe)
    pipe.unet.set_adapters(["style"], [0.5])
    editor = EditPipeline(pipe)
    base = editor.generate(BEFORE, seed=1, **SETTINGS)
    assert np.abs(editor.edit(base, BEFORE, mask=mask()).image - plain(pipe)).max() < 1e-3


def test_each_scale_is_recorded_and_edited_as_it_is(pipe):
    editor = EditPipeline(pipe)
    add_lora(pipe)
    pictures, bases = [], []
    for scale in (1.0, 0.25):
        pipe.unet.set_adapters(["style"], [scale])
        bases.append(editor.generate(BEFORE, seed=1, **SETTINGS))
        pictures.append(plain(pipe))
        assert np.abs(bases[-1].image - pictures[-1]).max() < 1e-3
        again = editor.edit(bases[-1], BEFORE, mask=mask())  # the same words: the active region computes the same
        assert np.abs(again.image - pictures[-1]).max() < 1e-3
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-2
    with pytest.raises(errors.ForeignRecordingError, match="scaling"):
        editor.edit(bases[0], AFTER, mask=mask())
    pipe.unet.set_adapters(["style"], [1.0])
    assert editor.edit(bases[0], AFTER, mask=mask()).background_is_identical


def test_a_fused_lora_draws_the_same(pipe):
    editor = EditPipeline(pipe)
    add_lora(pipe)
    base = editor.generate(BEFORE, seed=1, **SETTINGS)
    pipe.unet.fuse_lora()
    fused = editor.generate(BEFORE, seed=1, **SETTINGS)
    assert np.abs(fused.image - base.image).max() < 1e-3
    with pytest.raises(errors.ForeignRecordingError):
        editor.edit(base, AFTER, mask=mask())
    assert editor.edit(fused, AFTER, mask=mask()).background_is_identical
