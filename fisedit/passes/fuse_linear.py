"""Linear layers of rows as ``multiply_rows``; those that read the same rows (queries, keys and values) as one."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit.passes.base import PassResult
from fisedit.passes.fused import multiply, take_over
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
    for nodes in by_source.values():
        if len(nodes) > 1 and all("val" in (n.meta) for n in nodes):
            _merge(graph, nodes)
            matched += len(nodes)
    for node in list(graph.nodes):
        if is_op(node, aten.linear.default) and rows_of(node) is not None and is_flat(node):
            with graph.inserting_before(node):
                take_over(graph, node, _product(graph, node))
            matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched)


def _merge(graph: Graph, nodes: list[Node]) -> None:
    """One linear layer for those of one input; each result is a slice of its."""
    bound = [bound_arguments(node) for node in nodes]
    widths = [int(tensor(node).shape[-1]) if rows_of(node) is None else _width(node) for node in nodes]
    with graph.inserting_before(nodes[0]):
        weight = graph.call_function(aten.cat.default, ([b["weight"] for b in bound],))  # [sum Co, C]
        bias = None
        if any(b["bias"] is not None for b in bound):
            parts = [b["bias"] if b["bias"] is not None else _zeros(graph, node, width)
                     for b, node, width in zip(bound, nodes, widths, strict=True)]  # fmt: skip
            bias = graph.call_function(aten.cat.default, (parts,))
        merged = graph.call_function(aten.linear.default, (bound[0]["input"], weight, bias))
    if "val" in bound[0]["input"].meta:
        source = tensor(bound[0]["input"])
        merged.meta["val"] = source.new_empty(*source.shape[:-1], sum(widths))
    kind, offset = rows_of(nodes[0]), 0
    if kind is not None:
        merged.meta["rows"] = Rows(kind.level, kind.batch, sum(widths))
    weight.meta["val"] = tensor(bound[0]["weight"]).new_empty(sum(widths), _inputs(bound[0]["weight"]))
    for node, width in zip(nodes, widths, strict=True):
        with graph.inserting_before(node):
            part = graph.call_function(aten.slice.Tensor, (merged, -1, offset, offset + width))
        take_over(graph, node, part)
        offset += width


def _width(node: Node) -> int:
    kind = rows_of(node)
    assert kind is not None
    return kind.channels


def _inputs(weight: Node) -> int:
    return int(tensor(weight).shape[1])


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
