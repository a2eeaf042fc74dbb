"""Stored rows of maps become views; what is stored, and what the graph gives, stays the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pass_harness import Toy, captured, inputs, ops
from torch import Tensor, nn
from torch.fx import GraphModule

from fisedit.passes import pipeline
from fisedit.passes.base import PassLog, run_passes
from fisedit.passes.insert_cache_loads import loaded_slots
from fisedit.passes.insert_cache_stores import insert_cache_stores
from fisedit.passes.lower import lower
from fisedit.passes.share_stored_maps import share_stored_maps
from fisedit.runtime.executor import Store


class Residual(Toy):
    """norm -> silu -> conv, and around it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(sample))
        return self.conv(x) + x


class Tokens(Toy):
    """Attention over positions: keys and values are tokens, which no convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.key = nn.Linear(8, 8)

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        b, c, h, w = sample.shape
        rows = sample.flatten(2).transpose(1, 2)
        query, key = (x.view(b, h * w, 2, c // 2).transpose(1, 2) for x in (rows, self.key(rows)))
        out = nn.functional.scaled_dot_product_attention(query, key, key)
        return out.transpose(1, 2).reshape(b, h * w, c)


def recorded(model: nn.Module) -> GraphModule:
    edit, _ = captured(model, *pipeline.edit_passes("cached"))
    gm, _ = captured(model)
    insert_cache_stores(gm, loaded_slots(edit.graph))
    return gm


def run(gm: GraphModule) -> tuple[Sequence[Tensor], dict[Store, Tensor]]:
    given = inputs()
    given["timestep"] = torch.full((2,), 3.0)
    stored: dict[Store, Tensor] = {}
    outputs = lower(gm).run(given, keep=stored.update)
    return outputs, stored


def test_stored_maps_are_views() -> None:
    gm = recorded(Residual().eval())
    outputs, stored = run(gm)
    log = PassLog("test")
    run_passes(gm, [share_stored_maps, share_stored_maps], log)
    assert [record.result.matched for record in log.records] == [
        2,
        0,
    ]  # what the convolution reads, and what is left of the result
    again, shared = run(gm)
    for mine, theirs in zip([*again, *shared.values()], [*outputs, *stored.values()], strict=True):
        torch.testing.assert_close(mine, theirs)
    rows = [value for store, value in shared.items() if store.slot.startswith("rows:")]
    assert len(rows) == 2 and all(value.is_contiguous() and value._base is not None for value in rows)
    assert all(value._base is None for store, value in stored.items() if store.slot.startswith("rows:"))


def test_tokens_are_no_maps() -> None:
    gm = recorded(Tokens().eval())
    before = ops(gm)
    assert any(store.slot.startswith("rows:") for store in run(gm)[1])
    assert share_stored_maps(gm).matched == 0 and ops(gm) == before
