"""One form for what models write in several: fewer ops for the passes after this one to know."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit.passes.base import PassResult
from fisedit.passes.ir import args, aten, bound_arguments, is_op, tensor

FILLED: dict[Any, int] = {
    aten.new_zeros.default: 0, aten.zeros_like.default: 0, aten.new_ones.default: 1, aten.ones_like.default: 1,
}  # fmt: skip
VIEWS = (aten.view.default, aten.reshape.default)
OTHER_VIEWS = (aten.view_as.default, aten.reshape_as.default, aten._unsafe_view.default)
MOVES = (
    aten.mT.default, aten.numpy_T.default, aten.swapaxes.default, aten.swapdims.default, aten.movedim.int,
    aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist,
)  # fmt: skip
"""Other names of permute."""


def canonicalize_ops(gm: GraphModule) -> PassResult:
    graph, matched = gm.graph, 0
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
        if rewrite is None:
            continue
        with graph.inserting_before(node):
            new = rewrite(graph, node)
        if new is not None:
            new.meta = {**node.meta, **new.meta}
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched)


def _filled(graph: Graph, node: Node) -> Node:
    """``new_zeros`` and its like depend on the shape alone: a constant, so that the map is not needed for it."""
    value = tensor(node)
    kwargs: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    return graph.call_function(aten.full.default, (list(value.shape), FILLED.get(node.target, 0)), kwargs)


def _same_padding(graph: Graph, node: Node) -> Node:
    """``padding="same"`` or ``"valid"`` as numbers; where the two sides differ, the right one is padded before."""
    bound = bound_arguments(node)
    dilation = [int(d) for d in (*bound["dilation"], *bound["dilation"])]  # one value stands for both
    kernel = tensor(bound["weight"]).shape[2:]
    total = [0, 0] if bound["padding"] == "valid" else [dilation[i] * (kernel[i] - 1) for i in (0, -1)]
    source = bound["input"]
    if total[0] % 2 or total[1] % 2:
        pad = [0, total[1] % 2, 0, total[0] % 2]
        source = graph.call_function(aten.pad.default, (source, pad))
        source.meta = {**bound["input"].meta, "val": aten.pad.default(tensor(bound["input"]), pad)}
    arguments = (source, bound["weight"], bound["bias"], bound["stride"], [t // 2 for t in total], bound["dilation"])
    return graph.call_function(aten.conv2d.default, (*arguments, bound["groups"]))


def _instance_norm(graph: Graph, node: Node) -> Node | None:
    """Instance normalization by its own statistics is group normalization with a channel per group."""
    bound = bound_arguments(node)
    if bound["running_mean"] is not None and not bound["use_input_stats"]:
        return None
    channels = int(tensor(node).shape[1])
    arguments = (bound["input"], channels, bound["weight"], bound["bias"], bound["eps"])
    return graph.call_function(aten.group_norm.default, arguments)


def _no_padding(graph: Graph, node: Node) -> None:
    if not any(args(node)[1]):
        node.replace_all_uses_with(args(node)[0])


def _batch_norm(graph: Graph, node: Node) -> None:
    """Batch normalization in eval mode, as functionalization leaves it: with statistics that nobody reads."""
    if any(not is_op(user, operator.getitem) or args(user)[1] != 0 for user in node.users):
        return
    *operands, momentum, eps = args(node)
    for user in list(node.users):
        norm = graph.call_function(aten.batch_norm.default, (*operands, False, momentum, eps, False))
        norm.meta = dict(user.meta)
        user.replace_all_uses_with(norm)


def _expand_as(graph: Graph, node: Node) -> Node:
    return graph.call_function(aten.expand.default, (args(node)[0], list(tensor(node).shape)))


def _type_as(graph: Graph, node: Node) -> Node:
    return graph.call_function(aten.to.dtype, (args(node)[0], tensor(node).dtype))


def _cat_of_one(graph: Graph, node: Node) -> Node | None:
    """``cat`` leaves out what has no element: a place for conditions that a call does not give."""
    parts = [part for part in bound_arguments(node)["tensors"] if tensor(part).numel()]
    return graph.call_function(aten.alias.default, (parts[0],)) if len(parts) == 1 else None


def _moved(graph: Graph, node: Node) -> Node:
    target: Any = node.target
    numbered = torch.empty(tuple(range(tensor(args(node)[0]).dim())), device="meta")  # dimension i has size i
    return graph.call_function(aten.permute.default, (args(node)[0], list(target(numbered, *args(node)[1:]).shape)))


def _narrow(graph: Graph, node: Node) -> Node:
    source, dim, start, length = args(node)
    start = start if start >= 0 else start + int(tensor(source).shape[dim])
    return graph.call_function(aten.slice.Tensor, (source, dim, start, start + length))


def _einsum_with_weight(graph: Graph, node: Node) -> Node | None:
    """``"...c,cd->...d"``: a matrix product over the last dimension."""
    inputs, _, out = str(args(node)[0]).replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    if "." in inputs or len(right) != 2 or len(left) < 3 or right[0] != left[-1] or out != left[:-1] + right[1]:
        return None
    return graph.call_function(aten.matmul.default, tuple(args(node)[1]))


def _reshape(graph: Graph, node: Node) -> Node | None:
    """Pixel unshuffle written out, or a reshape: a rewritten attention leaves other strides than a view may ask for."""
    unshuffle = _space_to_depth(graph, node)
    if unshuffle is not None or is_op(node, aten.reshape.default):
        return unshuffle
    return graph.call_function(aten.reshape.default, (args(node)[0], list(tensor(node).shape)))


def _space_to_depth(graph: Graph, node: Node) -> Node | None:
    """``view [B, C, h, r, w, r]``, permute, ``view [B, C*r*r, h, w]``: pixel unshuffle written out."""
    permute = args(node)[0]
    if not is_op(permute, aten.permute.default) or not is_op(args(permute)[0], *VIEWS):
        return None
    split = args(permute)[0]
    source, order = args(split)[0], [int(d) for d in args(permute)[1]]
    shape, whole = [int(s) for s in tensor(split).shape], [int(s) for s in tensor(source).shape]
    if order != [0, 1, 3, 5, 2, 4] or len(whole) != 4:
        return None
    batch, channels, height, rows, width, columns = shape
    fits = whole == [batch, channels, height * rows, width * columns] and rows == columns
    if not fits or list(tensor(node).shape) != [batch, channels * rows * rows, height, width]:
        return None
    return graph.call_function(aten.pixel_unshuffle.default, (source, rows))


_REWRITES: dict[Any, Callable[[Graph, Node], Node | None]] = {
    **dict.fromkeys(FILLED, _filled),
    **dict.fromkeys((*VIEWS, *OTHER_VIEWS), _reshape),
    **dict.fromkeys(MOVES, _moved),
    aten.conv2d.padding: _same_padding,
    aten.instance_norm.default: _instance_norm,
    aten.pad.default: _no_padding,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.expand_as.default: _expand_as,
    aten.type_as.default: _type_as,
    aten.cat.default: _cat_of_one,
    aten.narrow.default: _narrow,
    aten.einsum.default: _einsum_with_weight,
}
