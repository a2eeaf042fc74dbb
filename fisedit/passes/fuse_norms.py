"""Let a product make its rows twice, as they are and normalized, where both are read.

The residual stream is such a value: the next layer reads it normalized, a later addition as it is. What comes between
is a launch less, and the rows are read once less.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult
from fisedit.passes.fused import ancestors, get, hoist, take_over
from fisedit.passes.ir import args, fisedit, is_op, rows_of
from fisedit.runtime.plan import Table


def fuse_norms(gm: GraphModule) -> PassResult:
    """A product takes one norm: the first that reads it."""
    graph, matched = gm.graph, 0
    for node in list(graph.nodes):
        if is_op(node, fisedit.layer_norm_rows.default):
            matched += _layer_norm(graph, node)
        elif is_op(node, fisedit.normalize_rows.default):
            matched += _group_norm(graph, node)
    return PassResult(matched)


def _layer_norm(graph: Graph, node: Node) -> bool:
    product, weight, bias, eps, _ = args(node)
    parameters = [value for value in (weight, bias) if value is not None]
    if not _is_free(product) or product in ancestors(parameters):
        return False
    hoist(graph, parameters, product)
    take_over(graph, node, _with_norm(graph, product, norm_weight=weight, norm_bias=bias, eps=eps))
    return True


def _group_norm(graph: Graph, node: Node) -> bool:
    """One of known statistics; where the level is full, it is done after the product, as in ``fuse_epilogues``."""
    product, second, renewed, activation, _, done = args(node)
    if second is not None or done is not False or not _is_free(product):
        return False
    affine, full = args(renewed)[2:4]
    kind = rows_of(node)
    assert kind is not None
    hoist(graph, [affine], product)
    with graph.inserting_before(product):
        full = rows.table(graph, full.meta["table"])
    normalized = _with_norm(graph, product, norm_affine=affine, norm_full=full, norm_activation=activation)
    with graph.inserting_before(node):
        node.update_arg(0, normalized)
        node.update_arg(5, rows.table(graph, Table("partial", kind.level)))
    return True


def _is_free(product: Node) -> bool:
    """Whether a node is a product whose rows have no norm yet."""
    return is_op(product, fisedit.multiply_rows.default) and get(product, "affine") is None


def _with_norm(graph: Graph, product: Node, **norm: Any) -> Node:
    """The normalized rows of a product that makes both from now on."""
    kind, target = rows_of(product), fisedit.multiply_norm_rows.default
    with graph.inserting_before(product):
        both = rows.call(graph, target, product.args, norm, rows=kind)
        out, normalized = (rows.call(graph, operator.getitem, (both, part), rows=kind) for part in (0, 1))
    for key in ("nn_module_stack", "origin", "val"):
        if key in product.meta:
            both.meta[key] = normalized.meta[key] = product.meta[key]
    take_over(graph, product, out)
    return normalized
