"""Offer 3x3 convolutions in blocks of 2x2 outputs, by fewer products: Winograd's F(2x2, 3x3).

Four outputs beside each other read sixteen rows. Of sixteen sums of these, each multiplied by weights of its own, come
the outputs: 16 products, not 36. Where nearest upsampling made the map twice as large, the sixteen rows are nine
different ones, and 9 products are enough. The blocks with active outputs are the active rows of the next level.

The nine taps stay: which way is faster is measured, for each number of rows and of blocks.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit.passes import rows
from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.fused import count, get, of_parameters, wide
from fisedit.passes.ir import aten, fisedit, layout_of, rows_of
from fisedit.passes.layout import Level
from fisedit.runtime.geometry import ConvGeometry
from fisedit.runtime.plan import Table, project_mask

LEAST = 2048
"""Outputs of all samples: with fewer, weights decide, and sixteen are more than nine."""
NARROW = 64
"""Channels: sums of fewer take longer than their products."""


def transform_convolutions(gm: GraphModule) -> PassResult:
    """After all that is fused into products."""
    graph, matched, refused = gm.graph, 0, []
    latent = next((layout.level for node in graph.nodes if (layout := layout_of(node)) is not None), None)
    levels = {kind.level for node in graph.nodes if (kind := rows_of(node)) is not None}
    for node in list(graph.nodes):
        geometry = _geometry(node)
        if geometry is None or latent is None:
            continue
        if reason := _refused(node, geometry, latent, levels):
            refused.append(Refusal(node.name, reason))
            continue
        with graph.inserting_before(node):
            node.kwargs = {**node.kwargs, **_blocks(graph, node, geometry)}
        matched += 1
    return PassResult(matched, tuple(refused))


def _geometry(node: Node) -> ConvGeometry | None:
    """That of a convolution of more than one tap."""
    of_rows = node.target in (fisedit.multiply_rows.default, fisedit.multiply_norm_rows.default)
    if not of_rows or "block_sources" in node.kwargs:
        return None
    sources = get(node, "sources")
    geometry = None if sources is None else sources.meta["table"].of
    return geometry if isinstance(geometry, ConvGeometry) and geometry.kernel != (1, 1) else None


def _refused(node: Node, geometry: ConvGeometry, latent: Level, levels: set[Level]) -> str | None:
    source, target, upsample = geometry.source, geometry.target, geometry.upsample
    plain = ConvGeometry(source, target, (3, 3), (1, 1), (1, 1), (1, 1), upsample)
    coarse = (target[0] // 2, target[1] // 2)
    if geometry != plain or target != (2 * coarse[0], 2 * coarse[1]) or source != (coarse if upsample else target):
        return "no 3x3 convolution to a map of even size, of its own size or half of it"
    if upsample and not all(_doubles(geometry, dim) for dim in (0, 1)):
        return "its map is not upsampled line by line"
    kind = rows_of(node)
    assert kind is not None
    if coarse not in levels or not all(_covers(latent[dim], coarse[dim]) for dim in (0, 1)):
        return "no level has a row for each block"
    if not upsample and kind.batch * target[0] * target[1] < LEAST:
        return "weights decide how long it takes"
    before = rows_of(get(node, "rows"))
    if before is None or min(before.channels, kind.channels) < NARROW:
        return "it has few channels"
    if not of_parameters(node):
        return "its weights are made in each call"
    if get(node, "rows2") is not None:
        return "other rows are in its sum"
    if node.target == fisedit.multiply_norm_rows.default and node.kwargs.get("norm_affine") is None:
        return "a layer normalization follows"
    return None


def _doubles(geometry: ConvGeometry, dim: int) -> bool:
    """Whether each line is read twice, one after the other: not with zeros between them."""
    length = geometry.source[dim]
    assert geometry.upsample is not None
    lines = geometry.upsample.source(dim, length, torch.device("cpu"))
    return torch.equal(lines, torch.arange(length).repeat_interleave(2))


def _covers(length: int, coarse: int) -> bool:
    """Whether a block is active wherever one of its two lines is, whatever the mask's ``length`` lines."""
    for line in range(length):
        mask = torch.arange(length)[:, None] == line  # [L, 1]
        pairs, own = project_mask(mask, (2 * coarse, 1)), project_mask(mask, (coarse, 1))
        if bool((pairs.view(coarse, 2).any(1) & ~own[:, 0]).any()):
            return False
    return True


def _blocks(graph: Graph, node: Node, geometry: ConvGeometry) -> dict[str, Node]:
    height, width = geometry.target
    coarse, kind = (height // 2, width // 2), get(node, "sources").meta["table"].kind
    block = ConvGeometry(geometry.target, coarse, (4, 4), (2, 2), (1, 1), (1, 1))
    read = ConvGeometry(coarse, coarse, (3, 3), (1, 1), (1, 1), (1, 1)) if geometry.upsample else block
    return {
        "block_sources": rows.table(graph, Table(kind, read)),
        "block_count": count(graph, coarse),
        "places": rows.table(graph, Table("places", block)),
        "block_weight": _weights(graph, node, geometry.upsample is not None),
    }


def _weights(graph: Graph, node: Node, upsampled: bool) -> Node:
    """The nine weights ``[Co, 9 * C]`` as those of a block's sums, ``[16 * Co, C]`` or ``[9 * Co, C]``."""
    weight = get(node, "weight")
    nine = graph.call_function(aten.unflatten.int, (wide(graph, weight), 1, [3, 3, -1]))  # [Co, 3, 3, C]
    sums = [one for line in _sums(graph, nine, 1, upsampled) for one in _sums(graph, line, 1, upsampled)]
    together = graph.call_function(aten.cat.default, (sums,))  # [16 * Co, C]
    return graph.call_function(aten.type_as.default, (together, weight))


def _sums(graph: Graph, taps: Node, dim: int, upsampled: bool) -> list[Node]:
    """Three taps of a dimension as four sums (G of equation 6 in Lavin and Gray 2016); or as three, if the second and
    the third of four lines are the same."""
    first, second, third = (graph.call_function(aten.select.int, (taps, dim, tap)) for tap in range(3))
    ends = graph.call_function(aten.add.Tensor, (first, third))
    both = graph.call_function(aten.add.Tensor, (ends, second))
    if upsampled:
        return [first, both, third]
    apart = graph.call_function(aten.sub.Tensor, (ends, second))
    halves = [graph.call_function(aten.mul.Tensor, (one, 0.5)) for one in (both, apart)]
    return [first, *halves, third]
