"""Edits of edits: each is recorded as what it changed, over its base."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from toy_sampler import SIZE, corner, other_text, run

import fisedit
from fisedit import CompiledUNet, DetectConfig, Recording


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


def test_rounds(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    """An edit of an edit of an edit: each keeps the former outside its own mask, and costs memory by its mask."""
    former, masks_ = base, [corner(), corner().flip(0), corner().flip(1)]
    for round_, mask in enumerate(masks_):
        with unet.edit(former, mask, record=True) as edit:
            outputs = run(unet, other_text(call), change=0.1 * round_)
        assert edit.recording is not None and edit.recording.complete
        for out, made in zip(outputs, former.calls.values(), strict=True):
            assert torch.equal(out[..., ~mask], made.outputs[0][..., ~mask])
            assert not torch.equal(out[..., mask], made.outputs[0][..., mask])
        assert edit.recording.nbytes < base.nbytes / 2
        former = edit.recording


@pytest.mark.supports("Batches and rounds", "edits of edits, any number of rounds in bounded memory")
def test_a_long_chain_of_rounds_is_bounded(unet: CompiledUNet, call: dict[str, Any]) -> None:
    """Twelve rounds, the former ones dropped: right to the end, and never more memory than two recordings."""
    with unet.record() as former:
        run(unet, call, (900, 100))
    whole, held = former.nbytes, 0
    for number in range(12):
        mask = torch.zeros(SIZE, dtype=torch.bool)
        mask[number % 4 * 2 : number % 4 * 2 + 2, number % 3 : number % 3 + 4] = True
        with unet.edit(former, mask, record=True) as edit:
            outputs = run(unet, other_text(call), (900, 100))
        for out, made in zip(outputs, former.calls.values(), strict=True):
            assert torch.equal(out[..., ~mask], made.outputs[0][..., ~mask])
        assert edit.recording is not None
        former, held = edit.recording, 0
        for made in former.calls.values():
            step: Any = made.cache
            while step is not None:
                held, step = held + step.nbytes, step.base
        assert held <= 2 * whole
    with torch.no_grad():
        dense = run(unet, other_text(call), (900, 100))
    with unet.edit(former, ~corner()):
        for out, wanted in zip(run(unet, other_text(call), (900, 100)), dense, strict=True):
            assert out.isfinite().all() and (out - wanted).abs().mean() < 0.5 * wanted.abs().mean()


def test_a_recorded_edit_holds_what_was_computed(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    """Editing the recording of an edit with the same words and latents gives the edit again."""
    changed = other_text(call)
    with unet.edit(base, corner(), record=True) as edit:
        first = run(unet, changed, change=0.1)
    assert edit.recording is not None
    larger = torch.zeros(SIZE, dtype=torch.bool)
    larger[:2, :2] = True
    with unet.edit(edit.recording, larger):
        again = run(unet, changed, change=0.1)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_detected_edits_can_be_edited(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    detect = DetectConfig(steps=2, window=(1, 2), dilation=0, smooth=0)
    with unet.edit(base, record=True, detect=detect) as edit:
        outputs = run(unet, other_text(call), change=0.8)
    assert edit.recording is not None and edit.mask is not None and 0 < edit.mask.sum() < 64
    for key, made in edit.recording.calls.items():
        assert torch.equal(made.outputs[0][..., ~edit.mask], base.calls[key].outputs[0][..., ~edit.mask])
        assert made.cache.base is base.calls[key].cache
    with unet.edit(edit.recording, corner().flip(0)):
        again = run(unet, other_text(call), change=0.8)
    outside = ~corner().flip(0)
    assert torch.equal(again[-1][..., outside], outputs[-1][..., outside])
