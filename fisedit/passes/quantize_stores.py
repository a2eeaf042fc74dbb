"""Store rows in 8 bits, with a scale for each row: half of what recordings hold and of what edits fetch."""

from __future__ import annotations

import operator
from collections.abc import Container

from torch.fx import GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.ir import args, fisedit, is_op, tensor
from fisedit.runtime.cache.block import SCALE

NARROWEST = 32
"""Channels from which on quantized rows, with their scales, are clearly smaller."""


def quantize_stores(gm: GraphModule, slots: Container[str] = ()) -> PassResult:
    """Quantize what is stored in ``slots``; an edit gets the values back in their own dtype."""
    graph, matched, refused = gm.graph, 0, []
    for node in list(graph.nodes):
        if not is_op(node, fisedit.cache_store.default) or args(node)[1] not in slots or "dtype" in node.meta:
            continue
        kind = node.meta.get("stores")
        if kind is None or kind.channels < NARROWEST:
            refused.append(Refusal(node.name, "no rows" if kind is None else f"rows of {kind.channels} channels"))
            continue
        value, slot = args(node)
        with graph.inserting_before(node):
            both = graph.call_function(fisedit.quantize_rows.default, (value,))
            quantized, scales = (graph.call_function(operator.getitem, (both, part)) for part in (0, 1))
            both.meta["converts"] = True
            for part, name in ((quantized, slot), (scales, SCALE + slot)):
                rows.store(graph, part, name, kind)
        for stored in (user for part in (quantized, scales) for user in part.users):
            stored.meta["dtype"] = _dtype(value)
        graph.erase_node(node)
        matched += 1
    return PassResult(matched, tuple(refused))


def _dtype(node: Node) -> object:
    """The dtype of a value: its own, or that of what it is made of by views."""
    while "val" not in node.meta:
        node = node.all_input_nodes[0]
    return tensor(node).dtype
