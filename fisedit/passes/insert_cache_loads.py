"""Turn what the sparse graph needs of the recorded run into explicit ``cache_load`` nodes.

A halo, or a full map of keys and values, of a packed value comes from its cache slot; that of a value which is dense
anyway (the input, a dense island) is gathered from it. An ``unpack`` that is still used writes its rows into the
recorded map. With ``store=True`` the active rows of every slot are also stored, so that the edit can itself be edited.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult
from fisedit.passes.ir import Rows, args, fisedit, is_op, layout_of, tensor
from fisedit.passes.slots import Slot
from fisedit.runtime.plan import Table


def insert_cache_loads(gm: GraphModule, store: Iterable[Slot] = ()) -> PassResult:
    graph, matched = gm.graph, 0
    packed = {node.meta["origin"]: args(node)[0] for node in graph.nodes if is_op(node, fisedit.unpack.default)}
    _insert_stores(graph, store, packed)
    for node in list(graph.nodes):
        if is_op(node, fisedit.halo.default, fisedit.recorded.default):
            with graph.inserting_before(node):
                _replace(graph, node, _recorded_rows(graph, *node.args))
            matched += 1
    for node in list(graph.nodes):
        if is_op(node, fisedit.unpack.default) and node.users:
            with graph.inserting_before(node):
                _replace(graph, node, _scatter(graph, node))
            matched += 1
        elif is_op(node, fisedit.pack.default):
            with graph.inserting_before(node):
                _replace(graph, node, _gather(graph, node))
    graph.eliminate_dead_code()
    return PassResult(matched)


def loaded_slots(graph: Graph) -> set[Slot]:
    """The slots that a graph reads."""
    reads = (fisedit.cache_load.default, fisedit.cache_view.default)
    return {Slot.parse(args(node)[0]) for node in graph.nodes if is_op(node, *reads)}


def _replace(graph: Graph, node: Node, new: Node) -> None:
    for key in ("rows", "nn_module_stack", "origin", "layout"):
        if key in node.meta:
            new.meta.setdefault(key, node.meta[key])
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _recorded_rows(graph: Graph, dense: Node, index: Node | None = None) -> Node:
    """Rows ``index`` (all, if None) of a dense value: ``[B, H or R, C]``."""
    if is_op(dense, fisedit.unpack.default):
        return _load(graph, dense, index)
    layout = layout_of(dense)
    assert layout is not None
    full = rows.dense_to_rows(graph, dense, layout)
    return full if index is None else graph.call_function(fisedit.gather_rows.default, (full, index))


def _load(graph: Graph, unpack: Node, *index: Node | None) -> Node:
    layout = layout_of(unpack)
    assert layout is not None
    load = graph.call_function(fisedit.cache_load.default, (Slot("rows", unpack.meta["origin"]).key, *index))
    shape = (layout.batch, layout.level[0] * layout.level[1], layout.channels)
    load.meta["recorded"] = torch.empty(shape, dtype=tensor(unpack).dtype, device="meta")
    return load


def _scatter(graph: Graph, unpack: Node) -> Node:
    layout, packed = layout_of(unpack), args(unpack)[0]
    assert layout is not None
    recorded, index = _load(graph, unpack), rows.table(graph, Table("active", layout.level))
    full = graph.call_function(fisedit.scatter_rows.default, (recorded, index, packed))  # [B, R, C]
    full.meta["rows"] = packed.meta["rows"]
    return rows.rows_to_dense(graph, full, layout)


def _gather(graph: Graph, pack: Node) -> Node:
    layout, dense = pack.meta["packs"], args(pack)[0]
    full = rows.dense_to_rows(graph, dense, layout)
    index = rows.table(graph, Table("active", layout.level))
    return graph.call_function(fisedit.gather_rows.default, (full, index))  # [B, N, C]


def _insert_stores(graph: Graph, slots: Iterable[Slot], packed: dict[str, Node]) -> None:
    """Store the active rows of every slot; statistics stay the recorded run's."""
    by_origin = {node.meta.get("origin"): node for node in graph.nodes if node.op == "call_function"}
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        for slot in sorted(slots):
            if slot.kind in ("mean", "rstd"):
                continue
            if slot.origin in packed:
                value = packed[slot.origin]
                rows.store(graph, value, slot.key, value.meta["rows"])
            elif (layout := layout_of(by_origin[slot.origin])) is not None:
                full = rows.dense_to_rows(graph, by_origin[slot.origin], layout)
                index = rows.table(graph, Table("active", layout.level))
                active = graph.call_function(fisedit.gather_rows.default, (full, index))
                rows.store(graph, active, slot.key, Rows.of(layout))
            else:
                rows.store(graph, by_origin[slot.origin], slot.key)
