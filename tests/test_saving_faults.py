"""Saved bases where something goes wrong: full disks, kills, damaged files, and what cannot be saved at all."""

import copy
import errno
import json
import os
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
)
from editing import AFTER, BEFORE, PROMPTS, QUICK, assert_edits_alike, square
from files import failing_write, flip
from PIL import Image
from tiny_pipeline import build_tiny_pipeline, picture

from fisedit import EditPipeline, errors, manifest
from fisedit.runtime.cache import disk


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


def reseal(folder, change):
    """Change a manifest as somebody could who knows the format."""
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    del content["checksum"]
    version = content.pop("format")
    sealed = manifest._sealed(content)
    (folder / "manifest.json").write_bytes(sealed.replace(b'"format": 1', b'"format": %d' % version, 1))


# Saving, and what may happen meanwhile.


def test_what_is_in_a_folder_is_not_overwritten_unasked(editor, base, damaged, tmp_path):
    with pytest.raises(errors.SavedBaseExistsError, match="holds a saved base"):
        base.save(damaged)
    other = editor.generate(PROMPTS[1], seed=9, num_inference_steps=2, output_type="latent")
    (damaged / "notes.txt").write_text("mine")
    other.save(damaged, overwrite=True)
    assert editor.load(damaged).prompt == PROMPTS[1]
    left = sorted(path.name.partition(".")[0] for path in damaged.iterdir())
    assert left == ["call-0000", "call-0001", "manifest", "notes", "values"]
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("mine")
    with pytest.raises(errors.SavedBaseExistsError, match=r"holds 'thesis\.tex'"):
        base.save(tmp_path / "used")
    with pytest.raises(errors.CacheWriteError, match=r"thesis\.tex"):
        base.save(tmp_path / "used" / "thesis.tex")
    assert (tmp_path / "used" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_a_disk_that_fails_leaves_nothing_and_the_base_as_it_was(editor, base, saved, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        failing_write(patch, 3_000_000, number)
        with pytest.raises(errors.CacheWriteError, match=rf"\.safetensors' cannot be written: {os.strerror(number)}"):
            base.save(tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []
    assert_edits_alike(base, editor.load(saved))
    base.save(tmp_path / "b")  # there is room again
    assert editor.load(tmp_path / "b").images == base.images


def test_a_disk_that_is_full_when_the_manifest_comes(editor, base, tmp_path, monkeypatch):
    write = disk.write_file

    def fail(path, pieces):
        if path.name == "manifest.json":
            raise errors.CacheWriteError(path=str(path), reason="No space left on device")
        return write(path, pieces)

    monkeypatch.setattr(manifest, "write_file", fail)
    with pytest.raises(errors.CacheWriteError, match=r"manifest\.json"):
        base.save(tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def killed_while(action, writes):
    """Fork, and let the child be killed by the system in the middle of its write number ``writes``.

    Returns whether it lived long enough to be killed: False if the action was over before.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside threads: this one ends without returning
        child = os.fork()
    if child == 0:
        signal.alarm(60)
        write, made = os.write, []

        def kill(file, data):
            made.append(None)
            if len(made) == writes:
                write(file, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(file, data)

        os.write = kill
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("over", ["nothing", "another"])
def test_a_save_that_is_killed_at_any_moment_is_told(editor, base, saved, tmp_path, over):
    """Or has come to its end. With the base that was overwritten, nothing is ever mixed."""
    folder, moments = tmp_path / "b", 0
    for writes in (1, 2, 40, 90, 95, 180, 240, 300, 310, 312, 313, 314, 315, 316, 400, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        if over == "another":
            shutil.copytree(saved, folder)
        if not killed_while(lambda: base.save(folder, overwrite=over == "another"), writes):
            assert editor.load(folder).images == base.images
            break
        moments += 1
        with pytest.raises(errors.UnfinishedSaveError, match=r"(call-\d+|values|picture-0|manifest)\.\w+ is ") as told:
            editor.load(folder)
        assert (folder / "manifest.json.partial").exists() and not (folder / told.value.file).exists()
        with pytest.raises(errors.SavedBaseExistsError, match="did not finish"):
            base.save(folder)
    assert moments >= 6
    base.save(folder, overwrite=True)
    assert not [path for path in folder.iterdir() if path.name.startswith(".") or path.name.endswith(".partial")]
    assert_edits_alike(base, editor.load(folder))


def test_a_save_that_was_cut_off_as_it_began_or_as_it_ended(editor, base, damaged):
    (damaged / "manifest.json.partial").write_text('{"id": "00", "files": []}')
    assert editor.load(damaged).images == base.images  # killed between the manifest and the end: all is there
    (damaged / "manifest.json").unlink()
    with pytest.raises(errors.UnfinishedSaveError, match=r"manifest\.json is missing"):
        editor.load(damaged)
    (damaged / "manifest.json.partial").write_text('{"id": "0')
    with pytest.raises(errors.UnfinishedSaveError, match=r"manifest\.json\.partial is half written"):
        editor.load(damaged)


def test_two_saves_into_one_folder_do_not_mix(editor, base, tmp_path, monkeypatch):
    """The second, told to overwrite, begins while the first still writes: the first gives up."""
    write, begun = disk.write_tensors, []

    def slow(path, tensors, metadata=None):
        if not begun:
            begun.append(path)
            base.save(tmp_path / "b", overwrite=True)
        return write(path, tensors, metadata)

    monkeypatch.setattr("fisedit.packing.write_tensors", slow)
    other = editor.generate(PROMPTS[1], seed=9, num_inference_steps=2)
    with pytest.raises((errors.SavedBaseExistsError, errors.CacheWriteError)):
        other.save(tmp_path / "b")
    with pytest.raises(errors.CacheReadError, match="values"):  # which the first wrote over the second's
        editor.load(tmp_path / "b")


def test_what_cannot_be_saved_is_named(editor, tmp_path):
    base = editor.generate(BEFORE, seed=0, num_inference_steps=2)
    settings, scheduler = base.run.settings, base.run.scheduler

    def refused(says, **run):
        base.run = replace(base.run, **run)
        with pytest.raises(errors.UnsavableSettingError, match=says):
            base.save(tmp_path / "b")
        base.run = replace(base.run, settings=settings, scheduler=scheduler)

    values = {"a function": print, "an object of object": object(), "mode CMYK": picture().convert("CMYK"),
              "array of <U4": np.array(["text"]), "sparse": torch.ones(2, 2).to_sparse(),
              "complex64": torch.ones(2, dtype=torch.complex64), "meta": torch.ones(2, device="meta")}  # fmt: skip
    for given, value in values.items():
        refused(rf"callback_on_step_end is .*{given}", settings={"callback_on_step_end": value})
    refused(r"cross_attention_kwargs\['more'\]\[0\] is", settings={"cross_attention_kwargs": {"more": [{1}]}})
    mine = type("Mine", (DDIMScheduler,), {}).from_config(scheduler.config)
    refused("scheduler is a Mine of your own", scheduler=mine)
    changed = copy.deepcopy(scheduler)
    changed.alphas_cumprod[3] = 0.5
    refused("scheduler is a DDIMScheduler whose alphas_cumprod were changed", scheduler=changed)
    assert not (tmp_path / "b").exists()
    base.save(tmp_path / "b")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pictures_come_back_pixel_for_pixel(mode, tmp_path):
    from fisedit.packing import Packer, Unpacker
    from fisedit.sampling import same

    gray = picture().convert("I;16" if mode == "I;16" else "RGB")
    packer, image = Packer(), gray.convert(mode)
    packed = json.loads(json.dumps(packer.value({"a": (image, float("inf"), [-0.0])}, "image")))
    for name, write in packer.files().items():
        write(tmp_path / name)
    back = Unpacker(tmp_path, {}, lambda device: torch.device("cpu")).value(packed)
    assert same(back["a"][0], image) and type(back["a"][0]) is Image.Image and back["a"][1] == float("inf")
    assert not same(back["a"][0], Image.new(mode, image.size)) and str(back["a"][2]) == "[-0.0]"


def test_what_is_no_base_is_not_saved(editor, base, tmp_path):
    with pytest.raises(errors.NotRecordedError):
        base.edit(AFTER, mask=square(), record=False).save(tmp_path / "b")
    with pytest.raises(errors.UnknownOptionError, match="base="):
        editor.save("base", tmp_path / "b")
    released = editor.generate(BEFORE, seed=0, num_inference_steps=2)
    released.recording.release()
    with pytest.raises(errors.SessionClosedError):
        released.save(tmp_path / "b")
    with editor.pipe.unet.record() as recording, pytest.raises(errors.NestedSessionError):
        recording.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


# Loading what was damaged.


FILES = ("call-0000.safetensors", "call-0002.safetensors", "values.safetensors", "picture-0.png", "manifest.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_a_flipped_byte_in_any_file_is_named(editor, damaged, file, place):
    flip(damaged / file, int(place * (damaged / file).stat().st_size))
    with pytest.raises(errors.CacheReadError, match=file):
        editor.load(damaged)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("file", FILES[:-1])
def test_a_file_that_is_missing_or_cut_short_is_named(editor, damaged, file, verify):
    os.truncate(damaged / file, (damaged / file).stat().st_size - 1)
    with pytest.raises(errors.CacheReadError, match=rf"{file}.*bytes, and was saved with"):
        editor.load(damaged, verify=verify)
    (damaged / file).unlink()
    with pytest.raises(errors.CacheReadError, match=rf"{file}.*it is missing"):
        editor.load(damaged, verify=verify)


def test_every_byte_of_a_manifest_counts(damaged):
    path = damaged / "manifest.json"
    data = path.read_bytes()
    for place in range(0, len(data), 29):
        for bit in (1, 32):
            changed = bytearray(data)
            changed[place] ^= bit
            path.write_bytes(changed)
            with pytest.raises((errors.CacheReadError, errors.SavedFormatError)):
                manifest.read_folder(damaged)


def test_without_verification_contents_are_not_read(editor, damaged, monkeypatch):
    monkeypatch.setattr(disk, "checksum_of", None)
    flip(damaged / "call-0001.safetensors", -1)
    editor.load(damaged, verify=False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no JSON"),
        ('{"format": 1', "no JSON"),
        ("\xff\xfe", "no JSON"),
        ("[]", "no number of a format"),
        ('{"format": true}', "no number of a format"),
        ('{"format": 0}', "no number of a format"),
        ('{"format": 1}', "its checksum is"),
        ('{"format": 1, "checksum": 7}', "its checksum is"),
    ],
)
def test_a_manifest_that_is_none_is_named(editor, damaged, text, says):
    (damaged / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(errors.CacheReadError, match=rf"manifest\.json' cannot be used: .*{says}"):
        editor.load(damaged)


def test_a_newer_format_is_named_with_who_wrote_it(editor, damaged):
    reseal(damaged, lambda content: content.update(format=2, versions={"fisedit": "9.1"}))
    with pytest.raises(errors.SavedFormatError, match=r"written by FISEdit 9\.1 in format 2; .* reads format 1"):
        editor.load(damaged)
    (damaged / "manifest.json").write_text('{"format": 3, "checksum": "whatever that is then"}')
    with pytest.raises(errors.SavedFormatError, match="another version of FISEdit in format 3"):
        editor.load(damaged)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("files"), "does not list its files"),
        (lambda c: c["files"].update({"../../x.safetensors": c["files"]["values.safetensors"]}), "no save writes"),
        (lambda c: c["files"].update({"/etc/passwd": {"size": 1, "checksum": ""}}), "no save writes"),
        (lambda c: c.pop("model"), "KeyError: 'model'"),
        (lambda c: c.pop("recording"), "KeyError: 'recording'"),
        (lambda c: c["recording"]["calls"][0].update(sample="none"), "KeyError: 'none'"),
        (lambda c: c["recording"]["calls"][0].update(signature=9), "IndexError"),
        (lambda c: c["recording"]["calls"][0].update(kinds=9), "IndexError"),
        (lambda c: c["recording"]["kinds"][0].update(more={}), "'more' is no kind"),
        (lambda c: c["recording"]["kinds"][0]["maps"].update(none="float32"), "KeyError: 'none'"),
        (lambda c: c["recording"]["signatures"][0]["tensors"][0].__setitem__(2, "load"), "'load' is no dtype"),
        (lambda c: c["generation"]["run"]["scheduler"].update({"class": "DiffusionPipeline"}), "is no scheduler"),
        (lambda c: c["generation"]["run"]["scheduler"].update({"class": "Mine"}), "'Mine' is no scheduler"),
        (lambda c: c["generation"]["run"]["settings"].update(eta={"code": "1"}), "'code' is nothing"),
        (lambda c: c["generation"].update(images=[{"picture": "../picture-0.png"}]), "no save writes"),
        (lambda c: c["generation"].update(images=[{"picture": "values.safetensors"}]), "no picture"),
    ],
)
def test_a_manifest_that_is_whole_but_makes_no_sense_is_named(editor, damaged, change, says):
    reseal(damaged, change)
    with pytest.raises(errors.CacheReadError, match=says):
        editor.load(damaged)


def on_a_gpu(content):
    """As if a model on a GPU had been saved."""
    content["recording"]["device"] = "cuda:0"
    for signature in content["recording"]["signatures"]:
        for tensor in signature["tensors"]:
            tensor[3] = "cuda:0"


def test_what_a_gpu_recorded_is_loaded_elsewhere(editor, base, damaged):
    """The calls are then made on the device of the model; its noise is drawn there only if it was drawn on a CPU."""
    reseal(damaged, on_a_gpu)
    assert_edits_alike(base, editor.load(damaged))
    reseal(damaged, lambda content: content["generation"]["run"].update(device="cuda:0"))
    with pytest.raises(errors.SavedBaseMismatchError, match="device of the generator: saved with 'cuda:0', here"):
        editor.load(damaged)


def test_a_folder_that_holds_nothing_saved_is_named(editor, saved, tmp_path):
    reasons = {tmp_path / "none": "no such folder", tmp_path: "no manifest", saved / FILES[0]: "it is a file"}
    for folder, reason in reasons.items():
        with pytest.raises(errors.SavedBaseNotFoundError, match=rf"{folder}.*{reason}"):
            editor.load(folder)
