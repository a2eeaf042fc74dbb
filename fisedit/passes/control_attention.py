"""Cross-attention control for the detect graph: kept words look where they looked in the recorded run.

Prompt-to-Prompt's word swap and refinement: for each text token that aligns with one of the recorded prompt, its
attention map is the recorded one (computed again from the recorded queries and keys, which are smaller than the maps).
Adds the inputs ``control_index`` (int64 ``[B, L]``, the recorded token) and ``control_weight`` (``[B, L]``, 1 keeps).
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.attention import Attention, match_attention
from fisedit.passes.base import PassResult
from fisedit.passes.ir import aten, fisedit, is_op, layout_of, tensor
from fisedit.passes.layout import LayoutError
from fisedit.passes.slots import Slot
from fisedit.passes.sparsify_attention import split_heads, split_mask

CONTROLS = ("control_index", "control_weight")


def control_attention(gm: GraphModule) -> PassResult:
    graph, found = gm.graph, []
    text = next((node for node in graph.nodes if node.meta.get("role") == "text"), None)
    for node in graph.nodes:
        if is_op(node, aten.scaled_dot_product_attention.default) and layout_of(node) is not None:
            try:
                attention = match_attention(node)
            except LayoutError:
                continue
            if not attention.over_positions and text is not None and _reads_text(attention.key, text):
                found.append((node, attention))
    if not found:
        return PassResult(0)
    with graph.inserting_before(next(iter(graph.nodes))):
        controls = [graph.placeholder(name) for name in CONTROLS]
    for node, attention in found:
        _control(graph, node, attention, controls)
    return PassResult(len(found))


def _reads_text(key: Node, text: Node) -> bool:
    """Whether there is one key per text token. An adapter's attention over a picture's tokens is not controlled."""
    seen, pending = {key}, [key]
    while pending:
        fresh = set(pending.pop().all_input_nodes) - seen
        seen |= fresh
        pending += fresh
    return text in seen and tensor(key).shape[-2] == tensor(text).shape[1]


def _control(graph: Graph, node: Node, attention: Attention, controls: list[Node]) -> None:
    layout, out_layout = layout_of(attention.query), layout_of(node)
    assert layout is not None and out_layout is not None
    heads, batch = attention.heads, layout.batch
    with graph.inserting_before(node):
        query = rows.dense_to_rows(graph, attention.query, layout)
        key, value = (split_heads(graph, operand, heads, batch) for operand in (attention.key, attention.value))
        query_recorded = _load(graph, Slot("rows", attention.query.meta["origin"]), attention.query)
        key_recorded = _load(graph, Slot("text", attention.key.meta["origin"]), attention.key)
        key_recorded = split_heads(graph, key_recorded, heads, batch)
        mask = split_mask(graph, attention.mask, heads, batch)
        out = graph.call_function(
            fisedit.controlled_attention.default,
            (query, key, value, mask, query_recorded, key_recorded, *controls, heads, attention.scale),
        )
        out.meta["converts"] = True
        dense = rows.rows_to_dense(graph, out, out_layout)
    dense.meta = dict(node.meta)
    node.replace_all_uses_with(dense)
    graph.erase_node(node)


def _load(graph: Graph, slot: Slot, like: Node) -> Node:
    load = graph.call_function(fisedit.cache_load.default, (slot.key,))
    load.meta["val"] = like.meta["val"]
    return load
