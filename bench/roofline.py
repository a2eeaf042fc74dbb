"""What a U-Net call has to compute and to move at least, from its dense graph and a mask; no kernel is looked at.

    python bench/roofline.py --models SD2.1,SD1.5,SDXL          floors on an H100; needs no GPU and no weights

Counted apart from the package's own count (``fisedit.passes.count_macs``), so that each checks the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from masks import blob, family
from published import MODELS, Published, arguments, build
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils.flop_counter import FlopCounterMode

from fisedit.capture import bind_call, capture
from fisedit.config import CompileConfig
from fisedit.passes import pipeline
from fisedit.passes.base import PassLog, run_passes
from fisedit.passes.count_macs import count_macs
from fisedit.passes.ir import args, aten, bound_arguments, is_op, layout_of, tensor
from fisedit.program import Program
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.plan import MaskPlan, project_mask

UPSAMPLES = (aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)


@dataclass(frozen=True)
class Peak:
    """A GPU's data sheet: bytes of memory traffic and dense half-precision multiply-accumulates, both per second."""

    bytes: float
    macs: float


PEAKS = {"H100": Peak(3.35e12, 989.4e12 / 2), "H200": Peak(4.8e12, 989.4e12 / 2)}
"""NVIDIA's figures of the SXM boards, tensor cores without sparsity."""


def peak_of(name: str) -> Peak | None:
    """The data sheet of a device by a part of its name; ``None`` for others."""
    return next((peak for model, peak in PEAKS.items() if model in name), None)


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of a call; bytes of weights and of recorded rows read; bytes of rows that its convolutions,
    linear layers and attentions read and write, each once, everything between them fused."""

    macs: int = 0
    weights: int = 0
    recorded: int = 0
    activations: int = 0

    @property
    def bytes(self) -> int:
        return self.weights + self.recorded + self.activations

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def floor(self, peak: Peak) -> float:
        """Seconds that the call takes at least."""
        return max(self.bytes / peak.bytes, self.macs / peak.macs)


class Masked:
    """A mask at all levels; ``None`` is the dense model."""

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = None if mask is None else mask.cpu()

    def active(self, level: tuple[int, int]) -> Tensor:
        """Bool ``[h, w]``."""
        return torch.ones(level, dtype=torch.bool) if self.mask is None else project_mask(self.mask, level)

    def rows(self, level: tuple[int, int]) -> int:
        return int(self.active(level).sum())


def count_work(graph: Graph, mask: Tensor | None = None) -> Work:
    """The work of one call.

    Args:
        graph: the canonical (dense) graph.
        mask: bool ``[H, W]`` over the latent; ``None`` counts the dense model. Under a mask, what depends on the text
            alone is left out, for it is computed once per edit.
    """
    masked, each_call = Masked(mask), set(_depends_on_sample_or_time(graph))
    return sum(
        (_count(node, masked) for node in graph.nodes if mask is None or node in each_call),
        start=Work(),
    )


def _depends_on_sample_or_time(graph: Graph) -> Iterator[Node]:
    seen: set[Node] = set()
    for node in graph.nodes:
        own = node.op == "placeholder" and str(node.target) in ("sample", "timestep")
        if own or any(before in seen for before in node.all_input_nodes):
            seen.add(node)
            yield node


def _count(node: Node, masked: Masked) -> Work:
    if is_op(node, aten.conv2d.default):
        return _conv(node, masked)
    if is_op(node, aten.linear.default):
        return _linear(node, masked)
    if is_op(node, aten.scaled_dot_product_attention.default):
        return _attention(node, masked)
    return Work()


def _conv(node: Node, masked: Masked) -> Work:
    bound, out = bound_arguments(node), tensor(node)
    source, weight = bound["input"], tensor(bound["weight"])
    read = _read_positions(masked.active(_level(out)), tensor(source), weight, bound)  # [H, W] of the input
    if is_op(source, *UPSAMPLES):
        source = args(source)[0]
        read = project_mask(read, _level(tensor(source)))
    batch, item, inputs, level = out.shape[0], out.element_size(), tensor(source).shape[1], _level(tensor(source))
    outputs, inside = batch * masked.rows(_level(out)), masked.active(level)
    return Work(
        macs=outputs * weight.numel(),
        weights=weight.numel() * item,
        recorded=batch * int((read & ~inside).sum()) * inputs * item,
        activations=(batch * int((read & inside).sum()) * inputs + outputs * out.shape[1]) * item,
    )


def _read_positions(active: Tensor, source: Tensor, weight: Tensor, bound: dict[str, Any]) -> Tensor:
    """Positions of a convolution's input that its active outputs read, bool ``[H, W]``: its transpose tells."""
    height, width = _level(source)
    ones = torch.ones(1, 1, *weight.shape[-2:])
    stride, padding = bound["stride"], bound["padding"]
    reached = F.conv_transpose2d(active[None, None].float(), ones, None, stride, padding)[0, 0] > 0
    short = (height - reached.shape[0], width - reached.shape[1])  # lines that the stride leaves unread
    return F.pad(reached, (0, max(short[1], 0), 0, max(short[0], 0)))[:height, :width]


def _linear(node: Node, masked: Masked) -> Work:
    source, weight = tensor(args(node)[0]), tensor(args(node)[1])
    vectors, layout, item = source.numel() // source.shape[-1], layout_of(node), source.element_size()
    if layout is not None:
        vectors = vectors // math.prod(layout.level) * masked.rows(layout.level)
    moved = vectors * (weight.shape[0] + weight.shape[1]) * item
    return Work(macs=vectors * weight.numel(), weights=weight.numel() * item, activations=moved)


def _attention(node: Node, masked: Masked) -> Work:
    query, key, value = (tensor(argument) for argument in args(node)[:3])
    layout, item = layout_of(node), query.element_size()
    share, is_self = 1.0, layout_of(args(node)[1]) is not None
    if layout is not None:
        share = masked.rows(layout.level) / math.prod(layout.level)
    queries = round(math.prod(query.shape[:-1]) * share)  # over batch and heads
    cached = (key.numel() + value.numel()) * item
    return Work(
        macs=queries * key.shape[-2] * (query.shape[-1] + value.shape[-1]),
        recorded=round(cached * (1 - share)) if is_self else 0,
        activations=queries * (query.shape[-1] + value.shape[-1]) * item + round(cached * (share if is_self else 1)),
    )


def _level(value: Tensor) -> tuple[int, int]:
    return int(value.shape[-2]), int(value.shape[-1])


def capture_published(model: Published) -> tuple[Program, int]:
    """The graphs of a published architecture in half precision, and the multiply-accumulates that PyTorch counts of a
    dense call; on the meta device, where nothing is computed."""
    unet = build(model, "meta", torch.float16)
    call = arguments(model, model.size, "meta", torch.float16)
    captured = capture(unet, bind_call(unet, (), call))
    run_passes(captured.module, pipeline.canonical_passes(), PassLog("canonical"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(**call | {"timestep": torch.empty((), device="meta")})
    return Program(captured, CompileConfig(provider="reference")), counter.get_total_flops() // 2


def check_count(program: Program, mask: Tensor, work: Work) -> None:
    """Raise unless the package counts the same over its packed graph, each convolution computing its active rows."""
    program.executable("edit")
    packed = count_macs(program.graphs["edit"].graph, MaskPlan(mask, CostModel("rows")))
    assert packed == work.macs, f"{packed} over the packed graph, {work.macs} here"


def mean_work(works: list[Work]) -> Work:
    """The mean of several masks' work."""
    return Work(*(round(sum(parts) / len(works)) for parts in zip(*(vars(w).values() for w in works), strict=True)))


def main(
    models: Annotated[str, typer.Option(help="Names of bench/published.py, with commas.")] = "SD2.1,SD1.5,SDXL",
    shares: Annotated[str, typer.Option(help="Active shares of the blobs.")] = "0.05,0.15,0.3",
    device: Annotated[str, typer.Option(help=f"One of {', '.join(PEAKS)}.")] = "H100",
    ragged_masks: Annotated[int, typer.Option(help="Masks of the ragged family.")] = 24,
) -> None:
    """Print work and floors of one call, fp16, batch 2."""
    peak = PEAKS[device]
    print("| U-Net | mask | GMACs | fewer | weights, MB | recorded, MB | activations, MB | bytes, ms | MACs, ms |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in models.split(","):
        published = MODELS[name]
        program, counted = capture_published(published)
        graph = program.captured.module.graph
        dense = count_work(graph)
        assert dense.macs == counted, f"{dense.macs} here, {counted} by torch.utils.flop_counter"
        works = {"dense": dense}
        for share in map(float, shares.split(",")):
            mask = blob(published.size, share)
            works[f"blob {share:.0%}"] = count_work(graph, mask)
            check_count(program, mask, works[f"blob {share:.0%}"])
        ragged = [count_work(graph, mask) for mask in family(published.size, ragged_masks)]
        works[f"ragged, {ragged_masks} masks"] = mean_work(ragged)
        for kind, work in works.items():
            megabytes = " | ".join(f"{part / 1e6:.0f}" for part in (work.weights, work.recorded, work.activations))
            times = f"{work.bytes / peak.bytes * 1e3:.2f} | {work.macs / peak.macs * 1e3:.2f}"
            fewer = f"{dense.macs / work.macs:.1f}×"
            print(f"| {name} | {kind} | {work.macs / 1e9:.0f} | {fewer} | {megabytes} | {times} |", flush=True)
    print(f"\n{device}: {peak.bytes / 1e12:.2f} TB/s, {peak.macs / 1e12:.0f} T multiply-accumulates/s (half precision)")


if __name__ == "__main__":
    typer.run(main)
