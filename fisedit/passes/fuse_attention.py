"""Attention of active rows without copies: recorded keys and values are read in place, renewed ones from the rows."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.fused import count, take_over
from fisedit.passes.ir import args, aten, fisedit, is_op, rows_of
from fisedit.passes.read_in_place import recorded_map
from fisedit.passes.remove_identities import is_flat
from fisedit.runtime.plan import Table


def fuse_attention(gm: GraphModule) -> PassResult:
    graph, matched, refused = gm.graph, 0, []
    for node in list(graph.nodes):
        if not is_op(node, fisedit.row_attention.default):
            continue
        query, key, value, mask, heads, scale = args(node)[:6]
        kind, source = rows_of(node), rows_of(query)
        assert kind is not None
        if mask is not None or source is None or source.channels != kind.channels:
            refused.append(Refusal(node.name, "a mask, or values of another width than keys"))
            continue
        with graph.inserting_before(node):
            table = locks = key_count = recorded_key = recorded_value = None
            if (both := [_renewed(operand) for operand in (key, value)]) and all(both):
                (key, recorded_key), (value, recorded_value) = (
                    (packed, recorded_map(graph, load)) for load, packed in both
                )
                table = rows.table(graph, Table("keys", kind.level))
            elif all(packed := [_split_rows(operand) for operand in (key, value)]):
                key, value = packed
                key_count = rows.table(graph, Table("counts", kind.level))
            locks = rows.table(graph, Table("locks", kind.level))
            arguments = (query, key, value, recorded_key, recorded_value, table, count(graph, kind.level), key_count,
                         locks, heads, scale)  # fmt: skip
            take_over(graph, node, rows.call(graph, fisedit.attend_rows.default, arguments, rows=kind))
        matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched, tuple(refused))


def _split_rows(operand: Node) -> Node | None:
    """The rows ``[B, N or R, h*d]`` that ``operand`` ``[B, h, N or R, d]`` is a view of."""
    if not is_op(operand, aten.permute.default) or not is_op(args(operand)[0], aten.reshape.default):
        return None
    split = args(operand)[0]
    source = args(split)[0]
    if not split.meta.get("converts"):
        return None
    return source if is_op(source, fisedit.scatter_rows.default) or is_flat(source) else None


def _renewed(operand: Node) -> tuple[Node, Node] | None:
    """The recorded map and the active rows of keys or values of self-attention."""
    source = _split_rows(operand)
    if source is None or not is_op(source, fisedit.scatter_rows.default):
        return None
    recorded, _, packed = args(source)
    whole = is_op(recorded, fisedit.cache_load.default) and (len(recorded.args) < 2 or args(recorded)[1] is None)
    return (recorded, packed) if whole else None
