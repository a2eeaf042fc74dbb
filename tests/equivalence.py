"""One check for all models: the record, detect and edit graphs give what the untouched model gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from harness import Harness, masks, relative_error
from torch import Tensor, nn

TOLERANCE = 1e-5
SOME_MASKS = ("ragged", "corners", "all but one")


def check_equivalence(
    model: nn.Module,
    arguments: dict[str, Any],
    *,
    names: Iterable[str] = SOME_MASKS,
    tolerance: float = TOLERANCE,
    **options: Any,
) -> Harness:
    """Compare every graph of ``model`` with its own forward.

    - record, and detect with its own prompt, are the dense model;
    - edit, recorded on the same inputs, its active cache rows NaN, is dense on the mask and recorded outside it;
    - edit with everything active is the dense model of *other* inputs: nothing recorded is left in it.
    """
    harness = Harness(model, arguments, **options)
    assert relative_error(harness.recorded, harness.dense) <= tolerance
    assert relative_error(_detected(harness), harness.dense) <= tolerance
    size = (int(harness.dense.shape[-2]), int(harness.dense.shape[-1]))
    for name in names:
        mask = masks(size)[name]
        out = harness.edit(mask)
        assert relative_error(out[..., mask], harness.dense[..., mask]) <= tolerance, name
        assert torch.equal(out[..., ~mask], harness.recorded[..., ~mask]), name
    tensors = other_inputs(harness.call.tensors, harness.call.timestep)
    everything = harness.edit(torch.ones(size, dtype=torch.bool), tensors=tensors)
    wanted = harness.run_dense(replace(harness.call, tensors=tensors))
    assert relative_error(everything, wanted) <= tolerance
    assert relative_error(harness.recorded, wanted) > 0.01  # the other inputs do tell
    return harness


def other_inputs(tensors: dict[str, Tensor], timestep: str) -> dict[str, Tensor]:
    """The same call with other values in every float input but the timestep."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: value + 0.5 * torch.randn(value.shape, generator=generator).to(value)
        if value.is_floating_point() and name != timestep
        else value
        for name, value in tensors.items()
    }


def _detected(harness: Harness) -> Tensor:
    """The detect graph under a control that keeps every word."""
    text = harness.call.tensors.get(harness.call.text) if harness.call.text else None
    controls = {}
    if text is not None:
        batch, length = text.shape[:2]
        controls = {"control_index": torch.arange(length).expand(batch, length)}
        controls["control_weight"] = torch.ones(batch, length)
    inputs = {**harness.call.tensors, **controls}
    return harness.program.executable("detect").run(inputs, source=harness.cache)[0]
