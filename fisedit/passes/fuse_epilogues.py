"""Put what follows a product row by row into it: normalization, activation, gating, the residual."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult
from fisedit.passes.fused import MULTIPLY, get, is_bare, take_over, update
from fisedit.passes.ir import Rows, args, aten, bound_arguments, fisedit, is_op, rows_of
from fisedit.passes.remove_identities import is_flat
from fisedit.runtime.plan import Table


def fuse_epilogues(gm: GraphModule) -> PassResult:
    graph, matched = gm.graph, 0
    for fuse in (_activated_norm, _norm, _gate, _activation, _residual):
        for node in list(graph.nodes):
            if node.op == "call_function" and rows_of(node) is not None:
                matched += fuse(graph, node)
    graph.eliminate_dead_code()
    return PassResult(matched)


def activation_of(node: Node) -> str | None:
    """The name of an activation that kernels know."""
    if is_op(node, aten.silu.default):
        return "silu"
    if is_op(node, aten.gelu.default):
        return "gelu_tanh" if bound_arguments(node)["approximate"] == "tanh" else "gelu"
    return None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activated_norm(graph: Graph, node: Node) -> bool:
    if not is_op(node, aten.silu.default) or not is_op(args(node)[0], fisedit.normalize_rows.default):
        return False
    norm = args(node)[0]
    if _only_user(norm) is not node:
        return False
    norm.update_arg(3, "silu")
    _pass_on(graph, node, norm)
    return True


def _pass_on(graph: Graph, node: Node, result: Node) -> None:
    """``result`` computes ``node`` too."""
    for key in ("origin", "val", "rows"):
        if key in node.meta:
            result.meta[key] = node.meta[key]
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _norm(graph: Graph, node: Node) -> bool:
    """Scale, offset and activation of a normalization; where the level is full, it is done after the product."""
    if not is_op(node, fisedit.normalize_rows.default) or args(node)[1] is not None:
        return False
    product, renewed = args(node)[0], args(node)[2]
    if not is_bare(product) or set(product.users) != {node, renewed}:
        return False
    affine, full = args(renewed)[2:4]
    kind = rows_of(node)
    assert kind is not None
    product.prepend(affine)
    with graph.inserting_before(product):
        full = rows.table(graph, full.meta["table"])
        update(product, affine=affine, full=full, activation=args(node)[3])
    with graph.inserting_before(node):
        node.update_arg(5, rows.table(graph, Table("partial", kind.level)))
    return True


def _gate(graph: Graph, node: Node) -> bool:
    """The first half of the channels times the activation of the second (GEGLU and its kin)."""
    if not is_op(node, aten.mul.Tensor) or not all(isinstance(a, Node) for a in args(node)):
        return False
    for value, gate in (args(node), args(node)[::-1]):
        activation = activation_of(gate)
        if activation is None or _only_user(gate) is not node or _only_user(value) is not node:
            continue
        halves = [_half(value), _half(args(gate)[0])]
        if halves[0] is None or halves[1] is None or halves[0][0] is not halves[1][0]:
            continue
        split = halves[0][0]
        product = args(split)[0]
        if (halves[0][1], halves[1][1]) != (0, 1) or not is_bare(product) or _only_user(product) is not split:
            continue
        update(product, activation=activation, gated=True)
        for user in list(node.users):
            user.replace_input_with(node, product)
        kind = rows_of(product)
        assert kind is not None
        product.meta.update({k: node.meta[k] for k in ("origin", "val") if k in node.meta})
        product.meta["rows"] = Rows(kind.level, kind.batch, kind.channels // 2)
        graph.eliminate_dead_code()
        return True
    return False


def _half(node: Node) -> tuple[Node, int] | None:
    """The split in two that a value is a half of, and which."""
    while is_op(node, aten.reshape.default) and len(args(node)[1]) == 3 and rows_of(args(node)[0]) == rows_of(node):
        node = args(node)[0]
    if not is_op(node, operator.getitem) or not is_op(args(node)[0], aten.chunk.default, aten.split.Tensor):
        return None
    split = args(node)[0]
    whole, part = rows_of(args(split)[0]), rows_of(node)
    if whole is None or part is None or whole.channels != 2 * part.channels or not is_flat(args(split)[0]):
        return None
    return split, args(node)[1]


def _activation(graph: Graph, node: Node) -> bool:
    activation = activation_of(node)
    if activation is None or not is_bare(args(node)[0]) or _only_user(args(node)[0]) is not node:
        return False
    product = args(node)[0]
    update(product, activation=activation)
    _pass_on(graph, node, product)
    return True


def _residual(graph: Graph, node: Node) -> bool:
    if not is_op(node, aten.add.Tensor) or node.kwargs or len(node.args) != 2:
        return False
    for product, other in (args(node), args(node)[::-1]):
        if not is_op(product, fisedit.multiply_rows.default) or _only_user(product) is not node or other is product:
            continue
        if get(product, "residual") is not None or get(product, "affine") is not None:
            continue
        if rows_of(other) != rows_of(product) or not is_flat(other):
            continue
        with graph.inserting_before(node):
            values: dict[str, Any] = dict(zip(MULTIPLY, product.args, strict=True))
            fused = graph.call_function(fisedit.multiply_rows.default, tuple({**values, "residual": other}.values()))
        take_over(graph, node, fused)
        graph.erase_node(product)
        return True
    return False
