"""Ask memory for a product's weights one fused op before it, which computes meanwhile.

A small edit waits for weights more than for anything else, and for each product anew. They are known beforehand: so the
op before has them brought into L2 (PTX ``cp.async.bulk.prefetch``).
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from fisedit.passes.base import PassResult
from fisedit.passes.fused import get, hoist, of_parameters, update
from fisedit.passes.ir import fisedit, is_op


def prefetch_weights(gm: GraphModule) -> PassResult:
    before: Node | None = None
    matched = 0
    for node in list(gm.graph.nodes):
        product = is_op(node, fisedit.multiply_rows.default, fisedit.multiply_norm_rows.default)
        if product and before is not None and of_parameters(node):
            matched += _ask(gm.graph, before, get(node, "weight"))
        if product or is_op(node, fisedit.attend_rows.default):
            before = node
    return PassResult(matched)


def _ask(graph: Graph, node: Node, weight: Node) -> bool:
    if weight in node.all_input_nodes:
        return False
    hoist(graph, [weight], node)
    if is_op(node, fisedit.attend_rows.default):
        node.args = (*node.args, weight)
    else:
        update(node, prefetch=weight)
    return True
