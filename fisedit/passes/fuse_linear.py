"""Linear layers of rows as ``multiply_rows``; those that read the same rows (queries, keys and values) as one."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit.passes.base import PassResult
from fisedit.passes.fused import hoist, multiply, of_the_model, take_over
from fisedit.passes.ir import Rows, args, aten, bound_arguments, is_op, rows_of, tensor
from fisedit.passes.remove_identities import is_flat

CHUNK = 64
"""Two sources of channels are read in whole chunks of so many."""


def fuse_linear(gm: GraphModule) -> PassResult:
    graph, matched = gm.graph, 0
    by_source: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if is_op(node, aten.linear.default) and (is_flat(node) or rows_of(node) is None):
            by_source.setdefault(args(node)[0], []).append(node)
    for source, alike in by_source.items():
        nodes = [node for node in alike if "val" in node.meta and of_the_model(_parameters(node))]
        if len(nodes) > 1 and (rows_of(source) is not None or "val" in source.meta):
            _merge(graph, nodes)
            matched += len(nodes)
    for node in list(graph.nodes):
        if not is_op(node, aten.linear.default) or rows_of(node) is None or not is_flat(node):
            continue
        if of_the_model(_parameters(node)):
            with graph.inserting_before(node):
                take_over(graph, node, _product(graph, node))
            matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched)


def _parameters(node: Node) -> list[Node]:
    bound = bound_arguments(node)
    return [bound[name] for name in ("weight", "bias") if bound[name] is not None]


def _merge(graph: Graph, nodes: list[Node]) -> None:
    """One linear layer for those of one input; each result is a slice of its."""
    bound = [bound_arguments(node) for node in nodes]
    widths = [int(tensor(node).shape[-1]) if rows_of(node) is None else _width(node) for node in nodes]
    hoist(graph, [value for node in nodes for value in _parameters(node)], nodes[0])
    with graph.inserting_before(nodes[0]):
        weight = graph.call_function(aten.cat.default, ([b["weight"] for b in bound],))  # [sum Co, C]
        bias = None
        if any(b["bias"] is not None for b in bound):
            parts = [b["bias"] if b["bias"] is not None else _zeros(graph, node, width)
                     for b, node, width in zip(bound, nodes, widths, strict=True)]  # fmt: skip
            bias = graph.call_function(aten.cat.default, (parts,))
        merged = graph.call_function(aten.linear.default, (bound[0]["input"], weight, bias))
    source, example = bound[0]["input"], tensor(nodes[0])
    if "val" in source.meta:
        merged.meta["val"] = example.new_empty(*tensor(source).shape[:-1], sum(widths))
    kind, offset = rows_of(nodes[0]), 0
    if kind is not None:
        merged.meta["rows"] = Rows(kind.level, kind.batch, sum(widths))
    weight.meta["val"] = example.new_empty(sum(widths), _width(source) if kind else tensor(source).shape[-1])
    for node, width in zip(nodes, widths, strict=True):
        with graph.inserting_before(node):
            part = graph.call_function(aten.slice.Tensor, (merged, -1, offset, offset + width))
        take_over(graph, node, part)
        offset += width


def _width(node: Node) -> int:
    kind = rows_of(node)
    assert kind is not None
    return kind.channels


def _zeros(graph: Graph, node: Node, width: int) -> Node:
    value = tensor(node)
    options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    return graph.call_function(aten.zeros.default, ([width],), options)


def _product(graph: Graph, node: Node) -> Node:
    bound, kind = bound_arguments(node), rows_of(node)
    assert kind is not None
    source, second = two_sources(bound["input"])
    return multiply(graph, kind, rows=source, rows2=second, weight=bound["weight"], bias=bound["bias"])


def two_sources(source: Node) -> tuple[Node, Node | None]:
    """A concatenation of two along the channels, as its parts, where a kernel can read both."""
    if is_op(source, aten.cat.default) and is_flat(source) and len(args(source)[0]) == 2:
        parts = args(source)[0]
        if all((own := rows_of(part)) is not None and own.channels % CHUNK == 0 for part in parts):
            return parts[0], parts[1]
    return source, None
