"""Products of rows in the way that is fastest for their shape on this GPU."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit.runtime.calibration import copies_beyond_l2, grid
from fisedit.runtime.kernels.finish_rows.triton import finish_norm_rows, finish_rows
from fisedit.runtime.kernels.gather_patches.triton import gather_patches
from fisedit.runtime.kernels.launch import cdiv, next_power_of_2
from fisedit.runtime.kernels.layer_norm_rows.triton import layer_norm_rows
from fisedit.runtime.kernels.multiply_rows import reference
from fisedit.runtime.kernels.multiply_rows import triton as kernel
from fisedit.runtime.ops import FEW_ROWS
from fisedit.runtime.tuning.choose import RULE, run_fastest, time_way, timings_of

LIBRARY = "library"
Way = str | kernel.Config
"""The kernel by its own rule, in a configuration, or PyTorch's product with kernels before and after it."""
TILES = (
    kernel.Config(16, 64, 128, 4, 6),
    kernel.Config(32, 64, 128, 4, 6),
    kernel.Config(64, 64, 128, 4, 4),
    kernel.Config(64, 64, 64, 4, 7),
    kernel.Config(64, 128, 64, 4, 4),
    kernel.Config(64, 128, 128, 4, 4),
    kernel.Config(64, 256, 64, 4, 4),
    kernel.Config(128, 64, 64, 4, 4),
    kernel.Config(128, 64, 128, 4, 4),
    kernel.Config(128, 128, 64, 8, 4),
    kernel.Config(128, 128, 128, 8, 3),
    kernel.Config(128, 256, 64, 8, 3),
)
SHARED_MEMORY = 227 * 1024
"""Bytes that a program can have on a GPU of compute capability 9.0."""
MULTIPROCESSORS = 132
SHORT = 640
"""Channels of a linear layer that are few steps of a loop."""
LEAST_STEPS = 4
"""Of the inner dimension, for a program of a split product."""
NAMES = tuple(inspect.signature(reference.multiply_rows).parameters)


def multiply_rows(*arguments: Any, **named: Any) -> Tensor:
    """The kernel of this name, in the fastest known way; see its reference.

    Interpreted on a CPU, nothing is timed.
    """
    return _compute({**dict(zip(NAMES, arguments, strict=False)), **named})


def multiply_norm_rows(
    *product: Any,
    norm_affine: Tensor | None = None,
    norm_full: bool = False,
    norm_activation: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    norm_moments: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`multiply_rows`."""
    if norm_full:
        out = multiply_rows(*product)
        return out, out, _no_moments(out)
    norm = {"norm_affine": norm_affine, "norm_activation": norm_activation, "norm_weight": norm_weight,
            "norm_bias": norm_bias, "eps": eps, "norm_moments": norm_moments}  # fmt: skip
    return _compute({**dict(zip(NAMES, product, strict=False)), "norm": norm})


def _compute(given: Mapping[str, Any]) -> Any:
    device = given["rows"].device
    return run_fastest(Call(given), timings_of(device)) if device.type == "cuda" else run(RULE, given)


@dataclass(frozen=True)
class Product:
    """The shape of a product of rows, all but their number: what its timings are kept by.

    Args:
        taps: rows that an output reads; 0 for a linear layer.
        channels: of one row, of all three sources. outputs: rows of the weight.
        fused: what else is computed, from :func:`fused_parts`.
    """

    taps: int
    batch: int
    channels: tuple[int, int, int]
    outputs: int
    dtype: torch.dtype
    fused: str

    @staticmethod
    def of(given: Mapping[str, Any]) -> Product:
        """That of the arguments of a ``multiply_rows``."""
        rows, sources = given["rows"], given["sources"]
        rows2, rows3 = (0 if more is None else more.shape[2] for more in (given["rows2"], given.get("rows3")))
        fused = fused_parts(given, given["full"], norm_of(**given["norm"]) if "norm" in given else "")
        taps = 0 if sources is None else sources.shape[2]
        return Product(taps, len(rows), (rows.shape[2], rows2, rows3), given["weight"].shape[0], rows.dtype, fused)

    @property
    def kind(self) -> str:
        return f"convolution of {self.taps} taps" if self.taps else "linear"

    @property
    def key(self) -> tuple[str, ...]:
        inputs = "+".join(str(channels) for channels in self.channels if channels)
        return (f"{self.batch} x {inputs} to {self.outputs}", str(self.dtype).removeprefix("torch."), self.fused)

    def steps(self, size: int) -> int:
        """Of the inner dimension, so many channels at a time."""
        first, *more = (cdiv(channels, size) for channels in self.channels)
        return first * max(self.taps, 1) + sum(more)

    @property
    def columns(self) -> int:
        """Channels of the result."""
        return self.outputs // 2 if self.gated else self.outputs

    @property
    def gated(self) -> bool:
        return "gated" in self.fused.split()


def norm_of(norm_affine: Any = None, **_: Any) -> str:
    """The norm of a ``multiply_norm_rows``, by its keywords."""
    return "layer_norm" if norm_affine is None else "normalize"


def fused_parts(given: Mapping[str, Any], full: bool, norm: str = "") -> str:
    """What a ``multiply_rows`` does besides multiplying, by its arguments; ``norm``: what it makes of its rows too."""
    parts = [name for name in ("bias", "affine", "residual") if given[name] is not None]
    if given["activation"] != "none":
        parts.append(given["activation"])
    return " ".join(parts + ["gated"] * given["gated"] + ["full"] * full + [norm] * bool(norm))


class Call:
    """A ``multiply_rows`` by its arguments, or a ``multiply_norm_rows``, with those of the norm together as ``norm``;
    see :class:`fisedit.runtime.tuning.choose.Call`."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given, self.product = given, Product.of(given)
        self.kind, self.key = self.product.kind, self.product.key
        self.number, self.positions = rows_of(given), int(given["positions"])

    def ways(self, number: int) -> list[Way]:
        return candidates(self.product, number)

    def run(self, way: Any) -> Any:
        return run(way, self.given)

    def rehearse(self, way: Any) -> Any:
        given = bare(self.given, way)
        made = run(way, given)
        if "norm" in self.given and self.given["norm"]["norm_moments"]:
            run(way, bare(self.given, way, few=not is_few(self.given)))  # other numbers are timed so
        return (made, made, _no_moments(made)) if "norm" in self.given and "norm" not in given else made

    def prepare(self, ways: Mapping[int, Any]) -> None:
        """Few rows may come with moments or without, as another way of their own product gives them."""
        given, rows = self.given, self.given["rows"]
        norm, center = given.get("norm"), given.get("center")
        few = {way for number, way in ways.items() if len(rows) * number <= FEW_ROWS}
        many = {way for number, way in ways.items() if len(rows) * number > FEW_ROWS}
        if norm is not None and norm["norm_moments"]:
            for way, gives in [*((way, True) for way in few), *((way, False) for way in many)]:
                run(way, given, gives)
        else:
            for way in few | many:
                run(way, given)
        for way in few if center is not None else ():
            other = int(given["moments"].shape[3] == 0)
            run(way, {**given, "moments": rows.new_ones(2, *rows.shape[:2], other, dtype=torch.float32)})

    def stopwatch(self) -> Stopwatch:
        return Stopwatch(self.given)


def rows_of(given: Mapping[str, Any]) -> int:
    """The rows of each sample that a ``multiply_rows`` makes, padding included."""
    return int((given["rows"] if given["sources"] is None else given["sources"]).shape[1])


@cache
def candidates(product: Product, number: int) -> list[Way]:
    """The ways that are worth timing for about ``number`` rows of each sample."""
    if product.dtype == torch.float32 or product.steps(1) < 64:
        return [RULE, LIBRARY]
    ways: list[Way] = []
    for tile in TILES:
        if _makes_sense(tile, product, product.batch * grid(number)):
            split = _split(tile, product, number)
            ways.append(replace(tile, stages=_stages(tile, product, split), split=split))
    return [RULE, *ways, LIBRARY]


def _makes_sense(tile: kernel.Config, product: Product, rows: int) -> bool:
    """Whether a tile suits a number of rows, takes channels in whole chunks if one does, and is pipelined."""
    if tile.m > max(16, next_power_of_2(rows)) or (tile.m < 64 and rows > 3 * tile.m):
        return False
    if tile.m == 64 and cdiv(rows, 128) * cdiv(product.columns, 64) >= 2 * MULTIPROCESSORS:
        return False  # tiles of 128 rows are many enough, and read less
    if _tiles(tile, product, rows) * 2**17 < MULTIPROCESSORS * tile.m * tile.n:
        return False  # too few to fill the GPU, however the work is split
    if tile.staged and (product.taps <= 1 or any(channels % tile.k for channels in product.channels)):
        return False
    if any(channels % tile.k for channels in product.channels):
        alike = [other for other in TILES if (other.m, other.n) == (tile.m, tile.n)]
        if product.channels[1] or any(not any(c % other.k for c in product.channels) for other in alike):
            return False
    return _deepest(tile, product, SHARED_MEMORY) >= 3


def _stages(tile: kernel.Config, product: Product, split: int) -> int:
    """As deep as the tile says and fits; no deeper than lets two programs share a multiprocessor, one of which starts
    or ends while the other multiplies, where that is much of the time: of short products, and of those that are split.
    """
    deep, shared = (_deepest(tile, product, memory) for memory in (SHARED_MEMORY, SHARED_MEMORY // 2))
    short = product.taps <= 1 and sum(product.channels) <= SHORT
    brief = split > 1 and tile.warps == 4  # registers let no two programs of eight warps share it
    return min(tile.stages, shared if (short and shared >= 2) or (brief and shared >= 3) else deep)


def _tiles(tile: kernel.Config, product: Product, rows: int) -> int:
    return cdiv(rows, tile.m) * cdiv(product.columns, tile.n)


def _deepest(tile: kernel.Config, product: Product, memory: int) -> int:
    """How many steps of a product fit into so many bytes. Of few rows, one lies in the registers besides."""
    rows, weights = (size * tile.k * product.dtype.itemsize for size in (tile.m, tile.n * (2 if product.gated else 1)))
    return (memory - rows) // weights if tile.staged else memory // (rows + weights) + (tile.m < 64)


def _split(tile: kernel.Config, product: Product, number: int) -> int:
    """How often the work is split, for about one program a multiprocessor (two, if they are staged): never more, where
    each has much to do."""
    share = MULTIPROCESSORS * (2 if tile.staged else 1) / _tiles(tile, product, product.batch * grid(number))
    most = product.steps(tile.k) // LEAST_STEPS
    return max(1, min(math.floor(share) if product.taps > 1 else round(share), most))


def is_few(given: Mapping[str, Any]) -> bool:
    """Whether a product makes so few rows that its own launch is most of what a layer norm of them takes."""
    return len(given["rows"]) * rows_of(given) <= FEW_ROWS


def _no_moments(rows: Tensor) -> Tensor:
    return rows.new_empty(2, *rows.shape[:2], 0, dtype=torch.float32)  # [2, B, N', 0]


def run(way: Way, given: Mapping[str, Any], gives: bool | None = None) -> Any:
    """The rows; with a norm, them, what it makes of them, and their moments: one of these two.

    Args:
        gives: whether to give moments, where that is asked for; ``None``: if the rows are few.
    """
    if way == LIBRARY:
        return _library(**given)
    product, norm = dict(given), given.get("norm")
    product.pop("norm", None)
    multiply = partial(kernel.multiply_rows, **product, config=way if isinstance(way, kernel.Config) else None)
    if norm is None:
        return multiply()
    if norm["norm_affine"] is None:
        if norm["norm_moments"] and (is_few(given) if gives is None else gives):
            out, moments = multiply(with_moments=True)
            return out, out, moments
        out = multiply()
        normalized = layer_norm_rows(out, norm["norm_weight"], norm["norm_bias"], norm["eps"], given["count"])
        return out, normalized, _no_moments(out)
    normalized = given["rows"].new_empty(len(given["rows"]), rows_of(given), Product.of(given).columns)  # [B, N', Co]
    out = multiply(norm=(normalized, norm["norm_affine"], norm["norm_activation"]))
    return out, normalized, _no_moments(out)


def _library(
    rows: Tensor, rows2: Tensor | None, recorded: Tensor | None, sources: Tensor | None, weight: Tensor,
    bias: Tensor | None, affine: Tensor | None, full: bool, residual: Tensor | None,
    count: Tensor, locks: Tensor, activation: str, gated: bool, positions: int,
    rows3: Tensor | None = None, prefetch: Tensor | None = None, moments: Tensor | None = None,
    center: Tensor | None = None, input_eps: float = 0.0, norm: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """One kernel before PyTorch's product, and one after it, where there is something to do."""
    if moments is not None and moments.shape[3] > 0:
        rows = layer_norm_rows(rows, None, None, input_eps, count)
    parts = [part for part in (rows, rows2, rows3) if part is not None]
    if sources is not None:
        parts = [
            gather_patches(rows, recorded, sources, count, rows2, rows3, prefetch=weight).flatten(2)
        ]  # [B, N', ...]
    if full:
        affine, activation = None, activation if gated else "none"
    if norm is not None:
        norm = {name: value for name, value in norm.items() if name != "norm_moments"}
        made = finish_norm_rows(
            _sum(parts, weight), bias, affine, residual, count, activation, gated, **norm, prefetch=prefetch
        )
        return *made, _no_moments(made[0])
    bare = affine is None and residual is None and activation == "none" and not gated and len(parts) == 1
    if bare and (bias is None or bias.dtype == weight.dtype):
        return F.linear(parts[0], weight, bias)  # [B, N', Co]
    return finish_rows(_sum(parts, weight), bias, affine, residual, count, activation, gated, prefetch)


def _sum(parts: list[Tensor], weight: Tensor) -> Tensor:
    """The product of each part of the channels, added in its place: no copy joins the parts."""
    first, *others = weight.split([part.shape[2] for part in parts], 1)
    out = F.linear(parts[0], first)  # [B, N', Co]
    for part, columns in zip(parts[1:], others, strict=True):
        out.flatten(0, 1).addmm_(part.flatten(0, 1), columns.t())
    return out


def bare(given: Mapping[str, Any], way: Way, few: bool | None = None) -> Mapping[str, Any]:
    """What a way is timed with: of our kernel the product alone, for each of what follows is another kernel to compile
    and changes little; of the library all of it, and of both a layer norm, which are launches of their own. Nothing is
    asked for ahead. Of few rows that come with moments, the library's product needs a layer norm before it."""
    given = {name: value for name, value in given.items() if name != "prefetch"}
    few = is_few(given) if few is None else few
    if way == LIBRARY:
        if few and given.get("center") is not None:
            given["moments"] = given["rows"].new_empty(2, *given["rows"].shape[:2], 1, dtype=torch.float32)
        return given
    activation = given["activation"] if given["gated"] else "none"
    given = {k: v for k, v in given.items() if k != "norm" or _is_launch(v, few)}
    given = {name: value for name, value in given.items() if name not in ("moments", "center")}
    return {**given, "bias": None, "affine": None, "residual": None, "full": False, "activation": activation}


def _is_launch(norm: Mapping[str, Any], few: bool) -> bool:
    """Whether a norm is a launch of its own behind our kernel."""
    return norm["norm_affine"] is None and not (few and norm["norm_moments"])


class Stopwatch:
    """Times the ways of a product on its very arguments, their rows repeated, weights coming from memory."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given, self.real = given, max(1, int(given["count"]))
        self.weights = copies_beyond_l2(given["weight"], most=16)
        self.sized: tuple[int, dict[str, Any]] = (0, {})

    def __call__(self, way: Any, number: int) -> float:
        """µs for ``number`` rows of each sample; infinite where the GPU has too little for it."""
        if self.sized[0] != number:
            self.sized = (number, self.with_rows(number))
        given = bare(self.sized[1], way)
        runs = [partial(run, way, {**given, "weight": weight}) for (weight,) in self.weights]
        return time_way(runs)

    def with_rows(self, number: int) -> dict[str, Any]:
        """The arguments for ``number`` rows: the real ones over and over."""
        place = torch.arange(number, device=self.given["rows"].device) % self.real
        names = ("rows" if self.given["sources"] is None else "sources", "rows2", "rows3", "residual")
        changes = {name: self.given[name][:, place] for name in names if self.given.get(name) is not None}
        return {**self.given, **changes, "count": torch.full_like(self.given["count"], number)}
