"""Compute convolutions on active rows only, reading inactive neighbors (the halo) from the cache.

A nearest upsampling or zero padding before a convolution becomes part of its index table: the map in between is never
made. So do the zeros between the lines of a transposed convolution's input. Pooling, pixel shuffling and unshuffling
are convolutions with constant weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.infer_domains import POOLS, TRANSPOSED, UPSAMPLES
from fisedit.passes.ir import Rows, args, aten, bound_arguments, fisedit, is_op, layout_of, tensor
from fisedit.runtime.geometry import ConvGeometry, Upsample, ZeroInsertion
from fisedit.runtime.plan import Table

Pair = tuple[int, int]


def sparsify_conv(gm: GraphModule) -> PassResult:
    graph, matched, refused = gm.graph, 0, []
    for node in list(graph.nodes):
        if not is_op(node, aten.conv2d.default, *POOLS, *TRANSPOSED) or layout_of(node) is None:
            continue
        if "island" in node.meta:
            refused.append(Refusal(node.name, node.meta["island"]))
            continue
        with graph.inserting_before(node):
            rewrite = _pool if is_op(node, *POOLS) else _transposed if is_op(node, *TRANSPOSED) else _conv
            rows.replace(graph, node, rewrite(graph, node))
        matched += 1
    for node in list(graph.nodes):
        if is_op(node, *UPSAMPLES) and node.users and layout_of(node) is not None and "island" not in node.meta:
            _sparsify_upsample(graph, node)
            matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched, tuple(refused))


def _pair(value: Any) -> Pair:
    values = [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return (values[0], values[-1])


def _upsample_of(node: Node) -> Upsample:
    height, width = (int(s) for s in tensor(node).shape[-2:])
    bound = bound_arguments(node)
    scales: Any = bound.get("scale_factors") or (bound.get("scales_h"), bound.get("scales_w"))
    if None in scales:
        return Upsample((height, width), None)
    return Upsample((height, width), (float(scales[0]), float(scales[1])))


def _conv(graph: Graph, node: Node) -> Node:
    bound = bound_arguments(node)
    source, padding = bound["input"], _pair(bound["padding"])
    if is_op(source, aten.pad.default) and _absorbed(source):
        before = [*bound_arguments(source)["pad"], 0, 0]  # left, right, top, bottom
        padding, source = (padding[0] + before[2], padding[1] + before[0]), args(source)[0]
    upsample = None
    if is_op(source, *UPSAMPLES) and _absorbed(source):
        upsample, source = _upsample_of(source), args(source)[0]
    kernel = _pair(tensor(bound["weight"]).shape[-2:])
    geometry = _geometry(source, node, kernel, _pair(bound["stride"]), padding, _pair(bound["dilation"]), upsample)
    weight = rows.permute(graph, bound["weight"], (0, 2, 3, 1))  # [Co, kh, kw, C/groups]
    weight = graph.call_function(aten.flatten.using_ints, (weight, 1))  # [Co, kh*kw*C/groups]
    if geometry.pointwise and bound["groups"] == 1:
        layout = layout_of(node)
        assert layout is not None
        arguments = (rows.pack(graph, source), weight, bound["bias"])
        return rows.call(graph, aten.linear.default, arguments, rows=Rows.of(layout))
    return _neighbor_conv(graph, geometry, source, weight, bound["bias"], bound["groups"])


def _absorbed(node: Node) -> bool:
    return layout_of(node) is not None and "island" not in node.meta


def _geometry(source: Node, node: Node, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1),
              upsample: Upsample | ZeroInsertion | None = None) -> ConvGeometry:  # fmt: skip
    source_layout, layout = layout_of(source), layout_of(node)
    assert source_layout is not None and layout is not None
    return ConvGeometry(source_layout.level, layout.level, kernel, stride, padding, dilation, upsample)


def _neighbor_conv(graph: Graph, geometry: ConvGeometry, source: Node, weight: Node, bias: Node | None,
                   groups: int) -> Node:  # fmt: skip
    halo_index, neighbors, outputs = (rows.table(graph, Table(kind, geometry)) for kind in Table.CONV)
    halo = rows.call(graph, fisedit.halo.default, (source, halo_index))
    arguments = (rows.pack(graph, source), halo, neighbors, outputs, weight, bias, list(geometry.kernel),
                 list(geometry.stride), list(geometry.dilation), groups)  # fmt: skip
    return rows.call(graph, fisedit.sparse_conv.default, arguments)


def _transposed(graph: Graph, node: Node) -> Node:
    """A transposed convolution: a convolution of the input with zeros between its lines, its kernel turned around.

    Pixel shuffling is one whose weights are a 1 for each output.
    """
    bound, source = bound_arguments(node), args(node)[0]
    height, width = (int(s) for s in tensor(source).shape[2:])
    if is_op(node, aten.pixel_shuffle.default):
        factor = int(bound["upscale_factor"])
        groups, kernel, stride = int(tensor(node).shape[1]), (factor, factor), (factor, factor)
        weight, bias, padding, dilation = _ones_in_turn(graph, source, groups, factor**2), None, (0, 0), (1, 1)
    else:
        weight, bias, groups = bound["weight"], bound["bias"], int(bound["groups"])
        kernel, stride = _pair(tensor(weight).shape[2:]), _pair(bound["stride"])
        padding, dilation = _pair(bound["padding"]), _pair(bound["dilation"])
    wide = ZeroInsertion(((height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1), stride)
    before = (dilation[0] * (kernel[0] - 1) - padding[0], dilation[1] * (kernel[1] - 1) - padding[1])
    geometry = _geometry(source, node, kernel, (1, 1), before, dilation, wide)
    inputs, outputs = int(tensor(source).shape[1]) // groups, int(tensor(node).shape[1]) // groups
    weight = rows.reshape(graph, weight, [groups, inputs, outputs, *kernel])
    weight = graph.call_function(aten.flip.default, (weight, [3, 4]))
    weight = rows.permute(graph, weight, (0, 2, 3, 4, 1))  # [groups, Co/groups, kh, kw, C/groups]
    weight = rows.reshape(graph, weight, [groups * outputs, kernel[0] * kernel[1] * inputs])
    weight.meta["val"] = torch.empty(groups * outputs, kernel[0] * kernel[1] * inputs, device="meta")
    return _neighbor_conv(graph, geometry, source, weight, bias, groups)


def _ones_in_turn(graph: Graph, source: Node, times: int, size: int) -> Node:
    """Weights ``[times * size, size]`` that pick one value each: ``times`` unit matrices."""
    options: dict[str, Any] = {"dtype": tensor(source).dtype, "device": tensor(source).device}
    unit = graph.call_function(aten.eye.default, (size,), options)
    weight = graph.call_function(aten.repeat.default, (unit, [times, 1]))
    weight.meta["val"] = torch.empty(times * size, size, device="meta")
    return weight


def _pool(graph: Graph, node: Node) -> Node:
    """Pooling or pixel unshuffling by a convolution of each channel: with equal weights, or a 1 for each input."""
    bound, source = bound_arguments(node), args(node)[0]
    channels = int(tensor(source).shape[1])
    kernel = _pair(bound["kernel_size"] if "kernel_size" in bound else bound["downscale_factor"])
    geometry = _geometry(source, node, kernel, _pair(bound.get("stride") or kernel), _pair(bound.get("padding", 0)))
    size = kernel[0] * kernel[1]
    if is_op(node, aten.avg_pool2d.default):
        options: dict[str, Any] = {"dtype": tensor(source).dtype, "device": tensor(source).device}
        weight = graph.call_function(aten.full.default, ([channels, size], 1 / size), options)  # [C, k*k]
        weight.meta["val"] = torch.empty(channels, size, device="meta")
        return _neighbor_conv(graph, geometry, source, weight, None, channels)
    weight = _ones_in_turn(graph, source, channels, size)  # [C*k*k, k*k]
    windows = _neighbor_conv(graph, geometry, source, weight, None, channels)  # [B, N, C*k*k]
    if is_op(node, aten.pixel_unshuffle.default):
        return windows
    layout = layout_of(node)
    assert layout is not None
    windows.meta["rows"] = Rows(layout.level, layout.batch, channels * size)
    split = rows.reshape(graph, windows, [layout.batch, -1, channels, size])
    largest = rows.call(graph, aten.amax.default, (split, [-1]))
    return rows.reshape(graph, largest, [layout.batch, -1, channels])  # [B, N, C]


def _sparsify_upsample(graph: Graph, node: Node) -> None:
    """An upsampling that no convolution absorbed: gather the source rows."""
    source, layout = args(node)[0], layout_of(node)
    source_layout = layout_of(source)
    assert isinstance(source, Node) and source_layout is not None and layout is not None
    geometry = ConvGeometry(source_layout.level, layout.level, (1, 1), (1, 1), (0, 0), (1, 1), _upsample_of(node))
    with graph.inserting_before(node):
        halo_index, neighbors = (rows.table(graph, Table(kind, geometry)) for kind in ("halo", "neighbors"))
        halo = rows.call(graph, fisedit.halo.default, (source, halo_index))
        both = graph.call_function(aten.cat.default, ([rows.pack(graph, source), halo], 1))  # [B, N+H, C]
        index = graph.call_function(aten.flatten.using_ints, (neighbors, 1))  # [M, N']
        rows.replace(graph, node, rows.call(graph, fisedit.gather_rows.default, (both, index), rows=Rows.of(layout)))
