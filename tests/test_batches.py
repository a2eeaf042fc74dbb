"""Several edits in one call: each equals the same edit alone, whatever the others do."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from harness import Harness, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fisedit
from fisedit import CompiledUNet, DetectConfig, Recording
from fisedit.errors import RecordingMismatchError, UnknownOptionError
from fisedit.runtime.cost_model import COSTS
from fisedit.warnings import EmptyMaskWarning

SIZE = (9, 7)
TIMESTEPS = (900, 500, 100)


def blob(*index: Any) -> Tensor:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[index] = True
    return mask


MASKS = {
    "corner": blob(slice(0, 3), slice(0, 4)),
    "pixel": blob(5, 5),
    "bottom": blob(slice(6, None)),
    "empty": blob(slice(0, 0)),
    "all": ~blob(slice(0, 0)),
    "ragged": torch.rand(SIZE, generator=torch.Generator().manual_seed(3)) < 0.3,
}


@pytest.fixture(scope="module")
def unet() -> CompiledUNet:
    return fisedit.compile(models.one_level())


@pytest.mark.supports("Batches and rounds", "a mask for each sample of a call")
@pytest.mark.parametrize("kv", ["cached", "active"])
@pytest.mark.parametrize("build", [models.sd1, models.OpenAIStyleUNet])
def test_masks_of_samples_do_not_touch(build: Any, kv: str) -> None:
    """Each sample under its own mask, rows padded to the largest, caches poisoned: as it is under its mask alone."""
    model = build().eval()
    if build is models.OpenAIStyleUNet:
        noise = models.arguments(models.one_level(), (8, 8), batch=3)
        arguments = {
            "x": noise["sample"],
            "timesteps": torch.full((3,), 500),
            "context": noise["encoder_hidden_states"],
        }
        size = (8, 8)
    else:
        arguments, size = models.arguments(model, (16, 16), batch=3), (16, 16)
    harness = Harness(model, arguments, kv=kv)
    masks = torch.zeros(3, *size, dtype=torch.bool)
    masks[0, 1:4, 2:7], masks[1, -1, -1], masks[2] = True, True, True
    for cost in COSTS:
        together = harness.edit(masks, cost)
        for sample in range(3):
            alone = harness.edit(masks[sample], cost)
            inside = masks[sample]
            assert relative_error(together[sample][:, inside], alone[sample][:, inside]) < 1e-5
    # An all-active sample is the dense model, though its neighbors are not.
    assert relative_error(together[2], harness.dense[2]) < (1e-5 if kv == "cached" else 2e-5)


@settings(max_examples=25)
@given(seed=st.integers(0, 999), cost=st.sampled_from(COSTS))
def test_any_masks(seed: int, cost: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(3, 1, 1, generator=generator) ** 2
    masks = torch.rand(3, *SIZE, generator=generator) < shares
    masks[seed % 3, 0, 0] = True
    harness = _harness()
    together = harness.edit(masks, cost)
    for sample in range(3):
        if masks[sample].any():
            alone = harness.edit(masks[sample], cost)
            assert relative_error(together[sample][:, masks[sample]], alone[sample][:, masks[sample]]) < 1e-4
        assert torch.equal(together[sample][:, ~masks[sample]], harness.recorded[sample][:, ~masks[sample]])


_KEPT: list[Harness] = []


def _harness() -> Harness:
    if not _KEPT:
        model = models.one_level()
        _KEPT.append(Harness(model, models.arguments(model, SIZE, batch=3)))
    return _KEPT[0]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(unet: Any, latents: Tensor, text: Tensor, on_step_end: Any = None) -> Tensor:
    """A sampler with guidance in one call over latents ``[N, 4, H, W]``; ``text`` is ``[2N, 7, 32]``."""
    for step, timestep in enumerate(TIMESTEPS):
        empty, worded = unet(torch.cat([latents] * 2), timestep, text, return_dict=False)[0].chunk(2)
        latents = latents - 0.2 * (empty + 2 * (worded - empty))
        if on_step_end is not None:
            latents = on_step_end(None, step, timestep, {"latents": latents})["latents"]
    return latents


def words(seed: int) -> tuple[Tensor, Tensor]:
    """The empty prompt's embedding, and another whose last tokens depend on the seed: ``[1, 7, 32]`` each."""
    empty, prompt = noise(50, 1, 7, models.TEXT), noise(51, 1, 7, models.TEXT)
    prompt[:, 4:] += 3 * noise(100 + seed, 1, 3, models.TEXT)
    return empty, prompt


def record(unet: CompiledUNet, seed: int) -> Recording:
    with unet.record() as base:
        sample(unet, noise(seed, 1, 4, *SIZE), torch.cat(words(0)), base.on_step_end)
    return base


@pytest.fixture(scope="module")
def bases(unet: CompiledUNet) -> list[Recording]:
    return [record(unet, 1), record(unet, 2)]


def alone(unet: CompiledUNet, base: Recording, seed: int, edited: int, mask: Tensor | None, **options: Any) -> Any:
    with unet.edit(base, mask, **options) as edit:
        out = sample(unet, noise(seed, 1, 4, *SIZE), torch.cat(words(edited)), edit.on_step_end)
    return out, edit


def together(unet: CompiledUNet, requests: list[Any], **options: Any) -> Any:
    """Requests (base, seed of its noise, words, mask), all in every call."""
    latents = torch.cat([noise(seed, 1, 4, *SIZE) for _, seed, _, _ in requests])
    texts = [words(edited) for _, _, edited, _ in requests]
    text = torch.cat([empty for empty, _ in texts] + [prompt for _, prompt in texts])
    with unet.edit([r[0] for r in requests], [r[3] for r in requests], **options) as edits:
        out = sample(unet, latents, text, edits.on_step_end)
    return out, edits


@pytest.mark.supports("Batches and rounds", "one base, many edits in one call")
@pytest.mark.supports("Batches and rounds", "several bases, several edits in one call")
@pytest.mark.parametrize("same_base", [True, False])
def test_edits_at_once_equal_edits_one_by_one(unet: CompiledUNet, bases: list[Recording], same_base: bool) -> None:
    names = ["corner", "pixel", "ragged", "empty", "all"]
    requests = []
    for number, name in enumerate(names):
        which = 0 if same_base else number % 2
        requests.append((bases[which], which + 1, number + 1, MASKS[name]))
    with pytest.warns(EmptyMaskWarning):
        out, edits = together(unet, requests)
        singles = [alone(unet, *request) for request in requests]
    for number, (single, edit) in enumerate(singles):
        torch.testing.assert_close(out[number : number + 1], single, rtol=1e-4, atol=1e-4)
        assert edits[number].mask is not None and torch.equal(edits[number].mask, edit.mask)
        mask, latents = requests[number][3], requests[number][0].latents[-1]
        assert torch.equal(out[number][:, ~mask], latents[0][:, ~mask])
        a, b = edits[number].report(), edit.report()
        assert (a.macs_sparse, a.macs_dense, a.active_share, a.levels) == (
            b.macs_sparse, b.macs_dense, b.active_share, b.levels,
        )  # fmt: skip


@pytest.mark.supports("Batches and rounds", "masks found for each of several edits at once")
def test_masks_are_found_for_each_edit(unet: CompiledUNet, bases: list[Recording]) -> None:
    """Detection with control at once finds what it finds one by one; an edit with a given mask runs beside."""
    detect = DetectConfig(steps=2, dilation=0)
    requests = [(bases[0], 1, 1, None), (bases[1], 2, 2, None), (bases[1], 2, 3, MASKS["corner"])]
    out, edits = together(unet, requests, detect=detect)
    for number, request in enumerate(requests):
        single, edit = alone(unet, *request, detect=detect)
        assert torch.equal(edits[number].mask, edit.mask) and edit.mask.any()
        torch.testing.assert_close(out[number : number + 1], single, rtol=1e-4, atol=1e-4)
        assert [len(edits[number].timings[k]) for k in ("detect", "sparse")] == ([0, 3] if number == 2 else [2, 1])
    assert not torch.equal(edits[0].mask, edits[1].mask)


@pytest.mark.supports("Batches and rounds", "edits of edits, recorded at once")
def test_recorded_together_edited_apart(unet: CompiledUNet, bases: list[Recording]) -> None:
    """What a common run recorded of each edit is what it records alone: a next round gives the same."""
    detect = DetectConfig(steps=1, dilation=0)
    requests = [(bases[0], 1, 1, MASKS["corner"]), (bases[1], 2, 2, MASKS["bottom"]), (bases[0], 1, 3, None),
                (bases[1], 2, 4, MASKS["all"])]  # fmt: skip
    _, edits = together(unet, requests, detect=detect, record=True)
    for number, (base, seed, edited, mask) in enumerate(requests):
        _, edit = alone(unet, base, seed, edited, mask, detect=detect, record=True)
        assert edits[number].recording.complete
        assert edits[number].recording.nbytes <= 1.01 * edit.recording.nbytes
        again = [alone(unet, e.recording, seed, 9, MASKS["ragged"])[0] for e in (edits[number], edit)]
        torch.testing.assert_close(again[0], again[1], rtol=1e-4, atol=1e-4)
    next_round = [(edits[i].recording, requests[i][1], 9, MASKS["ragged"]) for i in range(4)]
    out, _ = together(unet, next_round)
    for number, request in enumerate(next_round):
        torch.testing.assert_close(out[number : number + 1], alone(unet, *request)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.supports("Batches and rounds", "several images of one run, edited each under its own mask")
def test_images_of_one_run_have_masks_of_their_own(unet: CompiledUNet) -> None:
    latents, text = noise(7, 2, 4, *SIZE), torch.cat([t.repeat(2, 1, 1) for t in words(0)])
    changed = text.clone()
    changed[3] = words(5)[1]  # the second image's words only
    with unet.record() as base:
        recorded = sample(unet, latents, text, base.on_step_end)
    assert base.images == 2
    with unet.edit(base, detect=DetectConfig(steps=1, dilation=0)) as edit:
        out = sample(unet, latents, changed, edit.on_step_end)
    assert edit.masks.shape == (2, *SIZE) and not edit.masks[0].any() and edit.masks[1].any()
    assert torch.equal(out[0], recorded[0]) and not torch.equal(out[1], recorded[1])
    parts = base.split()
    assert [part.images for part in parts] == [1, 1] and sum(p.nbytes for p in parts) == base.nbytes
    with unet.edit(parts[1], edit.masks[1]) as single:
        apart = sample(unet, latents[1:], changed[[1, 3]], single.on_step_end)
    with unet.edit(base, edit.masks[1]) as both:
        union = sample(unet, latents, changed, both.on_step_end)
    torch.testing.assert_close(apart[0], union[1], rtol=1e-4, atol=1e-4)


def test_calls_that_do_not_fit_are_named(unet: CompiledUNet, bases: list[Recording]) -> None:
    with (
        pytest.raises(RecordingMismatchError, match=r"sample shape: recorded \(4, 4, 9, 7\), edited with \(2"),
        unet.edit(bases, [MASKS["corner"]] * 2),
    ):
        sample(unet, noise(1, 1, 4, *SIZE), torch.cat(words(1)))
    with pytest.raises(RecordingMismatchError, match="noise"), unet.edit(bases, [MASKS["corner"]] * 2):
        sample(unet, noise(1, 2, 4, *SIZE), torch.cat([words(1)[0]] * 4))
    with pytest.raises(UnknownOptionError, match="a list of 2"), unet.edit(bases, MASKS["corner"]):
        pass
    with pytest.raises(UnknownOptionError, match="base=None"), unet.edit([bases[0], None]):
        pass
    single = DetectConfig(steps=1)
    with pytest.raises(RecordingMismatchError, match="latents"), unet.edit(bases[0], detect=single) as edit:
        edit.on_step_end(None, 0, 900, {"latents": noise(1, 2, 4, *SIZE)})
