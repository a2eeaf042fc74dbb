"""Products of rows in the way that is fastest for their shape on this GPU: ways are timed once, and remembered."""

from __future__ import annotations

import atexit
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fisedit.runtime.calibration import Timings, copies_beyond_l2, time_on_gpu
from fisedit.runtime.kernels.gather_patches.triton import gather_patches
from fisedit.runtime.kernels.multiply_rows import reference
from fisedit.runtime.kernels.multiply_rows import triton as kernel

RULE, LIBRARY = "rule", "library"
TILES = {
    str(tile): tile
    for tile in (
        kernel.Config(16, 64, 128, 4, 6),
        kernel.Config(32, 64, 128, 4, 6),
        kernel.Config(64, 64, 128, 4, 5),
        kernel.Config(64, 128, 64, 4, 6),
        kernel.Config(128, 64, 64, 4, 6),
        kernel.Config(128, 128, 64, 8, 4),
        kernel.Config(128, 256, 64, 8, 3),
    )
}
"""Tiles that are timed besides the kernel's own rule; how often work is split follows from the number of tiles."""
ARGUMENTS = tuple(inspect.signature(reference.multiply_rows).parameters)


@cache
def timings_of(device: torch.device) -> Timings:
    """The timings of a device, which are saved when the process ends."""
    timings = Timings.load(device)
    atexit.register(timings.save)
    return timings


def multiply_rows(*arguments: Any) -> Tensor:
    """The kernel of this name, in the fastest known way; see its reference.

    A shape that is met for the first time is timed, except while a CUDA graph is captured: run it once before.
    """
    given = dict(zip(ARGUMENTS, arguments, strict=True))
    return run(choose_way(given, timings_of(given["rows"].device)), given)


@dataclass(frozen=True)
class Product:
    """The shape of a product of rows, all but their number: what its timings are kept by.

    Args:
        taps: rows that an output reads; 0 for a linear layer.
        channels: of one row, of both sources. outputs: rows of the weight.
        fused: what else is computed, from :func:`fused_parts`.
    """

    taps: int
    batch: int
    channels: tuple[int, int]
    outputs: int
    dtype: torch.dtype
    fused: str

    @property
    def kind(self) -> str:
        return f"convolution of {self.taps} taps" if self.taps else "linear"

    @property
    def key(self) -> tuple[str, ...]:
        inputs = "+".join(str(channels) for channels in self.channels if channels)
        return (f"{self.batch} x {inputs} to {self.outputs}", str(self.dtype).removeprefix("torch."), self.fused)


def fused_parts(given: Mapping[str, Any], full: bool) -> str:
    """What a ``multiply_rows`` does besides multiplying, by its arguments."""
    parts = [name for name in ("bias", "column_sum", "affine", "residual") if given[name] is not None]
    if given["activation"] != "none":
        parts.append(given["activation"])
    return " ".join(parts + ["gated"] * given["gated"] + ["full"] * full)


def choose_way(given: Mapping[str, Any], timings: Timings) -> str:
    """``"rule"``, a key of ``TILES``, or ``"library"``."""
    rows, rows2, sources = given["rows"], given["rows2"], given["sources"]
    number, taps = (rows.shape[1], 0) if sources is None else (sources.shape[1], sources.shape[2])
    channels = (rows.shape[2], 0 if rows2 is None else rows2.shape[2])
    fused = fused_parts(given, given["full"])
    product = Product(taps, len(rows), channels, given["weight"].shape[0], rows.dtype, fused)
    capturing = rows.is_cuda and torch.cuda.is_current_stream_capturing()
    measure = None if capturing else partial(_measure, given)
    return str(timings.best(product.kind, product.key, number, candidates(given), measure, default=RULE))


def candidates(given: Mapping[str, Any]) -> list[str]:
    """The ways that are worth timing."""
    rows, rows2, weight = given["rows"], given["rows2"], given["weight"]
    if rows.dtype == torch.float32 or weight.shape[1] < 64:
        return [RULE, LIBRARY]
    channels = (rows.shape[2], 0 if rows2 is None else rows2.shape[2])
    fitting = [name for name, tile in TILES.items() if rows2 is None or all(c % tile.k == 0 for c in channels)]
    return [RULE, *fitting, LIBRARY]


def run(way: str, given: Mapping[str, Any]) -> Tensor:
    if way == LIBRARY:
        return _library(given)
    return kernel.multiply_rows(**given, config=None if way == RULE else _split(TILES[way], given))


def _split(tile: kernel.Config, given: Mapping[str, Any]) -> kernel.Config:
    """``tile`` with work split so often that two programs come to each multiprocessor, four steps each at least."""
    rows, sources, weight = given["rows"], given["sources"], given["weight"]
    number = len(rows) * (rows.shape[1] if sources is None else sources.shape[1])
    tiles = triton.cdiv(number, tile.m) * triton.cdiv(weight.shape[0], tile.n)
    return replace(tile, split=max(1, min(weight.shape[1] // tile.k // 4, 264 // tiles)))


def _library(given: Mapping[str, Any]) -> Tensor:
    """Gathered patches, PyTorch's product, and what follows it one by one."""
    rest = dict(given)
    if given["sources"] is not None:
        patches = gather_patches(given["rows"], given["recorded"], given["sources"], given["count"])
        rest |= {"rows": patches.flatten(2), "recorded": None, "sources": None}  # [B, N', taps*C]
    return reference.multiply_rows(**rest)


def _measure(given: Mapping[str, Any], way: Any, rows: int) -> float:
    """µs of a way on the very arguments, weights coming from memory; infinite where the GPU has too little for it."""
    weights = copies_beyond_l2(given["weight"], most=16)
    runs = [partial(run, str(way), {**given, "weight": weight}) for (weight,) in weights]
    try:
        return time_on_gpu(*runs)
    except OutOfResources:
        return math.inf
