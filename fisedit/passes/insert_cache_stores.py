"""Make a dense graph keep the values of the given slots, as explicit ``cache_store`` nodes."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult
from fisedit.passes.ir import Rows, aten, bound_arguments, fisedit, layout_of, tensor
from fisedit.passes.slots import Slot


def insert_cache_stores(gm: GraphModule, slots: Iterable[Slot] = ()) -> PassResult:
    graph = gm.graph
    nodes = {node.meta["origin"]: node for node in graph.nodes if node.op not in ("output", "get_attr")}
    output = next(node for node in graph.nodes if node.op == "output")
    wanted = sorted(slots)
    stats = {}
    for origin in {slot.origin for slot in wanted if slot.kind == "mean"}:
        nodes[origin], stats[origin] = _with_stats(graph, nodes[origin])
    with graph.inserting_before(output):
        for slot in wanted:
            if slot.kind in ("mean", "rstd"):
                value = graph.call_function(operator.getitem, (stats[slot.origin], 1 if slot.kind == "mean" else 2))
                rows.store(graph, value, slot.key)
            elif slot.kind == "rows":
                layout = layout_of(nodes[slot.origin])
                assert layout is not None
                value = rows.dense_to_rows(graph, nodes[slot.origin], layout)
                value = graph.call_function(aten.contiguous.default, (value,))  # so that rows are gathered in one piece
                rows.store(graph, value, slot.key, Rows.of(layout))
            else:
                rows.store(graph, nodes[slot.origin], slot.key)
    return PassResult(len(wanted))


def _with_stats(graph: Graph, node: Node) -> tuple[Node, Node]:
    """Replace a ``group_norm`` by the op that also returns its statistics; gives the new norm, and that op."""
    bound = bound_arguments(node)
    arguments = (bound["input"], bound["num_groups"], bound["weight"], bound["bias"], bound["eps"])
    with graph.inserting_before(node):
        both = graph.call_function(fisedit.group_norm_stats.default, arguments)
        normalized = graph.call_function(operator.getitem, (both, 0))
    normalized.meta = dict(node.meta)
    both.meta = {"val": tensor(node), "converts": True}
    node.replace_all_uses_with(normalized)
    graph.erase_node(node)
    return normalized, both
