"""Two linear layers with only a residual between them as one product: ``V(x + W h) = (VW) h + V x``.

So ends every transformer: its last feed-forward, and the projection out of it. The product of the weights is made once
for a model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit.passes.base import PassResult
from fisedit.passes.fuse_linear import CHUNK
from fisedit.passes.fused import get, is_bare, multiply, of_parameters, take_over, wide
from fisedit.passes.ir import Rows, args, aten, is_op, rows_of
from fisedit.passes.remove_identities import is_flat


def compose_linear(gm: GraphModule) -> PassResult:
    graph, matched = gm.graph, 0
    for node in list(graph.nodes):
        if not _is_linear(node) or (parts := _parts(node)) is None:
            continue
        with graph.inserting_before(node):
            take_over(graph, node, _composed(graph, node, *parts))
        matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched)


def _is_linear(node: Any) -> bool:
    """Whether a node is a linear layer of one source, its weights made of parameters alone, with nothing fused yet."""
    alone = is_bare(node) and get(node, "rows2") is None and get(node, "sources") is None
    return alone and of_parameters(node)


def _parts(outer: Node) -> tuple[Node, Node] | None:
    """The linear layer and the residual whose sum ``outer`` alone reads, if less or as much is to multiply as one."""
    total = get(outer, "rows")
    if not is_op(total, aten.add.Tensor) or total.kwargs or len(total.users) > 1:
        return None
    for inner, residual in (args(total), args(total)[::-1]):
        if not _is_linear(inner) or len(inner.users) > 1 or residual is inner:
            continue
        if rows_of(residual) != rows_of(inner) or not is_flat(residual):
            continue
        before, between, after = (_kind(node).channels for node in (get(inner, "rows"), inner, outer))
        if after <= between and before % CHUNK == between % CHUNK == 0:
            return inner, residual
    return None


def _kind(node: Node) -> Rows:
    kind = rows_of(node)
    assert kind is not None
    return kind


def _composed(graph: Graph, outer: Node, inner: Node, residual: Node) -> Node:
    source, weight, bias = get(inner, "rows"), get(outer, "weight"), get(outer, "bias")
    exact = wide(graph, weight)
    product = graph.call_function(aten.mm.default, (exact, wide(graph, get(inner, "weight"))))  # [Co, C]
    product = graph.call_function(aten.type_as.default, (product, weight))
    joined = graph.call_function(aten.cat.default, ([product, weight], 1))  # [Co, C + C2]
    joined.meta["val"] = torch.empty(
        _kind(outer).channels, _kind(source).channels + _kind(residual).channels, device="meta"
    )
    if get(inner, "bias") is not None:
        moved = graph.call_function(aten.mv.default, (exact, wide(graph, get(inner, "bias"))))
        bias = moved if bias is None else graph.call_function(aten.add.Tensor, (moved, bias))
        bias = graph.call_function(aten.type_as.default, (bias, weight))
    return multiply(graph, _kind(outer), rows=source, rows2=residual, weight=joined, bias=bias)
