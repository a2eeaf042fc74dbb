"""Read inactive inputs of convolutions where they were recorded: no halo is gathered, no map copied.

A convolution's index table then says, for each input of an output, which active row or which recorded position it is
(``sources``), and the convolution becomes one product with gathered rows (``multiply_rows``).
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult
from fisedit.passes.fused import count, multiply, of_the_model, take_over
from fisedit.passes.ir import Rows, args, aten, fisedit, is_op, rows_of
from fisedit.runtime.geometry import ConvGeometry
from fisedit.runtime.plan import Table


def read_in_place(gm: GraphModule) -> PassResult:
    graph, matched = gm.graph, 0
    for node in list(graph.nodes):
        if is_op(node, fisedit.sparse_conv.default):
            with graph.inserting_before(node):
                take_over(graph, node, _convolution(graph, node))
            matched += 1
        elif is_op(node, fisedit.gather_rows.default) and is_op(args(node)[0], aten.cat.default):
            with graph.inserting_before(node):
                take_over(graph, node, _upsampling(graph, node))
            matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched)


def recorded_map(graph: Graph, halo: Node) -> Node:
    """The map ``[B, R, C]`` that a halo is taken from: a recorded one in its place, or a dense value's rows."""
    if is_op(halo, fisedit.cache_load.default):
        return view(graph, halo)
    return args(halo)[0]


def _sources(graph: Graph, halo: Node, geometry: ConvGeometry) -> Node:
    """The table of where inputs are; recorded rows may lie elsewhere than on their map, those of the graph do not."""
    return rows.table(graph, Table("sources" if is_op(halo, fisedit.cache_load.default) else "own sources", geometry))


def view(graph: Graph, load: Node) -> Node:
    """What a ``cache_load`` loads, where it lies."""
    node = graph.call_function(fisedit.cache_view.default, (args(load)[0],))
    node.meta["recorded"] = load.meta["recorded"]
    return node


def _convolution(graph: Graph, node: Node) -> Node:
    packed, halo, table, _, weight, bias, kernel, stride, dilation, groups = args(node)
    geometry, kind = table.meta["table"].of, rows_of(node)
    assert kind is not None
    recorded, sources = recorded_map(graph, halo), _sources(graph, halo, geometry)
    if groups == 1 and of_the_model([weight] if bias is None else [weight, bias]):
        return multiply(graph, kind, rows=packed, recorded=recorded, sources=sources, weight=weight, bias=bias)
    patches = _patches(graph, packed, recorded, sources, kind)  # [B, N', taps, C]
    channels = _channels(packed, halo)
    windows = rows.permute(graph, rows.reshape(graph, patches, [-1, *kernel, channels]), (0, 3, 1, 2))
    kernels = rows.reshape(graph, weight, [-1, *kernel, channels // groups])
    kernels = rows.permute(graph, kernels, (0, 3, 1, 2))  # [Co, C/groups, kh, kw]
    arguments = (windows, kernels, bias, [1, 1], [0, 0], [1, 1], groups)
    out = graph.call_function(aten.conv2d.default, arguments)  # [B*N', Co, 1, 1]
    return rows.reshape(graph, out, [kind.batch, -1, kind.channels])


def _channels(packed: Node, halo: Node) -> int:
    kind = rows_of(packed) or rows_of(halo)
    assert kind is not None
    return kind.channels


def _patches(graph: Graph, packed: Node, recorded: Node, sources: Node, kind: Rows) -> Node:
    arguments: tuple[Any, ...] = (packed, recorded, sources, count(graph, kind.level))
    return graph.call_function(fisedit.gather_patches.default, arguments)


def _upsampling(graph: Graph, node: Node) -> Node:
    """An upsampling that no convolution absorbed: each output takes one row."""
    (packed, halo), index = args(args(node)[0])[0], args(node)[1]
    geometry, kind = args(index)[0].meta["table"].of, rows_of(node)
    assert kind is not None
    sources = _sources(graph, halo, geometry)
    patches = _patches(graph, packed, recorded_map(graph, halo), sources, kind)  # [B, N', 1, C]
    return rows.reshape(graph, patches, [kind.batch, -1, kind.channels])
