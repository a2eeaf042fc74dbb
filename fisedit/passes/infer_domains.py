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
from fisedit.passes.layout import Layout, LayoutError

Rule = Callable[[Node], Layout]
_rules: dict[object, Rule] = {}

POINTWISE_EXTRA = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.clone.default,
    aten.contiguous.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
}  # fmt: skip
VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip
PERMUTES = {aten.permute.default, aten.transpose.int}
SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}
UPSAMPLES = {aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default}


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
    """The layout after an island: its input's where the shape is the same, or that of a map."""
    value = node.meta.get("val")
    source = next(layout for arg in node.all_input_nodes if (layout := layout_of(arg)) is not None)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    if tuple(value.shape) == source.shape:
        return source
    if value.dim() == 4 and value.shape[0] == source.batch and len(source.dims) == 4 and min(value.shape[2:]) > 1:
        return Layout.of_map(value.shape)
    return None


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
    if len(full) != len(spatial) and any(layout.level != full[0].level for layout in spatial):
        raise LayoutError("operands of different levels")
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
    source.rest_index(-1)
    return source.with_dim(-1, int(tensor(node).shape[-1]))


@_rule(aten.layer_norm.default, aten.rms_norm.default)
def _layer_norm(node: Node) -> Layout:
    source = _source(node)
    if len(args(node)[1]) != 1:
        raise LayoutError("normalizes over several dimensions")
    source.rest_index(-1)
    return source


@_rule(aten.group_norm.default)
def _group_norm(node: Node) -> Layout:
    source = _source(node)
    if len(source.dims) < 3 or source.rest_index(1) != 0 or len(source.rest_sizes) != 1:
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
    first.rest_index(dim)
    for layout in layouts:
        if layout is None or not first.matches(layout.with_dim(dim, first.shape[dim])):
            raise LayoutError("concatenates different layouts")
    return first.with_dim(dim, int(tensor(node).shape[dim]))


@_rule(*SPLITS)
def _split(node: Node) -> Layout:
    bound = bound_arguments(node)
    source = _source(node)
    dim = int(bound["dim"]) % len(source.dims)
    source.rest_index(dim)
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
    source.rest_index(dim)
    return source.with_dim(dim, int(tensor(node).shape[dim]))


@_rule(aten.conv2d.default, aten.conv2d.padding)
def _conv(node: Node) -> Layout:
    source = _source(node)
    if node.target is aten.conv2d.padding:
        raise LayoutError("padding given as a word")
    if len(source.dims) != 4 or source.mixed or source.rest_index(1) != 0:
        raise LayoutError("convolution over something that is not a map [B, C, H, W]")
    return Layout.of_map(tensor(node).shape)


@_rule(*UPSAMPLES)
def _upsample(node: Node) -> Layout:
    source = _source(node)
    if len(source.dims) != 4 or source.rest_index(1) != 0:
        raise LayoutError("upsampling of something that is not a map [B, C, H, W]")
    return Layout.of_map(tensor(node).shape)


@_rule(aten.scaled_dot_product_attention.default)
def _attention(node: Node) -> Layout:
    attention = match_attention(node)
    source = layout_of(attention.query)
    assert source is not None
    return source.with_dim(-1, int(tensor(node).shape[-1]))
