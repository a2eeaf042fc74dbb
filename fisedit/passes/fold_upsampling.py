"""Fold nearest upsampling into the weights of the convolution behind it: four convolutions of 2x2 taps, not nine taps.

An output at an even line reads one line of the map before once and another one twice; so does one at an odd line, and
columns alike. With the weights of equal taps added up, each of the four parities of outputs reads four rows (polyphase
decomposition). The nine taps stay an argument: with few rows, weights decide, and those of the parities are more.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.fused import count, get, is_bare, of_parameters, take_over, wide
from fisedit.passes.ir import aten, fisedit, layout_of, rows_of
from fisedit.passes.layout import Level
from fisedit.runtime.geometry import ConvGeometry, Upsample
from fisedit.runtime.plan import Table, project_mask


def fold_upsampling(gm: GraphModule) -> PassResult:
    """After all that is fused into products: nothing may follow the bias."""
    graph, matched, refused = gm.graph, 0, []
    latent = next((layout.level for node in graph.nodes if (layout := layout_of(node)) is not None), None)
    for node in list(graph.nodes):
        geometry = _geometry(node)
        if geometry is None or latent is None:
            continue
        if reason := _refused(node, geometry, latent):
            refused.append(Refusal(node.name, reason))
            continue
        with graph.inserting_before(node):
            take_over(graph, node, _fold(graph, node, geometry))
        matched += 1
    graph.eliminate_dead_code()
    return PassResult(matched, tuple(refused))


def _geometry(node: Node) -> ConvGeometry | None:
    """That of a convolution of an upsampled map."""
    if node.target not in (fisedit.multiply_rows.default, fisedit.multiply_norm_rows.default):
        return None
    sources = get(node, "sources")
    geometry = None if sources is None else sources.meta["table"].of
    return geometry if isinstance(geometry, ConvGeometry) and isinstance(geometry.upsample, Upsample) else None


def _refused(node: Node, geometry: ConvGeometry, latent: Level) -> str | None:
    if not is_bare(node) or get(node, "rows2") is not None:
        return "something follows its convolution"
    if not of_parameters(node):
        return "its weights are made in each call"
    source, target = geometry.source, geometry.target
    plain = ConvGeometry(source, target, (3, 3), (1, 1), (1, 1), (1, 1), geometry.upsample)
    if geometry != plain or target != (2 * source[0], 2 * source[1]):
        return "no 3x3 convolution of a map twice as large"
    if not all(_doubles(geometry, dim) and _covers(latent[dim], source[dim]) for dim in (0, 1)):
        return "not every active output lies over an active row of the map before"
    return None


def _doubles(geometry: ConvGeometry, dim: int) -> bool:
    """Whether each line is read twice, one after the other."""
    length = geometry.source[dim]
    assert isinstance(geometry.upsample, Upsample)
    lines = geometry.upsample.source(dim, length, torch.device("cpu"))
    return torch.equal(lines, torch.arange(length).repeat_interleave(2))


def _covers(length: int, coarse: int) -> bool:
    """Whether a line of the map before is active wherever one of its two is, whatever the mask's ``length`` lines."""
    for line in range(length):
        mask = torch.arange(length)[:, None] == line  # [L, 1]
        pairs, own = project_mask(mask, (2 * coarse, 1)), project_mask(mask, (coarse, 1))
        if bool((pairs.view(coarse, 2).any(1) & ~own[:, 0]).any()):
            return False
    return True


def _fold(graph: Graph, node: Node, geometry: ConvGeometry) -> Node:
    kind, source = rows_of(node), get(node, "sources").meta["table"]
    assert kind is not None
    coarse = ConvGeometry(geometry.source, geometry.source, (3, 3), (1, 1), (1, 1), (1, 1))
    named = {
        "coarse_sources": rows.table(graph, Table(source.kind, coarse)),
        "coarse_count": count(graph, geometry.source),
        "places": rows.table(graph, Table("places", geometry)),
        "parities": _parities(graph, get(node, "weight")),
    }
    return rows.call(graph, fisedit.multiply_upsampled_rows.default, node.args, named, kind)


def _parities(graph: Graph, weight: Node) -> Node:
    """The weights ``[Co, 9 * C]`` of a kernel of nine taps as those of each parity, ``[4 * Co, 4 * C]``."""
    nine = graph.call_function(aten.unflatten.int, (wide(graph, weight), 1, [3, 3, -1]))  # [Co, 3, 3, C]
    four = [across for down in _folded(graph, nine, 1) for across in _folded(graph, down, 2)]  # [Co, 2, 2, C] each
    together = graph.call_function(aten.cat.default, (four,))  # [4 * Co, 2, 2, C]
    flat = graph.call_function(aten.flatten.using_ints, (together, 1))
    return graph.call_function(aten.type_as.default, (flat, weight))


def _folded(graph: Graph, taps: Node, dim: int) -> list[Node]:
    """Three taps of a dimension as two: those of even lines, and of odd ones."""

    def some(start: int, end: int) -> Node:
        part = graph.call_function(aten.slice.Tensor, (taps, dim, start, end))
        return graph.call_function(aten.sum.dim_IntList, (part, [dim], True))

    pairs = [(some(0, 1), some(1, 3)), (some(0, 2), some(2, 3))]
    return [graph.call_function(aten.cat.default, (list(pair), dim)) for pair in pairs]
