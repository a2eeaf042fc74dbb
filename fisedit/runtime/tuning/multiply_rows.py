"""Products of rows in the way that is fastest for their shape on this GPU."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import cycle
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from fisedit.runtime.calibration import copies_beyond_l2
from fisedit.runtime.kernels.attend_rows.triton import attend_rows
from fisedit.runtime.kernels.launch import cdiv
from fisedit.runtime.kernels.layer_norm_rows.triton import layer_norm_rows
from fisedit.runtime.kernels.multiply_rows import reference
from fisedit.runtime.kernels.multiply_rows import triton as kernel
from fisedit.runtime.kernels.multiply_rows.attend import multiply_attend
from fisedit.runtime.row_plan import bucket, buckets
from fisedit.runtime.tuning.blocks import BLOCKS, BlockCall
from fisedit.runtime.tuning.choose import RULE, Front, form_of, run_fastest, time_way, timings_of
from fisedit.runtime.tuning.product import LIBRARY, Product, Way, actives
from fisedit.runtime.tuning.pytorch_product import multiply_by_library, no_moments

NAMES = tuple(name for name in inspect.signature(reference.multiply_rows).parameters if name != "blocks")


def multiply_rows(*arguments: Any, **named: Any) -> Tensor:
    """The kernel of this name, in the fastest known way; see its reference.

    Interpreted on a CPU, nothing is timed.
    """
    blocks = {name: named.pop(name) for name in BLOCKS if name in named}
    return _compute({**dict(zip(NAMES, arguments, strict=False)), **named}, blocks)


def multiply_norm_rows(
    *product: Any,
    norm_affine: Tensor | None = None,
    norm_full: bool = False,
    norm_activation: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    norm_moments: bool = False,
    **blocks: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`multiply_rows`."""
    if norm_full:
        out = multiply_rows(*product, **blocks)
        return out, out, no_moments(out)
    norm = {"norm_affine": norm_affine, "norm_activation": norm_activation, "norm_weight": norm_weight,
            "norm_bias": norm_bias, "eps": eps, "norm_moments": norm_moments}  # fmt: skip
    return _compute({**dict(zip(NAMES, product, strict=False)), "norm": norm}, blocks)


def multiply_attend_rows(*product: Any, key: Tensor, value: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """As :func:`multiply_rows`."""
    text = {"key": key, "value": value, "heads": heads, "scale": scale}
    return _compute({**dict(zip(NAMES, product, strict=False)), "text": text})


def _compute(given: Mapping[str, Any], blocks: Mapping[str, Any] | None = None) -> Any:
    device = given["rows"].device
    if device.type != "cuda":
        return run(RULE, given)
    others = [BlockCall({**given, "blocks": blocks})] if blocks else []
    return run_fastest(Call(given), timings_of(device), others=others)


class Call:
    """A ``multiply_rows`` by its arguments, or one with a norm, or that attends, whose own are together as ``norm`` or
    ``text``; see :class:`fisedit.runtime.tuning.choose.Call`."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given, self.rows = given, rows_of(given)

    @cached_property
    def shape(self) -> Product:
        return Product.of(self.given)

    @cached_property
    def number(self) -> int:
        return self.rows if self.given["full"] else bucket(self.rows, max(self.rows, self.given["positions"]))

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        return (self.rows,) if self.given["full"] else buckets(max(self.rows, self.given["positions"]))

    @property
    def form(self) -> Hashable:
        return self.shape, form_of(self.given)

    def variant(self, way: Any) -> Any:
        return replace(way, split=min(way.split, 2)) if isinstance(way, kernel.Config) else way

    def run(self, way: Any) -> Any:
        return run(way, self.given)

    def rehearse(self, way: Any) -> Any:
        return run(way, timed(self.given, way))

    def prepare(self, ways: Iterable[Any]) -> None:
        """Rows may come with moments or without, as another way of their own product gives them."""
        given, rows = self.given, self.given["rows"]
        forms = [given]
        if given.get("center") is not None:
            other = int(given["moments"].shape[1] == 0)
            forms.append({**given, "moments": rows.new_ones(2, other, *rows.shape[:2], dtype=torch.float32)})
        for way in ways:
            for form in forms:
                run(way, form)

    def stopwatch(self, front: Front | None) -> Stopwatch:
        if front is None or not isinstance(front.call, Call) or not self.follows(front.call, front.made):
            return Stopwatch(self.given)
        return Stopwatch(self.given, Before(Stopwatch(front.call.given), front.way))

    def follows(self, product: Call, made: Any) -> bool:
        """Whether it is the second layer of a feed-forward, whose first layer is ``product``."""
        rows = made[0] if isinstance(made, tuple) else made
        second = product.shape.gated and self.given["sources"] is None and product.numbers == self.numbers
        return second and bool(rows.data_ptr() == self.given["rows"].data_ptr())


def rows_of(given: Mapping[str, Any]) -> int:
    """The rows of each sample that a ``multiply_rows`` makes, padding included."""
    return int((given["rows"] if given["sources"] is None else given["sources"]).shape[1])


def run(way: Way, given: Mapping[str, Any]) -> Any:
    """The rows; with a norm, them, what it makes of them, and their moments: one of these two."""
    if (text := given.get("text")) is not None:
        return _attend(way, given, text)
    if way == LIBRARY:
        return multiply_by_library(**given)
    product, norm = dict(given), given.get("norm")
    product.pop("norm", None)
    multiply = partial(kernel.multiply_rows, **product, config=way if isinstance(way, kernel.Config) else None)
    if norm is None:
        return multiply()
    if norm["norm_affine"] is None:
        if norm["norm_moments"]:
            out, moments = multiply(with_moments=True)
            return out, out, moments
        out = multiply()
        normalized = layer_norm_rows(out, norm["norm_weight"], norm["norm_bias"], norm["eps"], given["count"])
        return out, normalized, no_moments(out)
    normalized = given["rows"].new_empty(len(given["rows"]), rows_of(given), Product.of(given).columns)  # [B, N', Co]
    out = multiply(norm=(normalized, norm["norm_affine"], norm["norm_activation"]))
    return out, normalized, no_moments(out)


def _attend(way: Way, given: Mapping[str, Any], text: Mapping[str, Any]) -> Tensor:
    """What rows find in a text: by one kernel in a tile, or else by two."""
    product = {name: value for name, value in given.items() if name != "text"}
    if isinstance(way, kernel.Config):
        names = ("rows", "weight", "bias", "moments", "center", "count")
        own: dict[str, Any] = {name: product.get(name) for name in names}
        return multiply_attend(**own, input_eps=product.get("input_eps", 0.0), **text, config=way)
    queries = run(way, product)  # [B, N, h*d]
    key, value, heads, scale = text.values()
    return attend_rows(queries, key, value, None, None, None, given["count"], None, given["locks"], heads, scale)


def timed(given: Mapping[str, Any], way: Way) -> Mapping[str, Any]:
    """What a way is timed with. Rows that may come with moments do: for our kernel in as many parts as the product
    before has tiles, about. Before a library's product, a layer norm takes them."""
    if given.get("center") is None:
        return given
    rows = given["rows"]
    parts = 1 if way == LIBRARY else cdiv(rows.shape[2], 64)
    return {**given, "moments": rows.new_ones(2, parts, *rows.shape[:2], dtype=torch.float32)}


class Stopwatch:
    """Times the ways of a product on its very arguments, their rows repeated; what is the layer's own comes from
    memory.

    The second layer of a feed-forward behind the first one, which leaves no multiprocessor free: in a row of its own, a
    kernel begins while the one before it ends, which is itself, and some ways gain more from that than they do here.
    """

    def __init__(self, given: Mapping[str, Any], before: Before | None = None) -> None:
        self.given, self.real, self.before = given, max(1, int(given["count"])), before
        own = [name for name in ("weight", "bias", "center") if given.get(name) is not None]
        copies = copies_beyond_l2(*(given[name] for name in own), most=16)
        self.copies = [dict(zip(own, copy, strict=True)) for copy in copies]
        self.sized: tuple[int, dict[str, Any]] = (0, {})

    def __call__(self, way: Any, number: int) -> float:
        """µs for ``number`` rows of each sample; infinite where the GPU has too little for it."""
        product = Product.of(self.given)
        times = [self.time(self.runs(way, number, active), number, active) for active in actives(way, product, number)]
        return mean(times) + (product.between(way) if self.before is None else 0.0)

    def runs(self, way: Any, number: int, active: int) -> list[Callable[[], object]]:
        """The same call over different copies."""
        if self.sized[0] != number:
            self.sized = (number, self.with_rows(number))
        count = torch.full_like(self.given["count"], active)
        given = timed({**self.sized[1], "count": count}, way)
        return [partial(run, way, {**given, **copy}) for copy in self.copies]

    def time(self, runs: list[Callable[[], object]], number: int, active: int) -> float:
        """µs of a call by itself, or those that it adds to the one in front of it."""
        if self.before is None:
            return time_way(runs)
        before = self.before.watch.runs(self.before.way(number), number, active)
        if (number, active) not in self.before.alone:
            self.before.alone[number, active] = time_way(before)
        both = time_way([partial(_both, *pair) for pair in zip(cycle(before), runs, strict=False)])
        return both - self.before.alone[number, active] if math.isfinite(both) else both

    def with_rows(self, number: int) -> dict[str, Any]:
        """The arguments for ``number`` rows: the real ones over and over."""
        place = torch.arange(number, device=self.given["rows"].device) % self.real
        names = ("rows" if self.given["sources"] is None else "sources", "rows2", "rows3", "residual")
        changes = {name: self.given[name][:, place] for name in names if self.given.get(name) is not None}
        return {**self.given, **changes}


@dataclass
class Before:
    """The product in front of one that is timed.

    Attributes:
        way: how it is computed for so many rows. alone: µs by itself, by the rows of each sample, and those active.
    """

    watch: Stopwatch
    way: Callable[[int], Hashable]
    alone: dict[tuple[int, int], float] = field(default_factory=dict)


def _both(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()
