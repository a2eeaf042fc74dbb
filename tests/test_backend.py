"""``torch.compile(unet, backend="fisedit")`` against the untouched model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import fisedit
from fisedit.errors import ForeignRecordingError, UnknownOptionError, UnsupportedCaptureError

TIMESTEPS = [torch.tensor(t) for t in (900, 500, 100)]
SIZE = (8, 8)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def corner() -> Tensor:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[:3, :4] = True
    return mask


def run(unet: Any, timesteps: Any = TIMESTEPS, seed: int = 1, change: float = 0.0, batch: int = 2) -> list[Tensor]:
    """A toy sampler; ``change`` is added to a corner of the latents and to the last words."""
    call = models.arguments(models.one_level(), SIZE, seed=seed)
    sample, text = call["sample"][:1].repeat(batch, 1, 1, 1), call["encoder_hidden_states"][:1].repeat(batch, 1, 1)
    text[:, 4:] += change
    outputs = []
    for timestep in timesteps:
        with torch.no_grad():
            out = unet(sample, timestep, text, return_dict=False)[0]
        outputs.append(out)
        sample = sample - 0.1 * out
        sample[..., :3, :4] += change
    return outputs


@pytest.mark.supports("Features", 'torch.compile(unet, backend="fisedit")')
def test_recording_and_editing_through_dynamo(tmp_path: Path) -> None:
    """As the same model gives it that fisedit.compile compiled, in every mode."""
    model = models.one_level()
    dynamo, ours = torch.compile(model, backend="fisedit", fullgraph=True), fisedit.compile(model)
    dense = run(model)
    for out, wanted in zip(run(dynamo), dense, strict=True):
        assert torch.equal(out, wanted)
    with fisedit.record(dynamo) as base:
        recorded = run(dynamo)
    with fisedit.record(ours) as reference:
        run(ours)
    for out, wanted in zip(recorded, dense, strict=True):
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    assert base.timesteps == [900.0, 500.0, 100.0] and base.nbytes == reference.nbytes
    for mask in (corner(), None):
        with fisedit.edit(dynamo, base, mask) as edit:
            edited = run(dynamo, change=0.5)
        with fisedit.edit(ours, reference, mask) as wanted_edit:
            wanted_outputs = run(ours, change=0.5)
        assert edit.mask is not None and wanted_edit.mask is not None and torch.equal(edit.mask, wanted_edit.mask)
        assert {kind: len(times) for kind, times in edit.timings.items()} == {
            kind: len(times) for kind, times in wanted_edit.timings.items()
        }
        for out, wanted in zip(edited, wanted_outputs, strict=True):
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    base.save(tmp_path / "r")
    with fisedit.edit(dynamo, fisedit.load_recording(dynamo, tmp_path / "r")):
        again = run(dynamo, change=0.5)
    assert all(torch.equal(out, wanted) for out, wanted in zip(again, edited, strict=True))
    for out, wanted in zip(run(dynamo), dense, strict=True):
        assert torch.equal(out, wanted)


def test_another_batch_size_and_an_original_style_model() -> None:
    """Dynamo traces again with symbolic sizes; names and layouts of arguments are the model's own."""
    model = models.OpenAIStyleUNet().eval()

    def adapted(unet: Any) -> Any:
        return lambda sample, timestep, text, return_dict: [unet(sample, timestep.expand(len(sample)), text)]

    dynamo = torch.compile(model, backend="fisedit", fullgraph=True)
    for batch in (2, 3):
        dense = run(adapted(model), batch=batch)
        with fisedit.record(dynamo) as base:
            recorded = run(adapted(dynamo), batch=batch)
        with fisedit.edit(dynamo, base, corner()):
            same = run(adapted(dynamo), batch=batch)
        for out, again, wanted in zip(recorded, same, dense, strict=True):
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
def test_two_models_of_one_code() -> None:
    """Dynamo shares the graph of two modules of one class; sessions and weights are each one's own."""
    models_ = [models.one_level(), models.one_level(seed=7)]
    dynamo = [torch.compile(model, backend="fisedit") for model in models_]
    with fisedit.record(dynamo[0]) as first, fisedit.record(dynamo[1]) as second:
        for model, compiled in zip(models_, dynamo, strict=True):
            for out, wanted in zip(run(compiled), run(model), strict=True):
                torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    assert len(first.calls) == len(second.calls) == 3
    with pytest.raises(ForeignRecordingError), fisedit.edit(dynamo[1], first):
        pass


class Broken(nn.Module):
    """A forward that Dynamo cannot trace in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, return_dict: bool) -> list[Tensor]:
        hidden = self.first(sample) + timestep / 1000
        torch._dynamo.graph_break()
        return [self.last(hidden)]


def test_a_graph_in_two_pieces_is_refused() -> None:
    model = Broken().eval()
    dynamo = torch.compile(model, backend="fisedit")
    assert torch.equal(run(dynamo)[0], run(model)[0])
    with pytest.raises(UnsupportedCaptureError, match="fullgraph=True"), fisedit.record(dynamo):
        run(dynamo)


def test_mistakes_are_named() -> None:
    with pytest.raises(UnknownOptionError, match="fisedit.compile or torch.compile"):
        fisedit.record(models.one_level())
    model = torch.compile(models.one_level(), backend="fisedit", options={"kv": "active"})
    with pytest.raises(Exception, match="the backend outside sessions"):
        run(model)
    dense = torch.compile(models.one_level(), backend="fisedit", options={"dense": "aot_eager"})
    for out, wanted in zip(run(dense), run(models.one_level()), strict=True):
        torch.testing.assert_close(out, wanted)
