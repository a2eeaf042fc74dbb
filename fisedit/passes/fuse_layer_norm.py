"""Layer normalization of active rows alone: none of the rows that pad them."""

from __future__ import annotations

from torch.fx import GraphModule

from fisedit.passes import rows
from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.fused import count, take_over
from fisedit.passes.ir import aten, bound_arguments, fisedit, is_op, rows_of
from fisedit.passes.remove_identities import is_flat


def fuse_layer_norm(gm: GraphModule) -> PassResult:
    graph, matched, refused = gm.graph, 0, []
    for node in list(graph.nodes):
        kind = rows_of(node)
        if not is_op(node, aten.layer_norm.default) or kind is None:
            continue
        bound = bound_arguments(node)
        if not is_flat(node) or list(bound["normalized_shape"]) != [kind.channels]:
            refused.append(Refusal(node.name, "it normalizes over a part of the channels"))
            continue
        with graph.inserting_before(node):
            arguments = (bound["input"], bound["weight"], bound["bias"], bound["eps"], count(graph, kind.level))
            take_over(graph, node, rows.call(graph, fisedit.layer_norm_rows.default, arguments, rows=kind))
        matched += 1
    return PassResult(matched, tuple(refused))
