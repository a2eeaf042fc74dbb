"""Put one pass at a time on the graph of a small module, and run what comes out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fisedit.capture import bind_call, capture
from fisedit.passes import ir, pipeline
from fisedit.passes.base import GraphPass, PassLog, PassResult, run_passes
from fisedit.passes.eliminate_repacking import eliminate_repacking
from fisedit.passes.insert_cache_loads import insert_cache_loads, loaded_slots
from fisedit.passes.insert_cache_stores import insert_cache_stores
from fisedit.passes.lower import lower
from fisedit.runtime.cache.store import StepCache
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.executor import Store
from fisedit.runtime.plan import MaskPlan

SIZE = (6, 8)


class Toy(nn.Module):
    """A module that takes what a U-Net takes: ``forward(sample, timestep, text)``; subclasses say ``body``."""

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.body(sample, timestep, text)


def inputs(channels: int = 8, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(batch, channels, *SIZE, generator=generator),
        "timestep": torch.tensor(3.0),
        "text": torch.randn(batch, 5, channels, generator=generator),
    }


def captured(model: nn.Module, *passes: GraphPass, **kwargs: int) -> tuple[GraphModule, PassLog]:
    """The graph of ``model`` after ``passes``, each node knowing its origin."""
    gm = capture(model.eval(), bind_call(model, (), inputs(**kwargs))).module
    log = PassLog("test")
    run_passes(gm, pipeline.canonical_passes(), log)
    gm = GraphModule(gm, ir.copy_graph(gm.graph))
    run_passes(gm, list(passes), log)
    return gm, log


def apply(model: nn.Module, graph_pass: GraphPass, **kwargs: int) -> tuple[GraphModule, PassResult]:
    gm, log = captured(model, graph_pass, **kwargs)
    return gm, log.records[-1].result


def ops(gm: GraphModule) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in gm.graph.nodes if node.op == "call_function"]


def error_on_active_rows(model: nn.Module, passes: Sequence[GraphPass], cost: str = "halo", batch: int = 2) -> float:
    """Max error on the active rows of a graph that only ``passes`` made sparse, active cache rows NaN."""
    model = model.eval()
    gm, _ = captured(model, *passes, eliminate_repacking, insert_cache_loads, batch=batch)
    dense, _ = captured(model, batch=batch)
    insert_cache_stores(dense, loaded_slots(gm.graph))
    call = bind_call(model, (), inputs(batch=batch))
    stored: dict[Store, Tensor] = {}
    lower(dense).run(call.tensors, keep=stored.update)
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[1:4, 2:5] = mask[-1, 0] = mask[0, -1] = True
    plan = MaskPlan(mask, CostModel(cost))
    values = {}
    for store, value in stored.items():
        index = plan.table(store.rows) if store.rows else None
        values[store.slot] = value if index is None else value.index_fill(1, index[0], float("nan"))
    (out,) = lower(gm).run(call.tensors, plan=plan, source=StepCache(batch, values))
    with torch.no_grad():
        wanted = model(**call.arguments(call.tensors))
    active = plan.active(tuple(out.shape[-2:]))[0]
    return float((out - wanted)[..., active].abs().max())
