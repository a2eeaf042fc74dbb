"""Run the record, detect and edit graphs of a model directly, with caches that can be poisoned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisedit.api import build_program
from fisedit.capture import Call, bind_call
from fisedit.config import CompileConfig
from fisedit.program import Program
from fisedit.runtime.cache.store import StepCache
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.executor import Store
from fisedit.runtime.plan import MaskPlan


class Harness:
    """One captured model and one recorded call."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any], **options: Any) -> None:
        self.model = model
        self.call: Call = bind_call(model, (), arguments)
        self.program: Program = build_program(model, self.call, CompileConfig(**options))
        self.dense = self.run_dense(self.call)
        self.stored: dict[Store, Tensor] = {}
        outputs = self.program.executable("record").run(self.call.tensors, keep=self.stored.update)
        self.recorded: Tensor = outputs[0]
        self.cache = StepCache(
            len(self.call.tensors[self.call.sample]), {store.slot: value for store, value in self.stored.items()}
        )

    def run_dense(self, call: Call) -> Tensor:
        with torch.no_grad():
            out = self.model(**call.arguments(call.tensors))
        return out if isinstance(out, Tensor) else out[0]

    def poisoned(self, plan: MaskPlan) -> StepCache:
        """The cache with every active row NaN: a result that reads one is NaN."""
        values: dict[str, Any] = dict(self.cache.values)
        for store, value in self.stored.items():
            if store.rows is not None:
                assert isinstance(store.rows.of, tuple)
                active = plan.active(store.rows.of).flatten(1)[..., None]  # [M, R, 1]
                values[store.slot] = value.masked_fill(active, float("nan"))
        return StepCache(self.cache.batch, values)

    def edit(self, mask: Tensor, cost: Any = "halo", tensors: dict[str, Tensor] | None = None) -> Tensor:
        """The edit graph's output under ``mask`` (bool ``[H, W]`` or ``[B, H, W]``), active cache rows poisoned."""
        plan = MaskPlan(mask, CostModel(cost))
        inputs = tensors or self.call.tensors
        outputs = self.program.executable("edit").run(inputs, plan=plan, source=self.poisoned(plan))
        return outputs[0]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``max |value - reference| / max |reference|``."""
    return float((value - reference).abs().max() / reference.abs().max())


def masks(size: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Masks that find index errors: everything, a blob, ragged, single pixels, corners and borders."""
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    none = torch.zeros(size, dtype=torch.bool)

    def filled(*index: Any) -> Tensor:
        mask = none.clone()
        mask[index] = True
        return mask

    corners = none.clone()
    corners[[0, 0, -1, -1], [0, -1, 0, -1]] = True
    return {
        "all": ~none,
        "blob": filled(slice(height // 4, height // 2), slice(width // 3, width // 3 + 3)),
        "ragged": torch.rand(size, generator=generator) < 0.2,
        "pixel": filled(height // 2, width // 2 - 1),
        "last pixel": filled(-1, -1),
        "corners": corners,
        "top row": filled(0),
        "right column": filled(slice(None), -1),
        "all but one": ~filled(height // 2, width // 2),
    }
