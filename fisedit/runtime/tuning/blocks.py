"""3x3 convolutions in blocks of 2x2 outputs: timed by numbers of blocks, not of rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fisedit.runtime.calibration import copies_beyond_l2
from fisedit.runtime.kernels.multiply_rows.winograd import multiply_winograd
from fisedit.runtime.row_plan import bucket, buckets, typical
from fisedit.runtime.tuning.choose import RULE, Front, form_of, time_way
from fisedit.runtime.tuning.product import Blocks
from fisedit.runtime.tuning.pytorch_product import no_moments

BLOCKS = ("block_sources", "block_count", "places", "block_weight")
"""What a convolution has for the blocks of its outputs."""


class BlockCall:
    """A ``multiply_rows`` that has blocks, by its arguments, those together as ``blocks``, and a norm's as ``norm``;
    see :class:`fisedit.runtime.tuning.choose.Call`."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given, self.blocks = given, int(given["blocks"]["places"].shape[1])

    @cached_property
    def shape(self) -> Blocks:
        return Blocks.of(self.given)

    @cached_property
    def number(self) -> int:
        return self.blocks if self.given["full"] else bucket(self.blocks, self.most)

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        return (self.blocks,) if self.given["full"] else buckets(self.most)

    @property
    def most(self) -> int:
        return max(self.blocks, self.given["positions"] // 4)

    @property
    def form(self) -> Hashable:
        return self.shape, form_of(self.given)

    def variant(self, way: Any) -> Any:
        return way

    def run(self, way: Any) -> Any:
        return run_blocks(**self.given)

    def rehearse(self, way: Any) -> Any:
        return self.run(way)

    def prepare(self, ways: Iterable[Any]) -> None:
        for way in set(ways) - {RULE}:  # which stands for nothing here
            self.run(way)

    def stopwatch(self, front: Front | None) -> BlockStopwatch:
        return BlockStopwatch(self.given)


def run_blocks(
    rows: Tensor, recorded: Tensor | None, sources: Tensor, weight: Tensor, bias: Tensor | None,
    affine: Tensor | None, full: bool, residual: Tensor | None, activation: str, blocks: Mapping[str, Any],
    norm: Mapping[str, Any] | None = None, **_: Any,
) -> Any:  # fmt: skip
    """The rows; with a norm, them and what it makes of them, and no moments."""
    number = sources.shape[1]
    if full:
        affine, activation = None, "none"
    given = (rows, recorded, bias, affine, residual, activation, number)
    if norm is None:
        return multiply_winograd(*given, **blocks)
    normalized = rows.new_empty(len(rows), number, weight.shape[0])  # [B, N', Co]
    out = multiply_winograd(*given, **blocks, norm=(normalized, norm["norm_affine"], norm["norm_activation"]))
    return out, normalized, no_moments(out)


class BlockStopwatch:
    """Times a convolution in blocks on its very arguments, its blocks repeated; weights come from memory."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given, blocks = given, given["blocks"]
        self.real, self.outputs = max(1, int(blocks["block_count"])), max(1, int(given["count"]))
        self.weights = [weight for (weight,) in copies_beyond_l2(blocks["block_weight"], most=16)]

    def __call__(self, way: Any, number: int) -> float:
        """µs for ``number`` blocks of each sample; infinite where the GPU has too little for it."""
        shape = Blocks.of(self.given)
        return time_way(self.runs(number)) + shape.product.between(way)

    def runs(self, number: int) -> list[Callable[[], object]]:
        """The same call over different copies."""
        given = self.with_blocks(number)
        return [partial(run_blocks, **{**given, "blocks": {**given["blocks"], "block_weight": weight}})
                for weight in self.weights]  # fmt: skip

    def with_blocks(self, number: int) -> dict[str, Any]:
        """The arguments for ``number`` blocks, padding included: the real ones over and over, each output once."""
        given, blocks = self.given, self.given["blocks"]
        block = torch.arange(number, device=given["rows"].device) % self.real
        output = torch.arange(4 * number, device=block.device) % self.outputs
        changes = {name: given[name][:, output] for name in ("sources", "residual") if given[name] is not None}
        there = blocks["places"][:, block] >= 0  # [M, T, 4]
        turn = there.flatten(1).cumsum(1, dtype=torch.int32).view(there.shape) - 1
        active = number if given["full"] else typical(number)
        own = {
            "block_sources": blocks["block_sources"][:, block], "places": torch.where(there, turn, -1),
            "block_count": torch.full_like(blocks["block_count"], active),
        }  # fmt: skip
        return {**given, **changes, "blocks": {**blocks, **own}}
