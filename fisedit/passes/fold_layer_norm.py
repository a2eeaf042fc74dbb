"""Fold a layer normalization into the product that reads it, which then reads the rows as they are.

``W (g * (x - mean) / deviation + b) + c = (W' x - mean * sum(W')) / deviation + (W b + c)`` with ``W' = W g``: what is
left of the norm are two numbers a row. The product that makes the rows gives their sums on the way, so that neither
another launch nor another copy of the rows comes between the two.
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit.passes.base import PassResult
from fisedit.passes.fused import get, of_parameters, update, wide
from fisedit.passes.ir import PRODUCTS, aten, fisedit, is_op, rows_of


def fold_layer_norm(gm: GraphModule) -> PassResult:
    """After ``fuse_norms``, of norms whose product makes both."""
    graph, matched = gm.graph, 0
    for node in list(graph.nodes):
        if is_op(node, fisedit.multiply_norm_rows.default) and (product := _reader(node)) is not None:
            _fold(graph, node, product)
            matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched)


def _reader(both: Node) -> Node | None:
    """The product that alone reads the layer-normalized rows of another, if all of its weights are known beforehand."""
    named = both.kwargs
    if named.get("norm_affine") is not None or named.get("norm_moments"):
        return None
    normalized = next(user for user in both.users if user.args[1] == 1)
    product = next(iter(normalized.users))
    if len(normalized.users) > 1 or not is_op(product, *PRODUCTS) or get(product, "rows") is not normalized:
        return None
    alone = all(get(product, name) is None for name in ("rows2", "sources", "affine", "moments"))
    parameters = [value for name in ("norm_weight", "norm_bias") if isinstance(value := named.get(name), Node)]
    return product if alone and of_parameters(product) and all(p.op == "get_attr" for p in parameters) else None


def _fold(graph: Graph, both: Node, product: Node) -> None:
    scale, offset = (cast(Node | None, both.kwargs.get(name)) for name in ("norm_weight", "norm_bias"))
    weight, bias = get(product, "weight"), get(product, "bias")
    with graph.inserting_before(product):
        exact, scaled = wide(graph, weight), weight
        if scale is not None:
            scaled = graph.call_function(aten.mul.Tensor, (exact, wide(graph, scale)))  # [Co, C]
            scaled = graph.call_function(aten.type_as.default, (scaled, weight))
            scaled.meta["val"] = torch.empty(_shape(both, product), device="meta")
        center = graph.call_function(aten.sum.dim_IntList, (wide(graph, scaled), [1]))  # [Co]
        center = graph.call_function(aten.to.dtype, (center, torch.float32))
        if offset is not None:
            moved = graph.call_function(aten.mv.default, (exact, wide(graph, offset)))
            bias = moved if bias is None else graph.call_function(aten.add.Tensor, (moved, bias))
            bias = graph.call_function(aten.type_as.default, (bias, weight))
        moments = graph.call_function(operator.getitem, (both, 2))
    update(product, weight=scaled, bias=bias, moments=moments, center=center, input_eps=both.kwargs["eps"])
    both.kwargs = {**both.kwargs, "norm_weight": None, "norm_bias": None, "norm_moments": True}


def _shape(both: Node, product: Node) -> tuple[int, int]:
    inputs, outputs = rows_of(both), rows_of(product)
    assert inputs is not None and outputs is not None
    return outputs.channels * (2 if get(product, "gated") else 1), inputs.channels
