"""Compute attention for active rows only.

Self-attention: queries are active rows; keys and values are the recorded full map with the active rows written in
(``kv="cached"``, accurate) or the active rows alone (``kv="active"``, the paper's "approximate attention", no traffic).
Cross-attention needs no cache: every query row sees the whole text.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.attention import Attention, match_attention
from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.ir import Rows, aten, fisedit, is_op, layout_of, tensor
from fisedit.passes.layout import LayoutError
from fisedit.runtime.plan import Table


def sparsify_attention(gm: GraphModule, kv: str = "cached") -> PassResult:
    graph, matched, refused = gm.graph, 0, []
    for node in list(graph.nodes):
        if not is_op(node, aten.scaled_dot_product_attention.default) or layout_of(node) is None:
            continue
        try:
            attention = match_attention(node)
        except LayoutError as error:
            refused.append(Refusal(node.name, str(error)))
            continue
        _sparsify(graph, node, attention, kv)
        matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched, tuple(refused))


def split_heads(graph: Graph, value: Node, heads: int, batch: int) -> Node:
    """A key or value over text, ``[B, h, L, d]``, ``[B*h, L, d]`` or ``[B, L, d]``, as ``[B, h, L, d]``."""
    shape = [int(s) for s in tensor(value).shape]
    if len(shape) == 4:
        return value
    return rows.reshape(graph, value, [batch, heads, shape[-2], shape[-1]])


def split_mask(graph: Graph, mask: Node | None, heads: int, batch: int) -> Node | None:
    """An attention mask as something that broadcasts to ``[B, h, N, L]``."""
    if mask is None:
        return None
    shape = [int(s) for s in tensor(mask).shape]
    if len(shape) != 3:
        return mask
    lead = [batch, heads] if shape[0] == batch * heads else [shape[0], 1]
    return rows.reshape(graph, mask, [*lead, *shape[1:]])


def _sparsify(graph: Graph, node: Node, attention: Attention, kv: str) -> None:
    layout = layout_of(attention.query)
    out_layout = layout_of(node)
    assert layout is not None and out_layout is not None
    heads, batch = attention.heads, layout.batch
    with graph.inserting_before(node):
        query = rows.pack(graph, attention.query)
        if attention.over_positions:
            key, value = (_row_heads(graph, operand, heads, kv) for operand in (attention.key, attention.value))
        else:
            key, value = (split_heads(graph, o, heads, batch) for o in (attention.key, attention.value))
        mask = split_mask(graph, attention.mask, heads, batch)
        arguments: tuple[Any, ...] = (query, key, value, mask, heads, attention.scale)
        if attention.over_positions and kv == "active":
            arguments += (rows.table(graph, Table("count", layout.level)),)
        sparse = rows.call(graph, fisedit.row_attention.default, arguments, rows=Rows.of(out_layout))
        rows.replace(graph, node, sparse)


def _row_heads(graph: Graph, operand: Node, heads: int, kv: str) -> Node:
    """Keys or values of self-attention as ``[B, h, R or N, d]``."""
    layout = layout_of(operand)
    assert layout is not None
    active = rows.pack(graph, operand)
    if kv == "cached":
        index = rows.table(graph, Table("active", layout.level))
        recorded = rows.call(graph, fisedit.recorded.default, (operand,))  # [B, R, h*d]
        active = rows.call(graph, fisedit.scatter_rows.default, (recorded, index, active))  # [B, R, h*d]
    split = rows.reshape(graph, active, [layout.batch, -1, heads, layout.channels // heads])
    split.meta["converts"] = True
    return rows.permute(graph, split, (0, 2, 1, 3))  # [B, h, R or N, d]
