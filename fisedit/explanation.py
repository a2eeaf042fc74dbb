"""Why an edit under a mask is computed as it is: what the cost model knows and chooses, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fisedit.passes.fused import get
from fisedit.passes.ir import PRODUCTS, args, fisedit, is_op, rows_of, tensor
from fisedit.passes.layout import Level
from fisedit.passes.plan_memory import all_rows, predict_peak
from fisedit.program import Program
from fisedit.runtime.calibration import Candidate, Choice, Timings
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.explain import CallChoice, explain_choices, tile_choices
from fisedit.runtime.plan import project_mask
from fisedit.runtime.row_plan import bucket

if TYPE_CHECKING:
    from fisedit.runtime.tuning.attend_rows import Attention  # needs Triton
    from fisedit.runtime.tuning.product import Blocks, Product

    Known = tuple[Product | Attention | Blocks, int, Mapping[Candidate, float]]
    """A shape, the number of its rows or blocks, and the µs that are expected of their ways."""


def explain(program: Program, mask: Tensor, cost_model: CostModel, timings: Timings | None = None) -> str:
    """The choices for an edit of one call signature, and what they are expected to cost, as text.

    Args:
        mask: bool ``[H, W]`` over the latent.
        timings: of the GPU; by default those that are kept for it.
    """
    program.executable("edit")
    graph = program.graphs["edit"].graph
    _, _, dtype, device_name = program.captured.signature.tensors[0]
    device = torch.device(device_name)
    share = float(mask.float().mean())
    call = CallChoice(share, cost_model.prefers_dense(share, device))
    if not program.fused:
        convolutions = [node for node in graph.nodes if is_op(node, fisedit.sparse_conv.default)]
        geometries = [args(node)[2].meta["table"].of for node in convolutions]
        return explain_choices(tile_choices(geometries, mask, cost_model), "multiply-add rows", call)
    from fisedit.runtime.tuning.choose import timings_of  # needs Triton

    timings = timings or timings_of(device)
    rows = rows_of_mask(graph, mask)
    gpu = device.index if device.type == "cuda" else -1  # which changes nothing
    with torch.cuda.device(gpu):  # tiles are those of the current one
        text = explain_choices(list(layer_choices(graph, rows, dtype, timings)), "µs", call)
        peak = predict_peak(graph, rows, workspaces(graph, rows, dtype, timings))
    return f"{text}\nmemory of a call: {predict_peak(graph, rows) / 2**20:.2f} MiB of values, {peak / 2**20:.2f} in all"


def rows_of_mask(graph: Graph, mask: Tensor) -> dict[Level, int]:
    """The padded rows of each level under a mask bool ``[H, W]`` over the latent."""
    active = {level: int(project_mask(mask, level).sum()) for level in all_rows(graph).active}
    return {level: bucket(number, math.prod(level)) for level, number in active.items()}


def layer_choices(graph: Graph, rows: Mapping[Level, int], dtype: torch.dtype, timings: Timings) -> Iterator[Choice]:
    """What is known of the products and self-attentions of a fused graph, in their order, for padded rows of each
    level."""
    from fisedit.runtime.tuning.choose import fastest  # needs Triton

    for _, shapes in _layers(graph, rows, dtype, timings):
        (shape, number, _), *_ = shapes
        expected = {way: time for _, _, times in shapes for way, time in times.items()}
        costs = {str(way): time for way, time in expected.items()}
        yield Choice(shape.kind, shape.key, number, str(fastest(expected)), costs)


def workspaces(graph: Graph, rows: Mapping[Level, int], dtype: torch.dtype, timings: Timings) -> dict[Node, int]:
    """Bytes that products and self-attentions need while they run, besides what they read and give, in the ways that
    are chosen for padded rows of each level."""
    from fisedit.runtime.tuning.choose import fastest  # needs Triton

    found = {}
    for node, shapes in _layers(graph, rows, dtype, timings):
        shape, number, expected = min(shapes, key=lambda one: min(one[2].values(), default=math.inf))
        found[node] = shape.workspace(fastest(expected), number)
    return found


def _layers(
    graph: Graph, rows: Mapping[Level, int], dtype: torch.dtype, timings: Timings
) -> Iterator[tuple[Node, list[Known]]]:
    """Products and self-attentions, and what is known of them; of convolutions in blocks, too, which are chosen only
    where something is known of the product."""
    for node in graph.nodes:
        shapes = shapes_of(node, rows, dtype)
        known: list[Known] = [(shape, number, timings.expect(shape, number)) for shape, number in shapes]
        if known:
            yield node, known if known[0][2] else known[:1]


def shapes_of(
    node: Node, rows: Mapping[Level, int], dtype: torch.dtype
) -> list[tuple[Product | Attention | Blocks, int]]:
    """The shape of a product or a self-attention, with its number of rows; that of a convolution in blocks, too, with
    their number."""
    from fisedit.runtime.tuning.product import Blocks

    kind = rows_of(node)
    if kind is None:
        return []
    number = rows[kind.level]
    if is_op(node, fisedit.attend_rows.default) and args(node)[5] is not None:
        return [(attention_of(node, dtype), number)]
    if not is_op(node, *PRODUCTS):
        return []
    product = product_of(node, dtype, number == math.prod(kind.level))
    if (sources := node.kwargs.get("block_sources")) is None:
        return [(product, number)]
    geometry = cast(Node, sources).meta["table"].of
    return [(product, number), (Blocks(product, math.prod(geometry.kernel)), rows[geometry.target])]


def attention_of(node: Node, dtype: torch.dtype) -> Attention:
    """The shape of an ``attend_rows`` node that has a table: over a recorded map."""
    from fisedit.runtime.tuning.attend_rows import Attention

    kind, heads = rows_of(node), args(node)[9]
    assert kind is not None
    return Attention(kind.batch, heads, kind.channels // heads, math.prod(kind.level), dtype)


def product_of(node: Node, dtype: torch.dtype, full: bool) -> Product:
    """The shape of a product's node; ``full``: all rows of its level are active."""
    from fisedit.runtime.tuning.product import Product, fused_parts, norm_of

    names = ("bias", "affine", "residual", "activation", "gated", "center")
    given = {name: get(node, name) for name in names}
    sources, more = get(node, "sources"), (rows_of(get(node, name)) for name in ("rows2", "rows3"))
    second, third = (0 if source is None else source.channels for source in more)
    kind, first = rows_of(node), rows_of(get(node, "rows"))
    assert kind is not None and first is not None
    norm = norm_of(**node.kwargs) if is_op(node, fisedit.multiply_norm_rows.default) else ""
    text = cast(Node | None, node.kwargs.get("key"))
    return Product(
        text=(kind.channels // cast(int, node.kwargs["heads"]), tensor(text).shape[1]) if text is not None else (0, 0),
        taps=0 if sources is None else math.prod(sources.meta["table"].of.kernel),
        batch=kind.batch,
        channels=(first.channels, second, third),
        outputs=kind.channels * (2 if given["gated"] else 1),
        dtype=dtype,
        fused=fused_parts(given, full and get(node, "full") is not False, "" if full and norm == "normalize" else norm),
    )
