"""Attention to a text, in the linear layer that makes its queries: neither they nor another launch lie between them."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.fused import MULTIPLY, ancestors, get, take_over
from fisedit.passes.hoist_step_invariant import is_before_steps
from fisedit.passes.ir import args, fisedit, is_op, rows_of, tensor

HEADS, MOST_KEYS = (32, 64, 128), 128
"""Channels that a head can have, and keys at most: what a tile of the kernel holds."""


def fuse_text_attention(gm: GraphModule) -> PassResult:
    """After all that is fused into products: nothing else may follow the queries."""
    graph, matched, refused = gm.graph, 0, []
    for node in list(graph.nodes):
        if not is_op(node, fisedit.attend_rows.default) or args(node)[5] is not None or args(node)[7] is not None:
            continue
        if reason := _refused(node):
            refused.append(Refusal(node.name, reason))
            continue
        with graph.inserting_before(node):
            take_over(graph, node, _fuse(graph, node))
        matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched, tuple(refused))


def _refused(node: Node) -> str | None:
    query, key, value = args(node)[:3]
    kind = rows_of(node)
    assert kind is not None
    if not is_op(query, fisedit.multiply_rows.default) or len(query.users) > 1:
        return "its queries are not those of a linear layer alone"
    nothing = ("rows2", "rows3", "sources", "affine", "residual")
    if any(get(query, name) is not None for name in nothing) or get(query, "activation") != MULTIPLY["activation"]:
        return "something follows its queries"
    if "val" not in key.meta or tensor(key).dim() != 3 or tensor(value).shape != tensor(key).shape:
        return "its keys are not side by side"
    if kind.channels // args(node)[9] not in HEADS or tensor(key).shape[1] > MOST_KEYS:
        return "no tile has the channels of its heads, or so many keys"
    if not all(map(is_before_steps, ancestors([key, value]))):
        return "its keys change from step to step"
    return None


def _fuse(graph: Graph, node: Node) -> Node:
    query, key, value, *_, heads, scale = args(node)
    text = {"key": key, "value": value, "heads": heads, "scale": scale}
    return rows.call(graph, fisedit.multiply_attend_rows.default, query.args, text, rows_of(node))
