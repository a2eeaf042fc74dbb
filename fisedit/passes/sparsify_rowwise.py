"""Run row-wise ops on active rows: pointwise ops, linear, normalization over channels, concatenation, splits, views.

A view or permute that only changes the layout of the same rows disappears.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.infer_domains import (
    EXPANDS,
    PERMUTES,
    POINTWISE_EXTRA,
    REDUCTIONS,
    SOFTMAXES,
    SPLITS,
    VIEWS,
    is_pointwise,
    reduced_dims,
)
from fisedit.passes.ir import Rows, args, aten, bound_arguments, fisedit, is_op, layout_of, tensor
from fisedit.passes.layout import Layout, LayoutError

SAME_ROWS = VIEWS | PERMUTES | {aten.contiguous.default, aten.clone.default, aten.alias.default}


def sparsify_rowwise(gm: GraphModule) -> PassResult:
    graph, matched, refused = gm.graph, 0, []
    for node in list(graph.nodes):
        if node.op != "call_function" or layout_of(node) is None or "island" in node.meta:
            continue
        rewrite = _rewriter(node)
        if rewrite is None:
            continue
        try:
            with graph.inserting_before(node):
                packed = rewrite(graph, node)
                if packed is not None:
                    rows.replace(graph, node, packed)
            matched += 1
        except LayoutError as error:
            node.meta["island"] = str(error)
            refused.append(Refusal(node.name, str(error)))
    _keep_background(graph)
    graph.eliminate_dead_code()
    return PassResult(matched, tuple(refused))


def _keep_background(graph: Graph) -> None:
    """A result that is dense takes its active rows only, like all others: the rest is the recorded run's."""
    output = graph.output_node()
    for node in output.all_input_nodes:
        layout = layout_of(node)
        if layout is None or is_op(node, fisedit.unpack.default):
            continue
        with graph.inserting_before(output):
            unpack = graph.call_function(fisedit.unpack.default, (rows.pack(graph, node),))
        unpack.meta = {"layout": layout, "origin": node.meta["origin"], "val": node.meta["val"]}
        output.replace_input_with(node, unpack)


def _rewriter(node: Node) -> Callable[[Graph, Node], Node | None] | None:
    target: Any = node.target
    if target in SAME_ROWS:
        return _same_rows
    if target in (aten.linear.default, aten.matmul.default, aten.layer_norm.default, aten.rms_norm.default):
        return _last_dim
    if target is aten.conv1d.default:
        return _conv1d
    if target is aten.batch_norm.default:
        return _batch_norm
    if target in REDUCTIONS or target in SOFTMAXES:
        return _over_channels
    if target in EXPANDS:
        return _expand
    if target is aten.select.int:
        return _select
    if target in (aten.cat.default, aten.concat.default):
        return _cat
    if target in SPLITS or target is aten.unbind.int:
        return _split
    if target is operator.getitem:
        return None
    if target is aten.slice.Tensor:
        return _slice
    if target in POINTWISE_EXTRA or is_pointwise(target):
        return _pointwise
    return None


def _same_rows(graph: Graph, node: Node) -> Node:
    return rows.pack(graph, args(node)[0])


def _pointwise(graph: Graph, node: Node) -> Node:
    layout = layout_of(node)
    assert layout is not None
    layouts = [own for arg in node.all_input_nodes if (own := layout_of(arg)) is not None]
    # An operand that has some channel dimensions and broadcasts over others keeps them apart.
    apart = any(own.channels not in (1, layout.channels) for own in layouts)

    def convert(arg: Any) -> Any:
        if not isinstance(arg, Node):
            return arg
        own = layout_of(arg)
        packed = _operand(graph, arg, layout) if own is None else rows.pack(graph, arg)
        if not apart:
            return packed
        if own is None:
            raise LayoutError("operands broadcast over different parts of the channels")
        return rows.reshape(graph, packed, [own.batch, -1, *own.factors_under(layout)])

    args = [convert(arg) for arg in node.args]
    kwargs = {key: convert(value) for key, value in node.kwargs.items() if key != "memory_format"}
    out = rows.call(graph, node.target, args, kwargs, Rows.of(layout))
    return rows.reshape(graph, out, [layout.batch, -1, layout.channels]) if apart else out


def _operand(graph: Graph, value: Node, layout: Layout) -> Node:
    """A pointwise operand that inference saw no positions in: broadcast it, or pack it if it has one value each."""
    shape = tuple(int(s) for s in tensor(value).shape)
    aligned = (1,) * (len(layout.dims) - len(shape)) + shape
    dims = tuple(dim if size != 1 else () for dim, size in zip(layout.dims, aligned, strict=True))
    spatial = Layout(dims)
    if not any(atom.spatial for atom in spatial.atoms):
        return rows.broadcast_to_rows(graph, value, layout)
    if sum(atom.spatial for atom in spatial.atoms) != 2 or spatial.shape != aligned:
        raise LayoutError("an operand with a value per line of the map")
    if spatial.channels not in (1, layout.channels):
        raise LayoutError("an operand broadcasts over a part of the channels")
    return rows.pack(graph, value, spatial)


def _with_dims(graph: Graph, packed: Node, layout: Layout) -> Node:
    """Packed rows ``[B, N, C]`` with ``C`` split as the dense value has it: ``[B, N, c1, c2, ...]``."""
    if len(layout.factors) == 1:
        return packed
    return rows.reshape(graph, packed, [layout.batch, -1, *layout.factors])


def _merge_dims(graph: Graph, value: Node, layout: Layout) -> Node:
    if len(layout.factors) == 1:
        return value
    return rows.reshape(graph, value, [layout.batch, -1, layout.channels])


def _last_dim(graph: Graph, node: Node) -> Node:
    source, layout = layout_of(args(node)[0]), layout_of(node)
    assert source is not None and layout is not None
    if source.factor_index(-1) != len(source.factors) - 1:
        raise LayoutError("the last dimension is not the last of the channels")
    value = _with_dims(graph, rows.pack(graph, args(node)[0]), source)
    out = rows.call(graph, node.target, (value, *args(node)[1:]), dict(node.kwargs), Rows.of(layout))
    return _merge_dims(graph, out, layout)


def _conv1d(graph: Graph, node: Node) -> Node:
    """A convolution of width 1 over a row of positions: linear."""
    source, layout, bound = layout_of(args(node)[0]), layout_of(node), bound_arguments(node)
    assert source is not None and layout is not None
    if source.factor_index(1) != len(source.factors) - 1:
        raise LayoutError("the channels are not the last of them")
    value = _with_dims(graph, rows.pack(graph, args(node)[0]), source)
    weight = graph.call_function(aten.squeeze.dim, (bound["weight"], -1))
    weight.meta["val"] = tensor(bound["weight"]).squeeze(-1)
    out = rows.call(graph, aten.linear.default, (value, weight, bound["bias"]), rows=Rows.of(layout))
    return _merge_dims(graph, out, layout)


def _batch_norm(graph: Graph, node: Node) -> Node:
    layout = layout_of(node)
    assert layout is not None
    flat = rows.reshape(graph, rows.pack(graph, args(node)[0]), [-1, layout.channels])  # [B*N, C]
    out = rows.call(graph, node.target, (flat, *args(node)[1:]), dict(node.kwargs))
    return rows.reshape(graph, out, [layout.batch, -1, layout.channels])


def _over_channels(graph: Graph, node: Node) -> Node:
    """A reduction or softmax over some of the channel dimensions."""
    source, layout = layout_of(args(node)[0]), layout_of(node)
    assert source is not None and layout is not None
    value = rows.reshape(graph, rows.pack(graph, args(node)[0]), [source.batch, -1, *source.factors])
    dims = [2 + source.factor_index(dim) for dim in reduced_dims(node)]
    kwargs = {key: given for key, given in bound_arguments(node).items() if key != "self"}
    kwargs["dim"] = dims[0] if node.target in SOFTMAXES else dims
    out = rows.call(graph, node.target, (value,), kwargs, Rows.of(layout))
    return rows.reshape(graph, out, [layout.batch, -1, layout.channels])


def _expand(graph: Graph, node: Node) -> Node:
    source, layout = layout_of(args(node)[0]), layout_of(node)
    assert source is not None and layout is not None
    value = rows.reshape(graph, rows.pack(graph, args(node)[0]), [layout.batch, -1, *source.factors_under(layout)])
    value = rows.call(graph, aten.expand.default, (value, [-1, -1, *layout.factors]), rows=Rows.of(layout))
    return rows.reshape(graph, value, [layout.batch, -1, layout.channels])


def _select(graph: Graph, node: Node) -> Node:
    source, layout, bound = layout_of(args(node)[0]), layout_of(node), bound_arguments(node)
    assert source is not None and layout is not None
    value = rows.reshape(graph, rows.pack(graph, args(node)[0]), [source.batch, -1, *source.factors])
    arguments = (value, 2 + source.factor_index(bound["dim"]), bound["index"])
    out = rows.call(graph, aten.select.int, arguments, rows=Rows.of(layout))
    return rows.reshape(graph, out, [layout.batch, -1, layout.channels])


def _cat(graph: Graph, node: Node) -> Node:
    layout = layout_of(node)
    assert layout is not None
    bound = bound_arguments(node)
    dim = layout.factor_index(bound["dim"])
    parts = []
    for part in bound["tensors"]:
        own = layout_of(part)
        assert own is not None
        parts.append(_with_dims(graph, rows.pack(graph, part), own))
    out = rows.call(graph, aten.cat.default, (parts, 2 + dim), rows=Rows.of(layout))
    return _merge_dims(graph, out, layout)


def _split(graph: Graph, node: Node) -> None:
    """Split packed rows; each part that is used is unpacked in its own place."""
    source = layout_of(args(node)[0])
    assert source is not None
    bound = bound_arguments(node)
    dim = 2 + source.factor_index(bound["dim"])
    value = _with_dims(graph, rows.pack(graph, args(node)[0]), source)
    arguments = (value, dim) if is_op(node, aten.unbind.int) else (value, args(node)[1], dim)
    split = rows.call(graph, node.target, arguments, rows=Rows.of(source))
    for part in list(node.users):
        if not is_op(part, operator.getitem) or layout_of(part) is None:
            raise LayoutError("a part of a split is used as a whole")
        layout = layout_of(part)
        assert layout is not None
        with graph.inserting_before(part):
            taken = rows.call(graph, operator.getitem, (split, args(part)[1]), rows=Rows.of(layout))
            rows.replace(graph, part, rows.reshape(graph, taken, [layout.batch, -1, layout.channels]))
    graph.erase_node(node)


def _slice(graph: Graph, node: Node) -> Node:
    source, layout = layout_of(args(node)[0]), layout_of(node)
    assert source is not None and layout is not None
    if source.shape == layout.shape:
        return rows.pack(graph, args(node)[0])
    bound = bound_arguments(node)
    dim = 2 + source.factor_index(bound["dim"])
    value = _with_dims(graph, rows.pack(graph, args(node)[0]), source)
    arguments = (value, dim, bound["start"], bound["end"], bound["step"])
    return _merge_dims(graph, rows.call(graph, aten.slice.Tensor, arguments, rows=Rows.of(layout)), layout)
