"""All group normalizations' scales and offsets in one launch, for they depend on the recording and the time only.

What is left of each normalization is a multiply-add per row, which ``fuse_epilogues`` puts behind the product that
makes the rows. Samples whose rows of a level are all active renew both from their own statistics (``renew_affine``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult
from fisedit.passes.fuse_linear import two_sources
from fisedit.passes.fused import ancestors, count, hoist, take_over
from fisedit.passes.ir import args, aten, fisedit, is_op, rows_of
from fisedit.passes.read_in_place import view
from fisedit.passes.remove_identities import is_flat
from fisedit.runtime.plan import Table


def batch_group_norms(gm: GraphModule) -> PassResult:
    graph = gm.graph
    norms = [node for node in graph.nodes if is_op(node, fisedit.group_norm_rows.default) and is_flat(node)]
    if not norms:
        return PassResult(0)
    first = next(node for node in graph.nodes if rows_of(node) is not None)
    for node in norms:
        _settle_shift(graph, node)
    hoist(graph, [args(node)[5] for node in norms if args(node)[5] is not None], first)
    for node in norms:
        for operand in args(node)[3:5]:
            if operand is not None and operand.op != "get_attr":
                hoist(graph, [operand], first)
    with graph.inserting_before(first):
        affine = _fold(graph, norms)
    offset = 0
    for node in norms:
        kind = rows_of(node)
        assert kind is not None
        with graph.inserting_before(node):
            own = graph.call_function(aten.slice.Tensor, (affine, 2, offset, offset + kind.channels))  # [2, B, C]
            take_over(graph, node, _normalize(graph, node, own))
        offset += kind.channels
    graph.eliminate_dead_code()
    return PassResult(len(norms))


def _settle_shift(graph: Graph, node: Node) -> None:
    """A shift that is computed from the image cannot be known beforehand: add it to the rows instead."""
    shift = args(node)[5]
    if shift is None or all(rows_of(a) is None and not is_op(a, fisedit.cache_load.default, fisedit.table.default)
                            for a in ancestors([shift])):  # fmt: skip
        return
    with graph.inserting_before(node):
        moved = rows.call(graph, aten.add.Tensor, (args(node)[0], shift), rows=rows_of(node))
    node.args = (moved, *args(node)[1:5], None, *args(node)[6:])


def _fold(graph: Graph, norms: list[Node]) -> Node:
    kinds = [rows_of(node) for node in norms]
    channels = [kind.channels for kind in kinds if kind is not None]
    views = [view(graph, load) for node in norms for load in args(node)[1:3]]
    slots = list(range(len(views)))
    weight, bias = (
        _joined(graph, [args(node)[position] for node in norms], channels, norms, filler)
        for position, filler in ((3, aten.ones.default), (4, aten.zeros.default))
    )
    shift = None
    if any(args(node)[5] is not None for node in norms):
        batch = max(kind.batch for kind in kinds if kind is not None)
        shift = graph.call_function(aten.cat.default, ([_shift(graph, node, batch) for node in norms], -1))  # [B, S]
    groups = [node.meta["groups"] for node in norms]
    arguments = (views, slots[::2], slots[1::2], groups, channels, weight, bias, shift)
    return graph.call_function(fisedit.fold_group_norms.default, arguments)  # [2, B, S]


def _joined(graph: Graph, values: list[Node | None], channels: list[int], norms: list[Node], filler: Any) -> Node:
    """Parameters of all norms, float32 ``[S]``; ones or zeros where a norm has none."""
    device = norms[0].meta["val"].device
    parts = []
    for value, size in zip(values, channels, strict=True):
        if value is None:
            value = graph.call_function(filler, ([size],), {"dtype": torch.float32, "device": device})
        parts.append(graph.call_function(aten.to.dtype, (value, torch.float32)))
    return graph.call_function(aten.cat.default, (parts,))


def _shift(graph: Graph, node: Node, batch: int) -> Node:
    kind, shift = rows_of(node), args(node)[5]
    assert kind is not None
    if shift is None:
        value = node.meta["val"]
        options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
        return graph.call_function(aten.zeros.default, ([batch, kind.channels],), options)
    flat = graph.call_function(aten.expand.default, (shift, [batch, 1, kind.channels]))
    return rows.reshape(graph, flat, [batch, kind.channels])


def _normalize(graph: Graph, node: Node, affine: Node) -> Node:
    packed, _, _, weight, bias, shift, eps = args(node)[:7]
    kind = rows_of(node)
    assert kind is not None
    source, second = two_sources(packed)
    full, counts = rows.table(graph, Table("full", kind.level)), rows.table(graph, Table("counts", kind.level))
    arguments: tuple[Any, ...] = (source, second, affine, full, weight, bias, shift, node.meta["groups"], eps, counts)
    renewed = graph.call_function(fisedit.renew_affine.default, arguments)  # [2, B, C]
    renewed.meta["converts"] = True
    number = count(graph, kind.level)
    return rows.call(graph, fisedit.normalize_rows.default, (source, second, renewed, "none", number, False), rows=kind)
