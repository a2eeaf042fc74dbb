"""Remove ops on packed rows that change nothing: division by one, dropout at rest, reshapes to the same shape."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from fisedit.passes.base import PassResult
from fisedit.passes.ir import args, aten, bound_arguments, is_op, rows_of

COPIES = {aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default}


def remove_identities(gm: GraphModule) -> PassResult:
    matched = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and rows_of(node) is not None and (same := _same_as(node)) is not None:
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)
            matched += 1
    matched += _merge_equal(gm.graph)
    return PassResult(matched)


def _same_as(node: Node) -> Node | None:
    source = args(node)[0] if node.args else None
    if not isinstance(source, Node) or rows_of(source) is None:
        return None
    if (
        is_op(node, aten.div.Tensor, aten.mul.Tensor)
        and args(node)[1] in (1, 1.0)
        and not isinstance(args(node)[1], Node)
    ):
        return source
    if is_op(node, aten.dropout.default) and not bound_arguments(node)["train"]:
        return source
    if node.target in COPIES:
        return source
    if is_op(node, aten.to.dtype) and "val" in source.meta and args(node)[1] == source.meta["val"].dtype:
        return source
    if is_op(node, aten.reshape.default) and len(args(node)[1]) == 3 and is_flat(source):
        return source if rows_of(source) == rows_of(node) else None
    return None


def is_flat(node: Node) -> bool:
    """Whether a packed value is ``[B, N, C]``, its channels in one dimension."""
    if rows_of(node) is None:
        return False
    if "flat" not in node.meta:
        if is_op(node, aten.reshape.default, aten.view.default):
            node.meta["flat"] = len(args(node)[1]) == 3
        else:
            node.meta["flat"] = all(_is_flat_operand(source) for source in node.all_input_nodes)
    return node.meta["flat"]


def _is_flat_operand(value: Node) -> bool:
    """Rows whose channels a pass has split for one op are a reshape that is not typed as rows."""
    if is_op(value, aten.reshape.default) and rows_of(value) is None and rows_of(args(value)[0]) is not None:
        return len(args(value)[1]) == 3
    return rows_of(value) is None or is_flat(value)


def _merge_equal(graph: Graph) -> int:
    """One node for ops of equal arguments (a SiLU of the time embedding in every block)."""
    seen: dict[tuple[object, ...], Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_op(node, aten.silu.default):
            continue
        key = (node.target, node.args)
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
            merged += 1
        else:
            seen[key] = node
    return merged
