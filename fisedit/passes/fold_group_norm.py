"""Normalize packed rows with the recorded run's statistics: one multiply-add per row.

The paper's "approximate normalization", and better: a level whose positions are all active (deep levels often are) is
normalized with its own statistics. A broadcast add before the norm (the time embedding) folds into the shift.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.ir import Rows, args, aten, bound_arguments, fisedit, is_op, layout_of, tensor
from fisedit.passes.layout import Layout, LayoutError
from fisedit.runtime.plan import Table


def fold_group_norm(gm: GraphModule) -> PassResult:
    graph, matched, refused = gm.graph, 0, []
    for node in list(graph.nodes):
        if not is_op(node, aten.group_norm.default):
            continue
        if layout_of(node) is None or "island" in node.meta:
            refused.append(Refusal(node.name, node.meta.get("island", "its input has no positions")))
            continue
        _fold(graph, node)
        matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched, tuple(refused))


def _fold(graph: Graph, node: Node) -> None:
    bound = bound_arguments(node)
    source, layout = bound["input"], layout_of(node)
    assert layout is not None
    with graph.inserting_before(node):
        source, shift = _split_shift(graph, source, layout)
        packed = rows.pack(graph, source)
        stats = [rows.call(graph, fisedit.cache_load.default, (f"{kind}:{node.meta['origin']}",))
                 for kind in ("mean", "rstd")]  # fmt: skip
        for load in stats:
            wide = torch.promote_types(tensor(node).dtype, torch.float32)
            load.meta["recorded"] = torch.empty(layout.batch, int(bound["num_groups"]), dtype=wide, device="meta")
        positions = layout.level[0] * layout.level[1]
        arguments = (packed, *stats, bound["weight"], bound["bias"], shift, bound["eps"], positions,
                     rows.table(graph, Table("count", layout.level)))  # fmt: skip
        folded = rows.call(graph, fisedit.group_norm_rows.default, arguments, rows=Rows.of(layout))
        folded.meta["groups"] = int(bound["num_groups"])
        rows.replace(graph, node, folded)


def _split_shift(graph: Graph, source: Node, layout: Layout) -> tuple[Node, Node | None]:
    """``source`` as a map plus a per-channel shift ``[B, 1, C]``, where it is such a sum and used only here."""
    if not is_op(source, aten.add.Tensor) or source.kwargs or len(source.users) != 1 or "island" in source.meta:
        return source, None
    for base, shift in (args(source)[:2], args(source)[1::-1]):
        base_layout = layout_of(base)
        if base_layout is None or layout_of(shift) is not None or not isinstance(shift, Node):
            continue
        if not base_layout.matches(layout):
            continue
        try:
            return base, rows.broadcast_to_rows(graph, shift, layout)
        except LayoutError:
            continue
    return source, None
