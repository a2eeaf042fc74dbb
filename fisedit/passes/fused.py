"""What the fusion passes share: the arguments of a ``multiply_rows`` by name, and the tables every fused op takes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from fisedit.passes import rows
from fisedit.passes.ir import Rows, aten, fisedit, is_op, rows_of
from fisedit.passes.layout import Level
from fisedit.runtime.plan import Table

MULTIPLY = {
    "rows": None, "rows2": None, "recorded": None, "sources": None, "weight": None, "bias": None,
    "affine": None, "full": False, "residual": None, "count": None, "locks": None, "activation": "none",
    "gated": False, "positions": 0, "rows3": None, "moments": None, "center": None,
    "input_eps": 0.0,
}  # fmt: skip
"""The arguments of ``multiply_rows`` in their order, with what they are where nothing is fused."""


def count(graph: Graph, level: Level) -> Node:
    return rows.table(graph, Table("number", level))


def multiply(graph: Graph, kind: Rows, **given: Any) -> Node:
    """A ``multiply_rows`` that makes rows of ``kind``."""
    given.setdefault("positions", kind.level[0] * kind.level[1])
    tables = {"count": count(graph, kind.level), "locks": rows.table(graph, Table("locks", kind.level))}
    arguments = {**MULTIPLY, **tables, **given}
    return rows.call(graph, fisedit.multiply_rows.default, list(arguments.values()), rows=kind)


def get(node: Node, name: str) -> Any:
    """An argument of a ``multiply_rows``, or of a ``multiply_norm_rows`` that both have."""
    return node.args[list(MULTIPLY).index(name)]


def update(node: Node, **changes: Any) -> None:
    """Change arguments of a ``multiply_rows``."""
    values = dict(zip(MULTIPLY, node.args, strict=True)) | changes
    node.args = tuple(values.values())


def is_bare(node: Any) -> bool:
    """Whether a node is a ``multiply_rows`` after which nothing is fused yet."""
    if not is_op(node, fisedit.multiply_rows.default):
        return False
    after = ("affine", "residual", "activation", "gated", "moments")
    return all(get(node, name) == MULTIPLY[name] for name in after)


def of_parameters(product: Node) -> bool:
    """Whether the weights of a ``multiply_rows`` are made of the model's parameters alone: known beforehand."""
    weights = [get(product, name) for name in ("weight", "bias") if get(product, name) is not None]
    return all(before.all_input_nodes or before.op == "get_attr" for before in ancestors(weights))


def of_the_model(parameters: list[Node]) -> bool:
    """Whether weights are the same in every call. A kernel may read such before those in front of it have ended; others
    are left to PyTorch."""
    return all(before.op != "placeholder" for before in ancestors(parameters))


def wide(graph: Graph, weight: Node) -> Node:
    """A weight in float64: what is made of it is rounded once, whatever PyTorch's setting for products of float32."""
    return graph.call_function(aten.to.dtype, (weight, torch.float64))


def take_over(graph: Graph, old: Node, new: Node) -> None:
    """Put ``new`` in the place of ``old``, with what is known of it."""
    for key in ("nn_module_stack", "origin", "val"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    if (kind := rows_of(old)) is not None:
        new.meta["rows"] = kind
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def ancestors(nodes: list[Node]) -> set[Node]:
    """``nodes`` and all that they are computed from."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def hoist(graph: Graph, nodes: list[Node], first: Node) -> None:
    """Move ``nodes`` and what they are computed from before ``first``, which they must not need."""
    wanted = ancestors(nodes)
    before = set()
    for node in graph.nodes:
        if node is first:
            break
        before.add(node)
    for node in list(graph.nodes):
        if node in wanted and node not in before:
            first.prepend(node)
