"""What the tests of fusion passes share: fused graphs, how far they are from their models, and a model to fill in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pass_harness import SIZE, Toy, captured, inputs
from torch import Tensor, nn
from torch.fx import GraphModule

from fisedit.capture import bind_call
from fisedit.passes import pipeline
from fisedit.passes.base import PassResult
from fisedit.passes.insert_cache_loads import loaded_slots
from fisedit.passes.insert_cache_stores import insert_cache_stores
from fisedit.passes.lower import lower
from fisedit.runtime.cache.store import StepCache
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.cuda_graph import table_keys
from fisedit.runtime.executor import Store
from fisedit.runtime.plan import MaskPlan
from fisedit.runtime.row_plan import LevelMasks, RowPlan


def fused(model: nn.Module, kv: str = "cached") -> tuple[GraphModule, dict[str, PassResult]]:
    gm, log = captured(model, *pipeline.edit_passes(kv, fuse=True))
    return gm, {record.name: record.result for record in log.records}


def error(model: nn.Module, gm: GraphModule) -> float:
    """Max error on the active rows of a fused graph, by reference kernels, active rows of the cache NaN."""
    dense, _ = captured(model)
    insert_cache_stores(dense, loaded_slots(gm.graph))
    call = bind_call(model, (), inputs())
    stored: dict[Store, Tensor] = {}
    lower(dense).run(call.tensors, keep=stored.update)
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[1:4, 2:5] = mask[-1, 0] = mask[0, -2:] = True  # 12 rows: a bucket without padding
    values = {}
    for store, value in stored.items():
        index = MaskPlan(mask, CostModel()).table(store.rows) if store.rows else None
        values[store.slot] = value if index is None else value.index_fill(1, index[0], float("nan"))
    executable = lower(gm)
    masks = LevelMasks(mask[None], {level for key in table_keys(executable) for level in key.levels})
    plan = RowPlan(table_keys(executable), masks.buckets, call.batch, call.device)
    plan.write(masks)
    (out,) = executable.run(call.tensors, plan=plan, source=StepCache(call.batch, values))
    with torch.no_grad():
        wanted = model(**call.arguments(call.tensors))
    return float((out - wanted)[..., mask].abs().max())


class Block(Toy):
    """Tokens in and out; subclasses say what is done to them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        tokens = self.first(sample).flatten(2).transpose(1, 2)
        return self.tokens(tokens, sample, text).transpose(1, 2).reshape(sample.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        split = [x.unflatten(2, (2, -1)).transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*split, mask).transpose(1, 2).flatten(2)
