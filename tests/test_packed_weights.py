"""Packed weights are made once, and again when what they are made of changes."""

from __future__ import annotations

import gc

import torch
from torch import nn
from torch.fx import symbolic_trace

from fisedit.runtime.packed_weights import Made, pack_weights


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        joined = torch.cat([self.a.weight, self.b.weight])
        return joined, torch.clone(torch.t(joined))


def test_two_graphs_share_what_they_make_alike() -> None:
    model, store = Model(), Made()
    first, second = (pack_weights(symbolic_trace(model), store) for _ in range(2))
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert torch.equal(first[0], torch.cat([model.a.weight, model.b.weight]))
    other = pack_weights(symbolic_trace(Model()), store)
    assert other[0] is not first[0]


def test_changed_weights_are_packed_anew() -> None:
    model, store = Model(), Made()
    before = pack_weights(symbolic_trace(model), store)[0]
    with torch.no_grad():
        model.b.weight.mul_(2)
    after = pack_weights(symbolic_trace(model), store)[0]
    assert torch.equal(after, torch.cat([model.a.weight, model.b.weight])) and not torch.equal(after, before)


def test_nothing_is_kept_that_no_graph_uses() -> None:
    store = Made()
    made = pack_weights(symbolic_trace(Model()), store)
    assert len(store) == len(made) == 2
    del made
    gc.collect()
    assert not store
