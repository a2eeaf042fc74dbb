"""Self-attention of active rows in the way that is fastest for its shape on this GPU."""

from __future__ import annotations

import inspect
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from fisedit.runtime.calibration import copies_beyond_l2
from fisedit.runtime.kernels.attend_rows import reference
from fisedit.runtime.kernels.attend_rows import triton as kernel
from fisedit.runtime.kernels.attend_rows.config import (
    MULTIPROCESSORS,
    Config,
    best_programs,
    choose_config,
    deepen,
    partial_bytes,
)
from fisedit.runtime.kernels.gather_keys.triton import gather_keys
from fisedit.runtime.kernels.launch import cdiv, current, specializes
from fisedit.runtime.row_plan import LOCKS, bucket, buckets, smallest, typical
from fisedit.runtime.tuning.choose import RULE, Front, form_of, run_fastest, time_way, timings_of

CUDNN = "cudnn"
Way = str | Config
"""The kernel by its own rule, in a configuration, or cuDNN's attention after keys and values are gathered."""
TILES = {
    64: (
        Config(64, 32, 4, 5),
        Config(64, 64, 4, 5),
        Config(64, 128, 4, 3),
        Config(128, 64, 4, 5),
        Config(64, 128, 4, 3, whole=True),
    ),
    128: (Config(64, 32, 4, 5), Config(64, 64, 4, 5), Config(64, 64, 4, 3, registers=168)),
    256: (Config(64, 32, 4, 3), Config(64, 64, 8, 3)),
}
"""By the channels of a head, at most."""
SPECIALIZED = Config(192, 128, 4, 6, specialized=True)
"""For heads of up to 64 channels, and more queries than two of its groups attend for."""
SHARINGS = 2
"""Numbers of programs that are timed of each tile: the best ones, as far as one can tell."""
LARGEST_CUDNN = 128
"""Channels of a head that it takes."""
LEAST_WORK = 1 << 32
"""Multiply-adds from which on it may pay to put keys and values in one piece first."""
NAMES = tuple(inspect.signature(reference.attend_rows).parameters)


def attend_rows(*arguments: Any, **named: Any) -> Tensor:
    """The kernel of this name, over a recorded map in the fastest known way; see its reference.

    Interpreted on a CPU, nothing is timed.
    """
    given = {**dict(zip(NAMES, arguments, strict=False)), **named}
    if given["query"].is_cuda and has_ways(given):
        return run_fastest(Call(given), timings_of(given["query"].device))
    return run(RULE, given)


def has_ways(given: Mapping[str, Any]) -> bool:
    """Whether there is a choice: over a whole map, in half precision, of rows that begin at multiples of 16 bytes."""
    query = given["query"]
    head_dim = query.shape[2] // given["heads"]
    if given["table"] is None or given["key_count"] is not None or query.element_size() != 2 or head_dim > 256:
        return False
    steps = (head_dim, query.stride(0), query.stride(1))
    return query.stride(2) == 1 and query.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps)


@dataclass(frozen=True)
class Attention:
    """The shape of a self-attention, all but the number of queries: what its timings are kept by."""

    batch: int
    heads: int
    head_dim: int
    keys: int
    dtype: torch.dtype

    @staticmethod
    def of(given: Mapping[str, Any]) -> Attention:
        """That of the arguments of an ``attend_rows`` with a table."""
        (batch, _, width), heads = given["query"].shape, given["heads"]
        return Attention(batch, heads, width // heads, given["table"].shape[1], given["query"].dtype)

    @property
    def kind(self) -> str:
        return "self-attention"

    @property
    def key(self) -> tuple[str, ...]:
        shape = f"{self.batch} x {self.heads} heads of {self.head_dim}, {self.keys} keys"
        return (shape, str(self.dtype).removeprefix("torch."))

    def ways(self, rows: int) -> list[Way]:
        """See :class:`fisedit.runtime.calibration.Shape`."""
        return candidates(self, rows)

    @property
    def tiles(self) -> tuple[Config, ...]:
        largest = next(largest for largest in TILES if self.head_dim <= largest)
        return TILES[largest] + ((SPECIALIZED,) if largest == 64 and specializes() else ())

    def workspace(self, way: Any, rows: int) -> int:
        """Bytes that a way needs besides what it reads and gives: gathered keys and values, and sums in parts."""
        pairs, item = self.batch * self.heads, self.dtype.itemsize
        whole = 2 * pairs * self.keys * self.head_dim * item
        if way == CUDNN:
            return whole
        rule = choose_config(rows, self.keys, self.head_dim, pairs, item, True)
        tile = way if isinstance(way, Config) else rule
        return whole * tile.whole + partial_bytes(tile, rows, pairs, self.head_dim, LOCKS)


def candidates(attention: Attention, number: int) -> list[Way]:
    """The ways that are worth timing for ``number`` queries of each sample."""
    pairs, active = attention.batch * attention.heads, typical(number)
    shape = (active, attention.keys, pairs)
    work, ways = 2 * math.prod(shape) * attention.head_dim, list[Way]()
    for tile in attention.tiles:
        few = 64 * (2 if tile.specialized else 1)
        if (tile.m <= 64 or number > few) and (tile.n > 32 or number <= 512) and (not tile.whole or work >= LEAST_WORK):
            shared = (replace(tile, programs=each) for each in best_programs(tile, *shape)[:SHARINGS])
            ways += [deepen(way, active, pairs, attention.head_dim) for way in shared]
    return ways + [CUDNN] * (attention.head_dim <= LARGEST_CUDNN and work >= LEAST_WORK)


def actives(way: Way, attention: Attention, number: int) -> tuple[int, ...]:
    """With how many queries active a way is timed for a padded number: typically many; or the fewest and the most, if
    between them a further round of tiles begins."""
    ends = smallest(number), number
    if isinstance(way, Config) and not way.programs:
        pairs = attention.batch * attention.heads
        if len({cdiv(cdiv(active, way.m) * pairs, MULTIPROCESSORS) for active in ends}) > 1:
            return ends
    return (typical(number),)


class Call:
    """An ``attend_rows`` with a table by its arguments; see :class:`fisedit.runtime.tuning.choose.Call`."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given, self.shape = given, Attention.of(given)
        self.number, self.numbers = bucket(given["query"].shape[1], self.shape.keys), buckets(self.shape.keys)

    @property
    def form(self) -> Hashable:
        return self.shape, form_of(self.given)

    def variant(self, way: Any) -> Any:
        return replace(way, programs=min(way.programs, 1)) if isinstance(way, Config) else way

    def run(self, way: Any) -> Tensor:
        return run(way, self.given)

    def rehearse(self, way: Any) -> Tensor:
        return run(way, self.given)

    def prepare(self, ways: Iterable[Any]) -> None:
        for way in ways:
            run(way, self.given)

    def stopwatch(self, front: Front | None) -> Stopwatch:
        return Stopwatch(self.given)  # by itself: what is in front of it takes little beside it


def run(way: Way, given: Mapping[str, Any]) -> Tensor:
    config = way if isinstance(way, Config) else None
    if way == CUDNN or (config is not None and config.whole):
        given = {**given, **in_one_piece(given)}
    return _cudnn(given) if way == CUDNN else kernel.attend_rows(**given, config=config)


def in_one_piece(given: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """Arguments for keys and values ``[B, R, C]`` of whole maps, which are made of the recorded and the active rows."""
    names = ("key", "value", "recorded_key", "recorded_value", "table")
    key, value = gather_keys(*(given[name] for name in names))
    return dict(zip(names, (key, value, None, None, None), strict=True))


def _cudnn(given: Mapping[str, Any]) -> Tensor:
    """By its own op, since to allow only this library in ``scaled_dot_product_attention`` would be a setting of all
    threads."""
    query, rehearsal = given["query"], current()
    if rehearsal is not None:
        rehearsal.skipped = True
        return query.new_empty(query.shape)  # nothing to compile
    split = [given[name].unflatten(2, (given["heads"], -1)).transpose(1, 2) for name in ("query", "key", "value")]
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(*split, None, False, scale=given["scale"])[0]
    return out.transpose(1, 2).flatten(2)  # laid out as the query was: no copy


class Stopwatch:
    """Times the ways of a self-attention on random rows; recorded maps come from memory."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given, attention, query = given, Attention.of(given), given["query"]
        shape = (attention.batch, attention.keys, query.shape[2])
        self.maps = copies_beyond_l2(*(_random(query, *shape) for _ in range(2)), most=16)
        self.recorded = [tuple(map(self.read_as_given, pair)) for pair in self.maps]
        self.sized: tuple[tuple[int, int], dict[str, Any]] = ((0, 0), {})

    def __call__(self, way: Any, number: int) -> float:
        """µs for ``number`` queries of each sample; infinite where the GPU or a library cannot do it."""
        times = []
        for active in actives(way, Attention.of(self.given), number):
            if self.sized[0] != (number, active):
                self.sized = ((number, active), self.with_rows(number, active))
            given = self.sized[1]
            runs = [
                partial(run, way, {**given, "recorded_key": key, "recorded_value": value})
                for key, value in self.recorded
            ]
            if way == CUDNN:
                try:
                    runs[0]()
                except RuntimeError:  # not for these shapes, this GPU or this build of PyTorch
                    return math.inf
            times.append(time_way(runs))
        return mean(times)

    def read_as_given(self, recorded: Tensor) -> Tensor:
        """A map ``[B, R, C]``, or the addresses int64 ``[B]`` of its samples."""
        if self.given["recorded_key"].dtype != torch.int64:
            return recorded
        return torch.tensor([sample.data_ptr() for sample in recorded], device=recorded.device)

    def with_rows(self, number: int, active: int) -> dict[str, Any]:
        """The arguments for ``number`` queries, ``active`` of them no padding: slices of one buffer, as projections of
        one product are."""
        batch, _, width = self.given["query"].shape
        masks, positions = self.given["table"].shape
        query, key, value = _random(self.given["query"], batch, number, 3 * width).chunk(3, -1)
        place = torch.arange(positions, device=self.given["table"].device, dtype=torch.int32)
        table = place.where(place < active, place + number).repeat(masks, 1)  # [M, R]
        count = torch.full_like(self.given["count"], active)
        return {**self.given, "query": query, "key": key, "value": value, "table": table, "count": count}


def _random(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=like.dtype, device=like.device)
