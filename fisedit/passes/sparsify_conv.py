"""Compute convolutions on active rows only, reading inactive neighbors (the halo) from the cache.

A nearest upsampling before a convolution becomes part of its index table: the upsampled map is never made.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.infer_domains import UPSAMPLES
from fisedit.passes.ir import Rows, args, aten, bound_arguments, fisedit, is_op, layout_of, tensor
from fisedit.runtime.geometry import ConvGeometry, Upsample
from fisedit.runtime.plan import Table


def sparsify_conv(gm: GraphModule) -> PassResult:
    graph, matched, refused = gm.graph, 0, []
    for node in list(graph.nodes):
        if is_op(node, aten.conv2d.default) and layout_of(node) is not None:
            if "island" in node.meta:
                refused.append(Refusal(node.name, node.meta["island"]))
                continue
            _sparsify(graph, node)
            matched += 1
    for node in list(graph.nodes):
        if is_op(node, *UPSAMPLES) and node.users and layout_of(node) is not None and "island" not in node.meta:
            _sparsify_upsample(graph, node)
            matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched, tuple(refused))


def _pair(value: Any) -> tuple[int, int]:
    values = [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return (values[0], values[-1])


def _upsample_of(node: Node) -> Upsample:
    height, width = (int(s) for s in tensor(node).shape[-2:])
    bound = bound_arguments(node)
    scales: Any = bound.get("scale_factors") or (bound.get("scales_h"), bound.get("scales_w"))
    if None in scales:
        return Upsample((height, width), None)
    return Upsample((height, width), (float(scales[0]), float(scales[1])))


def _sparsify(graph: Graph, node: Node) -> None:
    bound = bound_arguments(node)
    source, upsample = bound["input"], None
    if is_op(source, *UPSAMPLES) and layout_of(source) is not None and "island" not in source.meta:
        upsample, source = _upsample_of(source), args(source)[0]
    source_layout, layout = layout_of(source), layout_of(node)
    assert source_layout is not None and layout is not None
    kernel = tuple(int(k) for k in tensor(bound["weight"]).shape[-2:])
    geometry = ConvGeometry(source_layout.level, layout.level, (kernel[0], kernel[1]), _pair(bound["stride"]),
                            _pair(bound["padding"]), _pair(bound["dilation"]), upsample)  # fmt: skip
    with graph.inserting_before(node):
        packed = rows.pack(graph, source)
        weight = rows.permute(graph, bound["weight"], (0, 2, 3, 1))  # [Co, kh, kw, C/groups]
        weight = graph.call_function(aten.flatten.using_ints, (weight, 1))  # [Co, kh*kw*C/groups]
        if geometry.pointwise and bound["groups"] == 1:
            sparse = rows.call(graph, aten.linear.default, (packed, weight, bound["bias"]), rows=Rows.of(layout))
        else:
            sparse = _neighbor_conv(graph, geometry, packed, source, weight, bound)
            sparse.meta["rows"] = Rows.of(layout)
        rows.replace(graph, node, sparse)


def _neighbor_conv(graph: Graph, geometry: ConvGeometry, packed: Node, source: Node, weight: Node,
                   bound: dict[str, Any]) -> Node:  # fmt: skip
    halo_index, neighbors, outputs = (rows.table(graph, Table(kind, geometry)) for kind in Table.CONV)
    halo = rows.call(graph, fisedit.halo.default, (source, halo_index))
    arguments = (packed, halo, neighbors, outputs, weight, bound["bias"], list(geometry.kernel),
                 list(geometry.stride), list(geometry.dilation), bound["groups"])  # fmt: skip
    return rows.call(graph, fisedit.sparse_conv.default, arguments)


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
