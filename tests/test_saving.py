"""Bases that survive the process: what comes back from a folder, and into which models.

The reference is the edit of the base that was never saved, bit for bit.
"""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
)
from editing import AFTER, BEFORE, PROMPTS, QUICK, assert_background_kept, assert_edits_alike, sampled_by, square
from files import resident
from peft import LoraConfig
from tiny_pipeline import build_tiny_pipeline, build_tiny_sdxl, picture, quiet

from fisedit import EditPipeline, errors, identity


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def pipe(tokenizer):
    return build_tiny_pipeline(tokenizer)


@pytest.fixture(scope="module")
def editor(pipe):
    return EditPipeline(pipe)


@pytest.fixture(scope="module")
def base(editor):
    return editor.generate(BEFORE, seed=3, **QUICK)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """A folder that no test changes."""
    folder = tmp_path_factory.mktemp("saved") / "base"
    base.save(folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of the folder, for a test to change."""
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def test_an_edit_of_a_loaded_base_is_the_edit_of_the_base(editor, base, saved):
    loaded = editor.load(saved)
    assert loaded.prompt == base.prompt and loaded.images == base.images and loaded.seconds == base.seconds
    assert loaded.run.settings == base.run.settings and torch.equal(loaded.latents, base.latents)
    assert_background_kept(assert_edits_alike(base, loaded, mask="auto"), base)
    assert_background_kept(assert_edits_alike(base, loaded), loaded)
    assert loaded.edit(AFTER, mask=square()).report.seconds_recorded == base.edit(AFTER).report.seconds_recorded


def test_a_recording_comes_back_call_by_call(editor, base, saved):
    loaded, recording = editor.pipe.unet.load_recording(saved), base.recording
    assert list(loaded.calls) == list(recording.calls) and loaded.complete and loaded.nbytes == recording.nbytes
    for made, call in zip(loaded.calls.values(), recording.calls.values(), strict=True):
        assert made.signature == call.signature and not made.signature.differences(call.signature)
        assert (made.batch, made.cache.batch, made.graph) == (call.batch, call.cache.batch, call.graph)
        assert all(torch.equal(made.cache.load(slot), call.cache.load(slot)) for slot in call.cache.values)
        assert torch.equal(made.sample, call.sample) and torch.equal(made.text, call.text)
        assert all(torch.equal(a, b) for a, b in zip(made.outputs, call.outputs, strict=True))
    assert len({id(call.text) for call in loaded.calls.values()}) == 1  # one text, as it was
    assert all(torch.equal(a, b) for a, b in zip(loaded.latents, recording.latents, strict=True))


def test_nothing_is_pickled(editor, base, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("pickle")

    for module, name in ((pickle, "dump"), (pickle, "dumps"), (pickle, "Pickler"), (torch, "save"),
                         (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):  # fmt: skip
        monkeypatch.setattr(module, name, never)
    base.save(tmp_path / "b")
    editor.load(tmp_path / "b")
    assert {path.suffix for path in (tmp_path / "b").iterdir()} == {".json", ".safetensors", ".png"}


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what of a mapping is resident")
def test_feature_maps_stay_in_their_files_until_they_are_read(editor, damaged):
    loaded = editor.load(damaged)
    files = sorted(damaged.glob("call-*"))
    assert all(path.stat().st_size > 2**20 for path in files)
    # Statistics, and the windows of 64 KiB that Linux maps around them: two where they lie on both sides of a border,
    # which the address of the mapping, drawn at random, decides.
    assert all(resident(path) <= 2 * 2**16 for path in files)
    loaded.edit(AFTER, mask=square(), record=False)
    assert all(resident(path) > 2**17 for path in files)


def test_a_folder_may_go_once_it_is_loaded(editor, base, damaged):
    loaded = editor.load(damaged)
    shutil.rmtree(damaged)
    assert_edits_alike(base, loaded)


def test_settings_of_all_kinds(editor, tmp_path):
    editor = sampled_by(editor, EulerDiscreteScheduler)
    settings = {
        "sigmas": np.array([10.0, 4.0, 1.0, 0.2]), "negative_prompt_embeds": torch.randn(1, 77, 32).bfloat16().float(),
        "guidance_scale": np.float64(3.0), "height": 32, "width": 32, "output_type": "np", "clip_skip": None,
        "guidance_rescale": 0.1, "callback_on_step_end_tensor_inputs": ("latents",), "cross_attention_kwargs": {},
    }  # fmt: skip
    base = editor.generate(BEFORE, seed=1, **settings)
    base.save(tmp_path / "b")
    loaded = editor.load(tmp_path / "b", guidance_scale=3.0, height=32, sigmas=[10.0, 4.0, 1.0, 0.2])
    for name, value in settings.items():
        back = loaded.run.settings[name]
        assert type(back) is type(value)
        assert np.array_equal(back, value) if isinstance(value, (np.ndarray, torch.Tensor)) else back == value
    assert np.array_equal(loaded.image, base.image) and loaded.image.dtype == base.image.dtype
    assert_edits_alike(base, loaded, sigmas=settings["sigmas"])


@pytest.mark.parametrize("kind", ["pt", "latent"])
def test_images_that_are_tensors(editor, tmp_path, kind):
    base = editor.generate(BEFORE, seed=1, num_inference_steps=2, output_type=kind)
    base.save(tmp_path / "b")
    assert torch.equal(editor.load(tmp_path / "b").image, base.image)


def test_pictures_among_the_settings(editor, tmp_path):
    parts = {**editor.pipe.components, "unet": editor.pipe.unet}
    editor = EditPipeline(quiet(StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)))
    given = {"image": picture(), "mask_image": picture(1, "L"), "strength": 0.8, "num_inference_steps": 4}
    base = editor.generate(BEFORE, seed=1, **given)
    base.save(tmp_path / "b")
    loaded = editor.load(tmp_path / "b", **given)  # the same pictures, by their pixels
    assert loaded.run.settings["image"].mode == "RGB" and loaded.run.settings["mask_image"].mode == "L"
    assert_edits_alike(base, loaded, image=picture())
    with pytest.raises(errors.SavedBaseMismatchError, match="image: saved with"):
        editor.load(tmp_path / "b", image=picture(5))


def test_two_text_encoders_and_added_conditions_in_bfloat16(tokenizer, tmp_path):
    editor = EditPipeline(build_tiny_sdxl(tokenizer).to(torch.bfloat16))
    base = editor.generate(BEFORE, seed=1, num_inference_steps=2)
    base.save(tmp_path / "b")
    assert_edits_alike(base, editor.load(tmp_path / "b"))
    editor.pipe.to(torch.float32)
    with pytest.raises(errors.SavedBaseMismatchError, match="dtype: saved with 'bfloat16', here 'float32'"):
        editor.load(tmp_path / "b")


def test_noise_of_a_stochastic_sampler_comes_back(editor, tmp_path):
    editor = sampled_by(editor, EulerAncestralDiscreteScheduler)
    generator = torch.Generator().manual_seed(5)
    torch.randn(7, generator=generator)  # somewhere in its sequence
    base = editor.generate(BEFORE, generator=generator, **QUICK)
    base.save(tmp_path / "b")
    assert_edits_alike(base, editor.load(tmp_path / "b"), mask="auto")


def test_a_photograph(editor, tmp_path):
    base = editor.invert(picture(2), BEFORE, num_inference_steps=4, guidance_scale=3.0)
    base.save(tmp_path / "b")
    loaded = editor.load(tmp_path / "b")  # its scheduler is one of its own, over the pipeline's noise
    assert len(loaded.recording.corrections) == 4
    assert_edits_alike(base, loaded, mask="auto")
    other = sampled_by(editor, EulerDiscreteScheduler)
    assert_edits_alike(base, other.load(tmp_path / "b"))
    other.pipe.scheduler = DDIMScheduler.from_config(editor.pipe.scheduler.config, beta_end=0.02)
    with pytest.raises(errors.SavedBaseMismatchError, match=r"scheduler\.beta_end: saved with 0\.012, here 0\.02"):
        other.load(tmp_path / "b")


def test_several_images_of_one_prompt(editor, tmp_path):
    base = editor.generate(BEFORE, seed=0, num_images_per_prompt=2, **QUICK)
    base.save(tmp_path / "b")
    loaded = editor.load(tmp_path / "b")
    assert len(loaded.images) == 2 and loaded.recording.images == 2
    assert_edits_alike(base, loaded, mask="auto")


def size(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def test_one_of_several_prompts_is_saved_alone(editor, saved, tmp_path):
    bases = editor.generate(PROMPTS[:2], seed=3, **QUICK)
    bases[1].save(tmp_path / "b")
    assert size(tmp_path / "b") < 1.01 * size(saved)  # nothing of the other
    loaded = editor.load(tmp_path / "b")
    assert loaded.prompt == PROMPTS[1]
    first, second = (b.edit(BEFORE, mask=square()) for b in (bases[1], loaded))
    assert torch.equal(first.latents, second.latents)


def test_an_edit_is_a_base_as_well(editor, base, tmp_path):
    """Whole: its own base is not needed any more, and the next edit is the one before saving."""
    first = base.edit(AFTER, mask=square(1, 1))
    second = first.edit(PROMPTS[1], mask=square(8, 8))
    second.save(tmp_path / "b")
    loaded = editor.load(tmp_path / "b")
    assert loaded.prompt == PROMPTS[1] and loaded.images == second.images
    assert all(call.cache.base is None for call in loaded.recording.calls.values())
    one, other = (result.edit(PROMPTS[2], mask=square(4, 4)) for result in (second, loaded))
    assert torch.equal(one.latents, other.latents)
    assert_background_kept(other, loaded)
    other.save(tmp_path / "c")  # an edit of what was loaded
    assert torch.equal(editor.load(tmp_path / "c").latents, one.latents)


def test_many_edits_at_once_of_a_loaded_and_a_new_base(editor, base, saved):
    loaded, new = editor.load(saved), editor.generate(PROMPTS[1], seed=8, **QUICK)
    assert loaded.run.fits(new.run)
    masks = [square(), square(1, 1)]
    wanted = editor.edit([base, new], [AFTER, BEFORE], mask=masks)
    for ours, theirs in zip(editor.edit([loaded, new], [AFTER, BEFORE], mask=masks), wanted, strict=True):
        assert torch.equal(ours.latents, theirs.latents)


def test_a_loaded_base_is_saved_again_also_where_it_lies(editor, base, damaged, tmp_path):
    loaded = editor.load(damaged)
    loaded.save(tmp_path / "c")
    loaded.save(damaged, overwrite=True)
    for folder in (tmp_path / "c", damaged):
        assert_edits_alike(base, editor.load(folder))
    assert_edits_alike(base, loaded)


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from tiny_pipeline import build_tiny_pipeline, square
from editing import AFTER, BEFORE, PROMPTS, QUICK, assert_background_kept, assert_edits_alike, sampled_by, square
from fisedit import EditPipeline

torch.set_num_threads(1)
mine, saved, write = Path(sys.argv[1]), sys.argv[2], os.write
editor = EditPipeline(build_tiny_pipeline(mine))
(mine / "begun").touch()
result = editor.load(saved).edit(AFTER, mask=square())
result.save(mine / "edit")
written = []

def killed(file, data):
    written.append(write(file, data[: len(data) // 2]))
    if len(written) == 150:
        os.kill(os.getpid(), signal.SIGKILL)
    return written[-1]

os.write = killed
result.save(mine / "killed")
"""


def test_another_process_edits_what_this_one_saved_and_edits_as_well(editor, base, saved, tmp_path):
    """Both at once. The other one saves its edit, for this one to load, and is killed while it saves it again."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"}  # sets come in another order than here
    command = [sys.executable, str(script), str(tmp_path), str(saved)]
    wanted, edits = base.edit(AFTER, mask=square()), 0
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        while not (tmp_path / "begun").exists() and child.poll() is None:
            time.sleep(0.05)
        while child.poll() is None or edits == 0:
            assert torch.equal(editor.load(saved).edit(AFTER, mask=square(), record=False).latents, wanted.latents)
            edits += 1
        assert child.returncode == -signal.SIGKILL, child.stderr.read()
    loaded = editor.load(tmp_path / "edit")
    assert torch.equal(loaded.latents, wanted.latents) and loaded.images == wanted.images
    again, then = (result.edit(BEFORE, mask=square(2, 2)) for result in (loaded, wanted))
    assert torch.equal(again.latents, then.latents)
    with pytest.raises(errors.UnfinishedSaveError, match=r"call-\d+\.safetensors is (missing|half written)"):
        editor.load(tmp_path / "killed")


# Loading into what it was not made by.


def test_another_model_is_refused(tokenizer, saved):
    def refused(says, *not_says, **parts):
        other = EditPipeline(build_tiny_pipeline(tokenizer, **parts))
        with pytest.raises(errors.SavedBaseMismatchError, match=says) as told:
            other.load(saved)
        assert not any(word in str(told.value) for word in not_says)

    refused("weights", "config", seed=1)
    refused(r"config\.norm_num_groups: saved with 8, here 4", "weights", unet={"norm_num_groups": 4})
    refused("pipeline: saved with 'StableDiff.*', here '.*InpaintPipeline'", kind=StableDiffusionInpaintPipeline)
    other = build_tiny_pipeline(tokenizer)
    other.unet.conv_in.weight.data[3, 1, 2, 0] += 1e-6  # one value, far from those that fingerprints look at
    with pytest.raises(errors.SavedBaseMismatchError, match="weights"):
        EditPipeline(other).load(saved)


def test_another_scheduler_is_refused_unless_any_will_do(editor, base, saved):
    other = sampled_by(editor, EulerDiscreteScheduler)
    with pytest.raises(errors.SavedBaseMismatchError, match="scheduler: saved with 'DDIM.*', here 'EulerDiscrete"):
        other.load(saved)
    assert_edits_alike(base, other.load(saved, any_scheduler=True))
    other.pipe.scheduler = DDIMScheduler.from_config(editor.pipe.scheduler.config, beta_end=0.02)
    with pytest.raises(errors.SavedBaseMismatchError, match=r"scheduler\.beta_end: saved with 0\.012, here 0\.02"):
        other.load(saved)


def test_settings_that_are_asked_for_must_be_those_of_the_base(editor, saved):
    assert editor.load(saved, **QUICK, output_type="np").run.settings == QUICK
    with pytest.raises(errors.SavedBaseMismatchError, match=r"guidance_scale: saved with 4\.0, here 5\.0"):
        editor.load(saved, guidance_scale=5.0)
    with pytest.raises(errors.SavedBaseMismatchError, match="height: saved with None, here 64"):
        editor.load(saved, height=64)
    with pytest.raises(errors.UnknownOptionError, match="steps"):
        editor.load(saved, steps=5)


def test_a_lora_is_another_model(tokenizer, saved, tmp_path):
    pipe = build_tiny_pipeline(tokenizer)
    editor = EditPipeline(pipe)
    loaded = editor.load(saved)
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(lora, "one")
    with pytest.raises(errors.ForeignRecordingError, match="changed since"):  # loaded before
        loaded.edit(AFTER, mask=square())
    with pytest.raises(errors.SavedBaseMismatchError, match="weights"):  # saved before
        editor.load(saved)
    base = editor.generate(BEFORE, seed=3, num_inference_steps=2)
    base.save(tmp_path / "lora")
    assert_edits_alike(base, editor.load(tmp_path / "lora"))
    pipe.unet.set_adapters("one", 0.25)
    scaled = editor.load(tmp_path / "lora")  # the weights are the same, but they count for less
    with pytest.raises(errors.ForeignRecordingError, match="saved with fisedit .* traces to another graph"):
        scaled.edit(AFTER, mask=square())


def test_a_model_inside_an_open_session_loads_and_saves_nothing(editor, base, saved, tmp_path):
    unet = editor.pipe.unet
    with unet.record(), pytest.raises(errors.NestedSessionError, match=r"load\(\) was entered while record\(\)"):
        editor.load(saved)
    with unet.edit(base.recording, square()), pytest.raises(errors.NestedSessionError, match="load_recording"):
        unet.load_recording(saved)
    with unet.record(), pytest.raises(errors.NestedSessionError, match=r"save\(\)"):
        base.save(tmp_path / "b")


def test_the_hash_of_weights_is_of_their_values_alone_and_made_once(tokenizer, saved, monkeypatch):
    unet, other = (build_tiny_pipeline(tokenizer).unet for _ in range(2))
    known = identity.hash_weights(unet)
    other = other.to(memory_format=torch.channels_last)
    for name, parameter in reversed(list(other.named_parameters())):  # registered in another order
        owner, _, key = name.rpartition(".")
        module = other.get_submodule(owner)
        del module._parameters[key]
        module._parameters[key] = parameter
    assert identity.hash_weights(other) == known
    other.register_buffer("more", torch.ones(1))
    assert identity.hash_weights(other) != known
    assert identity.hash_weights(unet.half()) != known

    made, hash_weights = [], identity.hash_weights
    monkeypatch.setattr(identity, "hash_weights", lambda model: made.append(model) or hash_weights(model))
    editor = EditPipeline(build_tiny_pipeline(tokenizer))
    for _ in range(3):
        editor.load(saved)
    assert len(made) == 1


def test_weights_that_cannot_be_read_are_named(tokenizer, saved):
    pipe = build_tiny_pipeline(tokenizer)
    pipe.unet.conv_in.to("meta")
    with pytest.raises(errors.UnreadableWeightsError, match=r"conv_in\.\w+ cannot be read: they are on the meta"):
        EditPipeline(pipe).load(saved)
