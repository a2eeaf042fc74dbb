"""The sum of two products as one, whose inner dimension is that of both: a residual block's last convolution, and the
1x1 convolution of its shortcut."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit.passes.base import PassResult
from fisedit.passes.fuse_linear import CHUNK
from fisedit.passes.fused import get, is_bare, multiply, of_parameters, take_over
from fisedit.passes.ir import args, aten, is_op, rows_of

SOURCES = ("rows", "rows2", "rows3")
"""The arguments of a ``multiply_rows`` whose channels follow one another along the inner dimension."""


def fuse_sums(gm: GraphModule) -> PassResult:
    graph, matched = gm.graph, 0
    for node in list(graph.nodes):
        if not is_op(node, aten.add.Tensor) or node.kwargs or rows_of(node) is None:
            continue
        for first, second in (args(node), args(node)[::-1]):
            if _is_free(first, node) and _is_free(second, node) and _fits(first, second):
                with graph.inserting_before(node):
                    take_over(graph, node, _joined(graph, first, second))
                matched += 1
                break
    graph.eliminate_dead_code()
    return PassResult(matched)


def _is_free(product: Any, node: Node) -> bool:
    """Whether ``node`` alone reads a product, whose weights are made of parameters alone, with nothing fused yet."""
    return is_bare(product) and set(product.users) == {node} and of_parameters(product)


def _sources(product: Node) -> list[Node]:
    return [get(product, name) for name in SOURCES if get(product, name) is not None]


def _fits(first: Node, second: Node) -> bool:
    """Whether one kernel can read all sources: the second's are rows of the results themselves."""
    if first is second or rows_of(first) != rows_of(second) or get(second, "sources") is not None:
        return False
    kinds = [rows_of(source) for source in _sources(first) + _sources(second)]
    return len(kinds) <= len(SOURCES) and all(kind is not None and kind.channels % CHUNK == 0 for kind in kinds)


def _joined(graph: Graph, first: Node, second: Node) -> Node:
    kind, weights = rows_of(first), [get(product, "weight") for product in (first, second)]
    assert kind is not None
    weight = graph.call_function(aten.cat.default, (weights, 1))  # [Co, taps * C + C2 + C3]
    weight.meta["val"] = torch.empty(kind.channels, sum(map(_inner, (first, second))), device="meta")
    biases = [get(product, "bias") for product in (first, second) if get(product, "bias") is not None]
    bias = graph.call_function(aten.add.Tensor, tuple(biases)) if len(biases) == 2 else next(iter(biases), None)
    sources = dict(zip(SOURCES, _sources(first) + _sources(second), strict=False))
    place = {name: get(first, name) for name in ("recorded", "sources")}
    return multiply(graph, kind, weight=weight, bias=bias, **sources, **place)


def _inner(product: Node) -> int:
    """Channels that a product sums over, taps included."""
    kinds = [rows_of(source) for source in _sources(product)]
    first, *more = (kind.channels for kind in kinds if kind is not None)
    table = get(product, "sources")
    taps = 1 if table is None else table.meta["table"].of.kernel[0] * table.meta["table"].of.kernel[1]
    return first * taps + sum(more)
