"""Let rows that a dense graph stores be views of the maps that its convolutions read."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from fisedit.passes.base import PassResult
from fisedit.passes.ir import aten, fisedit, is_op, layout_of
from fisedit.passes.layout import Kind, Layout


def share_stored_maps(gm: GraphModule) -> PassResult:
    """Make every map ``[B, C, H, W]`` whose rows are stored channels-last: its rows ``[B, R, C]`` are then a view.

    For graphs that are compiled for a GPU, where convolutions read channels-last maps anyway: storing costs no copy.
    """
    shared = 0
    for node in list(gm.graph.nodes):
        source = _stored_map(node)
        if source is None or is_op(source, aten.contiguous.default):
            continue
        with gm.graph.inserting_after(source):
            layout: dict[str, Any] = {"memory_format": torch.channels_last}
            copy = gm.graph.call_function(aten.contiguous.default, (source,), layout)
        copy.meta = dict(source.meta)
        for user in list(source.users):
            if user is not copy:
                user.replace_input_with(source, copy)
        shared += 1
    return PassResult(shared)


def _stored_map(node: Node) -> Node | None:
    """The map whose rows ``node`` copies so that they are stored in one piece."""
    if not is_op(node, aten.contiguous.default) or not any(is_op(u, fisedit.cache_store.default) for u in node.users):
        return None
    source = cast(Node, node.args[0])
    while is_op(source, aten.reshape.default, aten.permute.default):
        source = cast(Node, source.args[0])
    return source if _is_map(layout_of(source)) else None


def _is_map(layout: Layout | None) -> bool:
    """Whether the dimensions are batch, channels, y and x; keys of several heads have four, too."""
    if layout is None or len(layout.dims) != 4:
        return False
    kinds = [{atom.kind for atom in dim} for dim in layout.dims]
    return kinds[0] <= {Kind.BATCH} and kinds[1] <= {Kind.OTHER} and kinds[2:] == [{Kind.Y}, {Kind.X}]
