"""Count the multiply-accumulates of one call of a graph: convolutions, linear layers, attention, matrix products.

Counts what a graph would execute, from its types and (for a packed graph) the tables of a mask. What runs once per
edit is left out.
"""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Graph, Node

from fisedit.passes.fused import get
from fisedit.passes.ir import PRODUCTS, args, aten, bound_arguments, fisedit, rows_of, tensor
from fisedit.runtime.plan import MaskPlan


def count_macs(graph: Graph, plan: MaskPlan | None = None) -> int:
    """Multiply-accumulates of one call.

    Args:
        graph: a canonical (dense) graph, or an edit graph before it is cut into stages.
        plan: the mask's tables, for an edit graph.
    """
    return sum(_count(node, plan) for node in graph.nodes if node.meta.get("stage") not in ("weights", "edit"))


def _count(node: Node, plan: MaskPlan | None) -> int:
    if node.op != "call_function":
        return 0
    if node.target is fisedit.sparse_conv.default:
        return _sparse_conv(node, plan)
    if node.target is fisedit.row_attention.default:
        return _row_attention(node, plan)
    if node.target in PRODUCTS:
        rows = rows_of(node)
        assert plan is not None and rows is not None
        number, text = rows.batch * plan.rows(rows.level), node.kwargs.get("key")
        attended = 2 * rows.channels * _text_length(text) if text is not None else 0
        return number * (math.prod(_weight_shape(get(node, "weight"))) + attended)
    if node.target is fisedit.attend_rows.default:
        return _attend_rows(node, plan)
    if node.target is aten.linear.default:
        weight = _weight_shape(args(node)[1])
        return _leading(node, plan, weight[0]) * weight[0] * weight[1]
    if "val" not in node.meta:
        return 0
    if node.target is aten.conv2d.default:
        return tensor(node).numel() * math.prod(tensor(bound_arguments(node)["weight"]).shape[1:])
    if node.target is aten.scaled_dot_product_attention.default:
        query, key, value = (tensor(argument).shape for argument in args(node)[:3])
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if node.target in (aten.bmm.default, aten.matmul.default, aten.mm.default):
        return tensor(node).numel() * tensor(args(node)[0]).shape[-1]
    return 0


def _leading(node: Node, plan: MaskPlan | None, width: int) -> int:
    """How many vectors a linear layer multiplies."""
    rows = rows_of(node)
    if rows is None or plan is None:
        return tensor(node).numel() // width
    return rows.batch * plan.rows(rows.level) * rows.channels // width


def _weight_shape(weight: Any) -> tuple[int, int]:
    """``(out, in)`` of a linear layer's weight, or of a convolution's that a pass has packed."""
    if "val" in weight.meta:
        shape = tensor(weight).shape
        return int(shape[0]), math.prod(int(s) for s in shape[1:])
    return _weight_shape(args(weight)[0])


def _sparse_conv(node: Node, plan: MaskPlan | None) -> int:
    assert plan is not None
    rows, geometry = rows_of(node), args(node)[2].meta["table"].of
    neighbors = plan.table(args(node)[2].meta["table"])
    assert rows is not None and neighbors is not None
    tile = plan.tiles[geometry]
    weight = _weight_shape(args(node)[4])
    return rows.batch * neighbors.shape[1] * tile[0] * tile[1] * weight[0] * weight[1]


def _row_attention(node: Node, plan: MaskPlan | None) -> int:
    assert plan is not None
    rows = rows_of(node)
    assert rows is not None
    key: Any = args(node)[1]
    while not ("val" in key.meta or "rows" in key.meta or key.target is fisedit.scatter_rows.default):
        key = args(key)[0]
    if key.target is fisedit.scatter_rows.default:
        length = rows.level[0] * rows.level[1]
    elif rows_of(key) is not None:
        length = plan.rows(rows.level)
    else:
        length = _text_length(key)
    return rows.batch * plan.rows(rows.level) * length * rows.channels * 2


def _attend_rows(node: Node, plan: MaskPlan | None) -> int:
    rows, (_, key, _, _, _, table, _, key_count, *_) = rows_of(node), args(node)
    assert plan is not None and rows is not None
    number = plan.rows(rows.level)
    if table is not None:
        length = rows.level[0] * rows.level[1]
    else:
        length = number if key_count is not None else _text_length(key)
    return rows.batch * number * length * rows.channels * 2


def _text_length(key: Any) -> int:
    """Of keys that a pass has reshaped, too."""
    return int(tensor(key).shape[-2]) if "val" in key.meta else _text_length(args(key)[0])
