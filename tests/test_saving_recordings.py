"""Recordings in folders, for those who have no pipeline: any U-Net, any loop."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from toy_sampler import SIZE, corner, other_text, run

import fisedit
from fisedit import CompiledUNet, Recording, errors


@pytest.fixture(scope="module")
def unet() -> CompiledUNet:
    return fisedit.compile(models.one_level())


@pytest.fixture(scope="module")
def call(unet: CompiledUNet) -> dict[str, Any]:
    arguments = models.arguments(unet, SIZE)
    return {"sample": arguments["sample"], "encoder_hidden_states": arguments["encoder_hidden_states"]}


@pytest.fixture(scope="module")
def base(unet: CompiledUNet, call: dict[str, Any]) -> Recording:
    with unet.record() as recording:
        run(unet, call)
    return recording


def outputs(unet: CompiledUNet, call: dict[str, Any], base: Recording, mask: Any = None) -> list[torch.Tensor]:
    with unet.edit(base, mask):
        return run(unet, other_text(call), change=0.5)


def assert_alike(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.supports("Features", "bases and recordings in folders, edited by other processes bit for bit")
@pytest.mark.parametrize("mask", [None, corner()], ids=["found", "given"])
def test_a_loaded_recording_is_edited_as_before(
    unet: CompiledUNet, call: dict[str, Any], base: Recording, tmp_path: Path, mask: Any
) -> None:
    base.save(tmp_path / "r")
    loaded = unet.load_recording(str(tmp_path / "r"))
    assert loaded.timesteps == base.timesteps and loaded.latents == [] and loaded.nbytes == base.nbytes
    assert "5 steps" in repr(loaded) and [c.seconds for c in loaded.calls.values()] > [0] * 5
    assert_alike(outputs(unet, call, loaded, mask), outputs(unet, call, base, mask))


def test_a_recorded_edit_is_written_whole(
    unet: CompiledUNet, call: dict[str, Any], base: Recording, tmp_path: Path
) -> None:
    with unet.edit(base, corner(), record=True) as edit:
        run(unet, other_text(call), change=0.5)
    assert edit.recording is not None
    edit.recording.save(tmp_path / "r")
    loaded = unet.load_recording(tmp_path / "r", verify=False)
    assert edit.recording.nbytes < base.nbytes / 2 and loaded.nbytes == base.nbytes
    mask = corner().flip(0)
    assert_alike(outputs(unet, call, loaded, mask), outputs(unet, call, edit.recording, mask))


def test_a_loaded_recording_is_one_of_several_bases(
    unet: CompiledUNet, call: dict[str, Any], base: Recording, tmp_path: Path
) -> None:
    """Its calls carry other numbers of samples than the recorded ones did."""
    base.save(tmp_path / "r")
    loaded = unet.load_recording(tmp_path / "r")
    double = {name: torch.cat([value, value]) for name, value in other_text(call).items()}
    results = []
    for bases in ([base, base], [loaded, base]):
        with unet.edit(bases, [corner(), corner().flip(0)]):
            results.append(run(unet, double, change=0.5))
    assert_alike(*results)


def test_another_owner_is_refused(unet: CompiledUNet, base: Recording, tmp_path: Path) -> None:
    base.save(tmp_path / "r")
    torch.manual_seed(99)
    with pytest.raises(errors.SavedBaseMismatchError, match="weights"):
        other = models.one_level()
        for parameter in other.parameters():
            parameter.data += 1
        fisedit.compile(other).load_recording(tmp_path / "r")
    with pytest.raises(errors.SavedBaseMismatchError, match="class"):
        fisedit.compile(torch.nn.Linear(2, 2)).load_recording(tmp_path / "r")


def test_it_is_saved_by_the_model_that_made_it_as_it_was(call: dict[str, Any], tmp_path: Path) -> None:
    unet = fisedit.compile(models.one_level())
    with pytest.raises(errors.IncompleteRecordingError), unet.record() as recording:
        run(unet, call, (900, 100))
        raise errors.IncompleteRecordingError(missing=[], recorded="")
    with pytest.raises(errors.IncompleteRecordingError, match="did not finish"):
        recording.save(tmp_path / "r")
    with unet.record() as recording:
        run(unet, call, (900, 100))
    with torch.no_grad():
        next(unet.parameters()).add_(1)
    with pytest.raises(errors.ForeignRecordingError, match="changed since"):
        recording.save(tmp_path / "r")
    del unet
    gc.collect()
    with pytest.raises(errors.ModelGoneError, match="with 0"):
        recording.save(tmp_path / "r")
    assert not (tmp_path / "r").exists()
