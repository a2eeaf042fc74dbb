"""Attention of active rows without copies: recorded keys and values are read in place, renewed ones from the rows."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.fused import count, take_over
from fisedit.passes.ir import args, aten, fisedit, is_op, rows_of, tensor
from fisedit.passes.read_in_place import recorded_map
from fisedit.runtime.plan import Table


def fuse_attention(gm: GraphModule) -> PassResult:
    graph, matched, refused = gm.graph, 0, []
    for node in list(graph.nodes):
        if not is_op(node, fisedit.row_attention.default):
            continue
        if reason := _refused(node):
            refused.append(Refusal(node.name, reason))
            continue
        with graph.inserting_before(node):
            take_over(graph, node, _attend(graph, node))
        matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched, tuple(refused))


def _refused(node: Node) -> str | None:
    query, key, value, mask = args(node)[:4]
    kind, source = rows_of(node), rows_of(query)
    if mask is not None:
        return "a mask"
    if kind is None or source is None or source.channels != kind.channels:
        return "values of another width than keys"
    bases = [args(map_)[0] for operand in (key, value) if (map_ := _renewed_map(operand)) is not None]
    if not all(is_op(base, fisedit.cache_load.default) for base in bases):
        return "keys or values that are dense, not recorded"
    return None


def _attend(graph: Graph, node: Node) -> Node:
    query, key, value, _, heads, scale = args(node)[:6]
    kind = rows_of(node)
    assert kind is not None
    table = key_count = recorded_key = recorded_value = None
    maps = [_renewed_map(operand) for operand in (key, value)]
    if maps[0] is not None and maps[1] is not None:
        (recorded_key, _, key), (recorded_value, _, value) = (args(map_) for map_ in maps if map_ is not None)
        recorded_key, recorded_value = recorded_map(graph, recorded_key), recorded_map(graph, recorded_value)
        table = rows.table(graph, Table("keys", kind.level))
    elif len(node.args) > 6:  # active rows alone
        key, value = (_split_rows(operand) or operand for operand in (key, value))
        key_count = rows.table(graph, Table("counts", kind.level))
    else:
        key, value = (_text_rows(operand, heads) or operand for operand in (key, value))
    number, locks = count(graph, kind.level), rows.table(graph, Table("locks", kind.level))
    arguments = (query, key, value, recorded_key, recorded_value, table, number, key_count, locks, heads, scale)
    return rows.call(graph, fisedit.attend_rows.default, arguments, rows=kind)


def _split_rows(operand: Node) -> Node | None:
    """The rows ``[B, N or R, h*d]`` that ``operand`` ``[B, h, N or R, d]`` is a view of."""
    if not is_op(operand, aten.permute.default) or not is_op(args(operand)[0], aten.reshape.default):
        return None
    split = args(operand)[0]
    return args(split)[0] if split.meta.get("converts") else None


def _text_rows(operand: Node, heads: int) -> Node | None:
    """The text's keys or values ``[B, L, h*d]`` that ``operand`` ``[B, h, L, d]`` is a view of: one the less to be made
    for each edit."""
    swapped = is_op(operand, aten.transpose.int) and sorted(axis % 4 for axis in args(operand)[1:3]) == [1, 2]
    permuted = is_op(operand, aten.permute.default) and list(args(operand)[1]) == [0, 2, 1, 3]
    if not (swapped or permuted):
        return None
    split = args(operand)[0]
    if not is_op(split, aten.reshape.default, aten.view.default, aten.unflatten.int):
        return None
    source = args(split)[0]
    if "val" not in split.meta or "val" not in source.meta:
        return None
    batch, length, number, channels = tensor(split).shape
    side_by_side = number == heads and tensor(source).shape == (batch, length, heads * channels)
    return source if side_by_side else None


def _renewed_map(operand: Node) -> Node | None:
    """The map ``[B, R, h*d]`` into which the active keys or values of self-attention are written."""
    source = _split_rows(operand)
    return source if is_op(source, fisedit.scatter_rows.default) else None
