"""Cancel ``pack(unpack(rows))``. What stays between an ``unpack`` and a ``pack`` is a dense island."""

from __future__ import annotations

from torch.fx import GraphModule

from fisedit.passes.base import PassResult
from fisedit.passes.ir import args, fisedit, is_op


def eliminate_repacking(gm: GraphModule) -> PassResult:
    matched = 0
    for node in list(gm.graph.nodes):
        if is_op(node, fisedit.pack.default) and is_op(args(node)[0], fisedit.unpack.default):
            node.replace_all_uses_with(args(args(node)[0])[0])
            gm.graph.erase_node(node)
            matched += 1
    return PassResult(matched)
