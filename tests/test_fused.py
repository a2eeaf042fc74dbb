"""The fused edit graph against the dense model: interpreted without a GPU, in CUDA graphs with one."""

from __future__ import annotations

import os
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from harness import Harness, masks, relative_error  # noqa: E402
from models import arguments, one_level  # noqa: E402

from fisedit.runtime.cost_model import CostModel  # noqa: E402
from fisedit.runtime.executor import Memo  # noqa: E402
from fisedit.runtime.plan import MaskPlan  # noqa: E402


def to_device(call: dict[str, Any]) -> dict[str, Any]:
    return torch.utils._pytree.tree_map(lambda v: v.to(DEVICE) if isinstance(v, torch.Tensor) else v, call)


def run(harness: Harness, mask: torch.Tensor) -> torch.Tensor:
    call = harness.call
    replay = harness.program.replays().take(mask.expand(call.batch, -1, -1), call.batch, call.device)
    cache = harness.poisoned(MaskPlan(mask, CostModel()))
    outputs, _ = replay.run(call.tensors, cache, Memo())
    return outputs[0]


def test_the_fused_graph_equals_the_dense_model() -> None:
    model = one_level().to(DEVICE)
    harness = Harness(model, to_device(arguments(model, (8, 12))), provider="triton")
    for name in ("blob", "corners"):
        mask = masks(tuple(harness.recorded.shape[-2:]))[name].to(DEVICE)
        out = run(harness, mask)
        assert relative_error(out, harness.dense) < 1e-5
        assert torch.equal(out[..., ~mask], harness.recorded[..., ~mask])
