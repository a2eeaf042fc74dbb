"""Find for every value whether it has one row per position of a level, and in which layout.

Sets ``layout`` on the nodes whose rows can be followed, and ``island`` on ops that mix positions in a way no pass
understands: those run dense on the recorded map with the active rows written into it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from fisedit.passes.attention import match_attention
from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.ir import args, aten, bound_arguments, layout_of, tensor
from fisedit.passes.layout import Kind, Layout, LayoutError

Rule = Callable[[Node], Layout]
_rules: dict[object, Rule] = {}

POINTWISE_EXTRA = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.clone.default,
    aten.contiguous.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
    aten.hardswish.default,
}  # fmt: skip
VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip
PERMUTES = {aten.permute.default, aten.transpose.int}
SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}
EXPANDS = {aten.expand.default}
REDUCTIONS = {
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction, aten.var.dim,
    aten.std.correction, aten.std.dim, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim,
}  # fmt: skip
SOFTMAXES = {aten.softmax.int, aten._softmax.default, aten.log_softmax.int}
UPSAMPLES = {aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default}
POOLS = {aten.avg_pool2d.default, aten.max_pool2d.default, aten.pixel_unshuffle.default}
TRANSPOSED = {aten.conv_transpose2d.input, aten.pixel_shuffle.default}
IN_PLACE = {
    *POOLS, *TRANSPOSED, *SOFTMAXES, *REDUCTIONS, aten.pad.default, aten.cat.default, aten.concat.default,
    aten.scaled_dot_product_attention.default, aten.conv2d.default,
    aten.group_norm.default, aten.layer_norm.default, aten.batch_norm.default,
    aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.vec,
    aten.upsample_bicubic2d.default, aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact2d.default,
    aten.adaptive_avg_pool2d.default, aten.reflection_pad2d.default, aten.replication_pad2d.default,
}  # fmt: skip
"""Ops after which a position is where it was, whatever else they mix. After others (roll, flip, ...) nobody knows."""


def infer_domains(gm: GraphModule) -> PassResult:
    """Annotate the graph. ``matched`` counts spatial values; ``refused`` lists the dense islands."""
    levels = _annotate_inputs(gm)
    matched, refused = len(levels), []
    for node in gm.graph.nodes:
        if node.op != "call_function" or not any(_is_spatial(arg) for arg in node.all_input_nodes):
            continue
        try:
            node.meta["layout"] = _infer(node)
            matched += 1
        except LayoutError as error:
            node.meta["island"] = str(error)
            refused.append(Refusal(node.name, f"{node.target}: {error}"))
            if (anchored := _anchor(node)) is not None:
                node.meta["layout"] = anchored
    _anchor_outputs(gm)
    return PassResult(matched, tuple(refused))


def _annotate_inputs(gm: GraphModule) -> set[tuple[int, int]]:
    """Inputs that are maps ``[B, C, H, W]``: the sample (the first), and those of a size the sample halves down to."""
    levels: set[tuple[int, int]] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, torch.Tensor) or value.dim() != 4:
            continue
        height, width = map(int, value.shape[-2:])
        if not levels:
            while (height, width) not in levels:
                levels.add((height, width))
                height, width = -(-height // 2), -(-width // 2)
        if tuple(value.shape[-2:]) in levels:
            node.meta["layout"] = Layout.of_map(value.shape)
    return levels


def _is_spatial(node: Node) -> bool:
    return layout_of(node) is not None or "layouts" in node.meta


def _infer(node: Node) -> Layout:
    rule = _rules.get(node.target)
    if rule is None and (node.target in POINTWISE_EXTRA or is_pointwise(node.target)):
        rule = _pointwise
    if rule is None:
        raise LayoutError("no pass knows this op")
    layout = rule(node)
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and layout.shape != tuple(value.shape):
        raise LayoutError(f"inferred {layout} for a value of shape {tuple(value.shape)}")
    return layout


def is_pointwise(target: object) -> bool:
    return torch.Tag.pointwise in getattr(target, "tags", ())


def _anchor(node: Node) -> Layout | None:
    """The layout after an island that leaves positions in their place: its input's, or that of a map."""
    value = node.meta.get("val")
    if node.target not in IN_PLACE and not is_pointwise(node.target):
        return None
    source = layout_of(args(node)[0])
    if source is None and (is_pointwise(node.target) or isinstance(args(node)[0], (list, tuple))):
        source = next(layout for arg in node.all_input_nodes if (layout := layout_of(arg)) is not None)
    if source is None or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    if tuple(value.shape) == source.shape:
        return source
    if value.dim() == 4 and value.shape[0] == source.batch and len(source.dims) == 4 and min(value.shape[2:]) > 1:
        return Layout.of_map(value.shape)
    return None


def _anchor_outputs(gm: GraphModule) -> None:
    """What a U-Net returns lies over its sample, whatever happened between."""
    sample = next((layout for node in gm.graph.nodes if (layout := layout_of(node)) is not None), None)
    for node in gm.graph.output_node().all_input_nodes:
        value = node.meta.get("val")
        if sample is None or layout_of(node) is not None or not isinstance(value, torch.Tensor) or value.dim() != 4:
            continue
        if value.shape[0] == sample.batch and tuple(value.shape[2:]) == sample.level:
            node.meta["layout"] = Layout.of_map(value.shape)
            node.meta.setdefault("island", "what it reads lost its positions before")


def _rule(*targets: object) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _rules.update(dict.fromkeys(targets, rule))
        return rule

    return register


def _source(node: Node, index: int = 0) -> Layout:
    layout = layout_of(args(node)[index])
    if layout is None:
        raise LayoutError("the main operand has no positions")
    return layout


def _pointwise(node: Node) -> Layout:
    spatial = [layout for arg in node.all_input_nodes if (layout := layout_of(arg)) is not None]
    shape = tuple(tensor(node).shape)
    full = [layout for layout in spatial if layout.shape == shape]
    if not full:
        raise LayoutError("broadcasting adds dimensions to the positions")
    if any(not full[0].matches(layout) for layout in full):
        raise LayoutError("operands have different layouts")
    for layout in spatial:
        layout.factors_under(full[0])
    return full[0]


@_rule(aten.dropout.default)
def _dropout(node: Node) -> Layout:
    raise LayoutError("dropout is active: call .eval() first")


@_rule(*VIEWS)
def _view(node: Node) -> Layout:
    return _source(node).view(tensor(node).shape)


@_rule(*PERMUTES)
def _permute(node: Node) -> Layout:
    source = _source(node)
    rank = len(source.dims)
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in args(node)[1]]
    else:
        a, b = (int(d) % rank for d in args(node)[1:3])
        order[a], order[b] = order[b], order[a]
    return source.permute(order)


@_rule(aten.linear.default)
def _linear(node: Node) -> Layout:
    source = _source(node)
    if any(layout_of(arg) is not None for arg in args(node)[1:]):
        raise LayoutError("the weight depends on positions")
    source.factor_index(-1)
    return source.with_dim(-1, int(tensor(node).shape[-1]))


@_rule(aten.matmul.default)
def _matmul(node: Node) -> Layout:
    """Rows times a weight matrix."""
    weight = args(node)[1]
    if layout_of(weight) is not None or tensor(weight).dim() != 2:
        raise LayoutError("a product over positions that is no attention")
    return _linear(node)


@_rule(aten.conv1d.default)
def _conv1d(node: Node) -> Layout:
    bound, source = bound_arguments(node), _source(node)
    if tensor(bound["weight"]).shape[2] != 1 or tuple(tensor(node).shape[2:]) != source.shape[2:]:
        raise LayoutError("a convolution along the row of positions")
    if bound["groups"] != 1 or bound["padding"] not in ([0], (0,), 0):
        raise LayoutError("a grouped or padded convolution of width 1")
    source.factor_index(1)
    return source.with_dim(1, int(tensor(node).shape[1]))


@_rule(*REDUCTIONS, *SOFTMAXES)
def _over_channels(node: Node) -> Layout:
    """A reduction or softmax over channel dimensions."""
    source, kept = _source(node), tensor(node).dim() == len(_source(node).dims)
    dims = reduced_dims(node)
    for dim in dims:
        source.factor_index(dim)
    if node.target in SOFTMAXES:
        return source
    left = [() if i in dims else dim for i, dim in enumerate(source.dims) if kept or i not in dims]
    return Layout(tuple(left))


def reduced_dims(node: Node) -> list[int]:
    """The dimensions that a reduction or softmax goes over, not negative."""
    bound, rank = bound_arguments(node), tensor(args(node)[0]).dim()
    dims = bound["dim"]
    dims = list(range(rank)) if dims is None or dims == [] else dims if isinstance(dims, (list, tuple)) else [dims]
    return sorted(int(dim) % rank for dim in dims)


@_rule(aten.batch_norm.default)
def _batch_norm(node: Node) -> Layout:
    source = _source(node)
    if bound_arguments(node)["training"]:
        raise LayoutError("normalizes with the statistics of this batch")
    if source.factor_index(1) != 0 or len(source.factors) != 1:
        raise LayoutError("batch_norm over something that is not [B, C, positions]")
    return source


@_rule(*EXPANDS)
def _expand(node: Node) -> Layout:
    source, shape = _source(node), tuple(int(s) for s in tensor(node).shape)
    layout = Layout(((),) * (len(shape) - len(source.dims)) + source.dims)
    for dim, size in enumerate(shape):
        if size != layout.shape[dim]:
            if any(atom.kind is not Kind.OTHER for atom in layout.dims[dim]):
                raise LayoutError("repeats the batch or positions")
            layout = layout.with_dim(dim, size)
    return layout


@_rule(aten.select.int, aten.unbind.int)
def _select(node: Node) -> Layout:
    """One part, or all parts, of a channel dimension, which is gone."""
    source, dim = _source(node), int(bound_arguments(node)["dim"]) % len(_source(node).dims)
    source.factor_index(dim)
    layout = Layout(tuple(d for i, d in enumerate(source.dims) if i != dim))
    if node.target is aten.unbind.int:
        node.meta["layouts"] = [layout] * len(node.meta["val"])
        return source
    return layout


@_rule(aten.layer_norm.default, aten.rms_norm.default)
def _layer_norm(node: Node) -> Layout:
    source = _source(node)
    if len(args(node)[1]) != 1:
        raise LayoutError("normalizes over several dimensions")
    source.factor_index(-1)
    return source


@_rule(aten.group_norm.default)
def _group_norm(node: Node) -> Layout:
    source = _source(node)
    if len(source.dims) < 3 or source.factor_index(1) != 0 or len(source.factors) != 1:
        raise LayoutError("group_norm over something that is not [B, C, positions]")
    return source


@_rule(aten.cat.default, aten.concat.default)
def _cat(node: Node) -> Layout:
    bound = bound_arguments(node)
    layouts = [layout_of(arg) for arg in bound["tensors"]]
    first = layouts[0]
    if first is None or any(layout is None for layout in layouts):
        raise LayoutError("concatenates positions with values that have none")
    dim = int(bound["dim"]) % len(first.dims)
    first.factor_index(dim)
    for layout in layouts:
        if layout is None or not first.matches(layout.with_dim(dim, first.shape[dim])):
            raise LayoutError("concatenates different layouts")
    return first.with_dim(dim, int(tensor(node).shape[dim]))


@_rule(*SPLITS)
def _split(node: Node) -> Layout:
    bound = bound_arguments(node)
    source = _source(node)
    dim = int(bound["dim"]) % len(source.dims)
    source.factor_index(dim)
    node.meta["layouts"] = [source.with_dim(dim, int(part.shape[dim])) for part in node.meta["val"]]
    return source


@_rule(operator.getitem)
def _getitem(node: Node) -> Layout:
    parts = args(node)[0].meta.get("layouts")
    if parts is None:
        raise LayoutError("takes a part of an op that stays dense")
    return parts[args(node)[1]]


@_rule(aten.slice.Tensor)
def _slice(node: Node) -> Layout:
    source = _source(node)
    dim = int(bound_arguments(node)["dim"]) % len(source.dims)
    if tuple(tensor(node).shape) == source.shape:
        return source
    source.factor_index(dim)
    return source.with_dim(dim, int(tensor(node).shape[dim]))


def _map_source(node: Node) -> None:
    """Refuse unless the main operand is a map ``[B, C, H, W]``."""
    if not _source(node).is_map:
        raise LayoutError("its input is not a map [B, C, H, W]")


@_rule(aten.conv2d.default, *TRANSPOSED, *UPSAMPLES)
def _map_to_map(node: Node) -> Layout:
    _map_source(node)
    return Layout.of_map(tensor(node).shape)


@_rule(aten.pad.default)
def _pad(node: Node) -> Layout:
    """Zeros around a map that only convolutions read: part of their index tables."""
    bound = bound_arguments(node)
    _map_source(node)
    zeros = bound["mode"] == "constant" and not bound["value"] and len(bound["pad"]) <= 4
    if not zeros or min(bound["pad"]) < 0 or any(user.target is not aten.conv2d.default for user in node.users):
        raise LayoutError("padding that is not zeros for a convolution")
    return Layout.of_map(tensor(node).shape)


@_rule(*POOLS)
def _pool(node: Node) -> Layout:
    bound = bound_arguments(node)
    _map_source(node)
    padded = any(bound.get("padding", ()))
    if bound.get("ceil_mode") or bound.get("divisor_override") or any(d != 1 for d in bound.get("dilation", ())):
        raise LayoutError("a pooling with options")
    if padded and (node.target is aten.max_pool2d.default or not bound["count_include_pad"]):
        raise LayoutError("a pooling that leaves padding out")
    return Layout.of_map(tensor(node).shape)


@_rule(aten.scaled_dot_product_attention.default)
def _attention(node: Node) -> Layout:
    attention = match_attention(node)
    source = layout_of(attention.query)
    assert source is not None
    return source.with_dim(-1, int(tensor(node).shape[-1]))
