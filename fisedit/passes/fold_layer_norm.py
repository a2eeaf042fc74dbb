"""Put layer normalizations into the products that read them.

``norm(x) @ W.T = rstd * (x @ V.T - mean * V.sum(1)) + W @ beta`` with ``V = W * gamma``: the product takes the rows as
they are, and their mean and deviation while it reads them.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit.passes.base import PassResult
from fisedit.passes.fused import get, update
from fisedit.passes.ir import args, aten, bound_arguments, fisedit, is_op, rows_of
from fisedit.passes.remove_identities import is_flat


def fold_layer_norm(gm: GraphModule) -> PassResult:
    graph, matched = gm.graph, 0
    for node in list(graph.nodes):
        if not is_op(node, aten.layer_norm.default) or rows_of(node) is None or not is_flat(node):
            continue
        bound = bound_arguments(node)
        kind = rows_of(node)
        assert kind is not None
        if list(bound["normalized_shape"]) != [kind.channels] or not all(_foldable(user, node) for user in node.users):
            continue
        for product in list(node.users):
            _fold(graph, product, bound["input"], bound["weight"], bound["bias"], bound["eps"])
        graph.erase_node(node)
        matched += 1
    return PassResult(matched)


def _foldable(user: Node, norm: Node) -> bool:
    return (
        is_op(user, fisedit.multiply_rows.default)
        and get(user, "rows") is norm
        and all(get(user, name) is None for name in ("rows2", "sources", "column_sum"))
        and norm not in args(user)[1:]
    )


def _fold(graph: Graph, product: Node, source: Node, gamma: Node | None, beta: Node | None, eps: float) -> None:
    weight, bias = get(product, "weight"), get(product, "bias")
    with graph.inserting_before(product):
        scaled = weight if gamma is None else graph.call_function(aten.mul.Tensor, (weight, gamma))  # [Co, C]
        if "val" in weight.meta:
            scaled.meta["val"] = weight.meta["val"]
        wide = graph.call_function(aten.to.dtype, (scaled, torch.float32))
        column_sum = graph.call_function(aten.sum.dim_IntList, (wide, [1]))  # [Co]
        if beta is not None:
            lifted = [graph.call_function(aten.to.dtype, (value, torch.float32)) for value in (weight, beta)]
            moved = graph.call_function(aten.mv.default, tuple(lifted))  # [Co]
            bias = moved if bias is None else graph.call_function(aten.add.Tensor, (moved, bias))
    update(product, rows=source, weight=scaled, bias=bias, column_sum=column_sum, eps=eps)
