"""The kernels' calls at the shapes of Stable Diffusion 2's U-Net, which the scripts of this folder time and compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit.runtime.calibration import copies_beyond_l2
from fisedit.runtime.geometry import ConvGeometry, Upsample
from fisedit.runtime.plan import Table, project_mask
from fisedit.runtime.row_plan import LevelMasks, RowPlan

BATCH, TEXT, HEAD = 2, 77, 64
OPS = ("multiply_rows", "gather_patches", "finish_rows", "attend_rows", "normalize_rows", "fold_group_norms")
BLOCKS = "multiply_rows in blocks"
Run = Callable[..., object]


@dataclass(frozen=True)
class Level:
    """A level of the U-Net: lines, channels."""

    side: int
    channels: int


LEVELS = (Level(96, 320), Level(48, 640), Level(24, 1280), Level(12, 1280))
TINY_LEVELS = (Level(8, 64), Level(4, 128))


@dataclass(frozen=True)
class Case:
    """A kernel's call. ``runs`` and ``pytorch``: the same call over different copies of what comes from memory.
    ``read``: what they read by its address."""

    op: str
    shape: str
    level: Level
    rows: int
    macs: int
    bytes: int
    runs: Sequence[Run]
    pytorch: Sequence[Run]
    read: Sequence[Tensor] = ()


class Cases:
    """The kernels' calls at one level under a mask of the latent.

    Args:
        kernels: the functions of ``OPS`` by name, and ``BLOCKS``.
    """

    def __init__(
        self, kernels: dict[str, Callable[..., Any]], level: Level, mask: Tensor, device: torch.device, dtype: str
    ) -> None:
        self.kernels, self.level, self.device, self.dtype = kernels, level, device, getattr(torch, dtype)
        self.active = project_mask(mask, (level.side, level.side)).to(device)
        self.number = int(self.active.sum())
        self.count = torch.tensor([self.number], dtype=torch.int32, device=device)
        self.locks = torch.zeros(1 << 16, dtype=torch.int32, device=device)

    def make(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * 0.1

    def rows(self, channels: int) -> Tensor:
        return self.make(BATCH, self.number, channels)

    def case(
        self, op: str, shape: str, macs: int, moved: list[Tensor], runs: Sequence[Run], library: Sequence[Run]
    ) -> Case:
        moved_bytes = sum(tensor.numel() * tensor.element_size() for tensor in moved)
        return Case(op, shape, self.level, self.number, macs, moved_bytes, runs, library)

    def all(self) -> Iterator[Case]:
        c = self.level.channels
        yield self.convolution(c, c)
        yield self.convolution(2 * c, c)
        if self.level not in (LEVELS[-1], TINY_LEVELS[-1]):
            yield self.in_blocks(c, c)
            yield self.in_blocks(2 * c, c)
            before = min(2 * c, LEVELS[-1].channels)
            yield self.in_blocks(before, before, upsampled=True)
        yield self.patches(c)
        yield self.finish(c)
        yield self.linear(c, 3 * c)
        yield self.linear(c, c, residual=True)
        yield self.linear(c, 4 * c, gated=True)
        yield self.linear(4 * c, c, residual=True)
        yield self.self_attention()
        yield self.text_attention()
        yield self.normalization()

    def convolution(self, inputs: int, outputs: int) -> Case:
        """3x3, with bias and residual; neighbors outside the mask from the recorded map."""
        rows, bias, residual = self.rows(inputs), self.make(outputs), self.rows(outputs)
        sources = neighbor_sources(self.active)  # [1, N, 9]
        both = copies_beyond_l2(
            self.make(outputs, 9 * inputs), self.make(BATCH, self.active.numel(), inputs)
        )  # weights, recorded maps
        runs = [
            self.multiply(rows, weight, sources=sources, recorded=recorded, bias=bias, residual=residual)
            for weight, recorded in both
        ]
        patches = self.make(BATCH, self.number, 9 * inputs)
        library = [partial(F.linear, patches, weight) for weight, _ in both]
        moved = [rows, both[0][0], self.halo(sources, inputs), residual, residual, sources]
        macs = BATCH * self.number * 9 * inputs * outputs
        return self.case("multiply_rows", f"conv 3x3 {inputs} to {outputs}", macs, moved, runs, library)

    def in_blocks(self, inputs: int, outputs: int, upsampled: bool = False) -> Case:
        """3x3, with bias, in blocks of 2x2 outputs; over a map of half the size, if that is upsampled. Its products are
        counted as it makes them."""
        large, small = (self.level.side,) * 2, (self.level.side // 2,) * 2
        block = ConvGeometry(large, small, (4, 4), (2, 2), (1, 1), (1, 1))
        source = small if upsampled else large
        own = ConvGeometry(source, large, (3, 3), (1, 1), (1, 1), (1, 1), Upsample(large, None) if upsampled else None)
        read = ConvGeometry(small, small, (3, 3), (1, 1), (1, 1), (1, 1)) if upsampled else block
        keys = {"sources": Table("sources", own), "block_sources": Table("sources", read),
                "block_count": Table("number", small), "places": Table("places", block)}  # fmt: skip
        masks = LevelMasks(self.active[None].cpu(), [large, small])
        plan = RowPlan(keys.values(), masks.buckets, BATCH, self.device)
        plan.write(masks)
        tables = {name: plan.table(key) for name, key in keys.items()}
        rows, bias, sums = self.make(BATCH, plan.rows(source), inputs), self.make(outputs), 9 if upsampled else 16
        both = copies_beyond_l2(self.make(sums * outputs, inputs), self.make(BATCH, source[0] * source[1], inputs))
        given = {"rows": rows, "bias": bias, "count": self.count, "locks": self.locks, "full": False, "gated": False,
                 "activation": "none", "positions": self.active.numel(), "weight": self.make(outputs, 9 * inputs),
                 **dict.fromkeys(("rows2", "affine", "residual"))}  # fmt: skip
        runs = [
            partial(self.kernels[BLOCKS], **given, **tables, recorded=recorded, block_weight=weight)
            for weight, recorded in both
        ]
        patches = self.make(BATCH, self.number, 9 * inputs)
        library = [partial(F.linear, patches, given["weight"])]
        blocks = int(masks.counts[small][0])
        moved = [rows, both[0][0], self.rows(outputs), *(t for t in tables.values() if isinstance(t, Tensor))]
        shape = f"conv 3x3 {inputs} to {outputs}, {'upsampled, ' * upsampled}in blocks"
        return self.case(BLOCKS, shape, BATCH * blocks * sums * inputs * outputs, moved, runs, library)

    def patches(self, channels: int) -> Case:
        """What the library's product needs before it: the gathered inputs of a 3x3 convolution."""
        rows, sources = self.rows(channels), neighbor_sources(self.active)
        recorded = [maps for (maps,) in copies_beyond_l2(self.make(BATCH, self.active.numel(), channels))]
        runs = [partial(self.kernels["gather_patches"], rows, maps, sources, self.count) for maps in recorded]
        moved = [rows, self.halo(sources, channels), self.make(BATCH, self.number, 9 * channels), sources]
        return self.case("gather_patches", f"3x3 of {channels}", 0, moved, runs, [])

    def finish(self, channels: int) -> Case:
        """What follows the library's product: bias and residual."""
        product, bias, residual = self.rows(channels), self.make(channels), self.rows(channels)
        run = partial(self.kernels["finish_rows"], product, bias, None, residual, self.count, "none", False)
        moved = [product, residual, product, bias]
        return self.case("finish_rows", f"{channels} channels, bias, residual", 0, moved, [run], [])

    def halo(self, sources: Tensor, channels: int) -> Tensor:
        """As many recorded rows as a table reads."""
        return self.make(BATCH, len(sources[sources >= self.number].unique()), channels)

    def linear(self, inputs: int, outputs: int, *, residual: bool = False, gated: bool = False) -> Case:
        """A linear layer, with a residual after it, or GEGLU."""
        width = outputs * (2 if gated else 1)
        rows, added = self.rows(inputs), self.rows(outputs) if residual else None
        weights = [weight for (weight,) in copies_beyond_l2(self.make(width, inputs))]
        options = {"bias": self.make(width), "residual": added, "gated": gated,
                   "activation": "gelu" if gated else "none"}  # fmt: skip
        runs = [self.multiply(rows, weight, **options) for weight in weights]
        library = [partial(F.linear, rows, weight) for weight in weights]
        moved = [rows, weights[0], self.rows(outputs), *([added] if added is not None else [])]
        note = ", GEGLU" if gated else ", residual" if residual else ""
        name = f"linear {inputs} to {outputs}{note}"
        macs = BATCH * self.number * inputs * width
        return self.case("multiply_rows", name, macs, moved, runs, library)

    def multiply(self, rows: Tensor, weight: Tensor, **options: Any) -> Run:
        nothing = dict.fromkeys(("rows2", "recorded", "sources", "bias", "affine", "residual"))
        given = {
            **nothing,
            "full": False,
            "activation": "none",
            "gated": False,
            "positions": self.active.numel(),
            **options,
        }
        multiply_rows = self.kernels["multiply_rows"]
        return partial(multiply_rows, rows, weight=weight, count=self.count, locks=self.locks, **given)

    def self_attention(self) -> Case:
        """Over the recorded keys and values, those of the active rows renewed."""
        c, positions = self.level.channels, self.active.numel()
        query, key, value = (self.rows(c) for _ in range(3))
        recorded = copies_beyond_l2(self.make(BATCH, positions, c), self.make(BATCH, positions, c))
        table = position_table(self.active)  # [1, R]
        heads = c // HEAD
        attend_rows = self.kernels["attend_rows"]
        runs = [
            partial(attend_rows, query, key, value, k, v, table, self.count, None, self.locks, heads, None)
            for k, v in recorded
        ]
        moved = [query, query, *recorded[0], table]
        macs = 2 * BATCH * self.number * positions * c
        library = [attention_run(query, k, v, heads) for k, v in recorded]
        return self.case("attend_rows", f"self, {heads} heads, {positions} keys", macs, moved, runs, library)

    def text_attention(self) -> Case:
        c = self.level.channels
        heads = c // HEAD
        query = self.rows(c)
        key, value = (self.make(BATCH, TEXT, c) for _ in range(2))
        attend_rows = self.kernels["attend_rows"]
        runs = [partial(attend_rows, query, key, value, None, None, None, self.count, None, self.locks, heads, None)]
        split = [rows.unflatten(2, (heads, HEAD)).transpose(1, 2).contiguous() for rows in (query, key, value)]
        library = [partial(F.scaled_dot_product_attention, *split)]  # [B, h, N, d]
        macs = 2 * BATCH * self.number * TEXT * c
        moved = [query, query, key, value]
        return self.case("attend_rows", f"text, {heads} heads, {TEXT} keys", macs, moved, runs, library)

    def normalization(self) -> Case:
        c = self.level.channels
        rows, affine = self.rows(c), torch.ones(2, BATCH, c, device=self.device)
        normalize_rows = self.kernels["normalize_rows"]
        run = partial(normalize_rows, rows, None, affine, "silu", self.count)
        return self.case("normalize_rows", f"{c} channels, SiLU", 0, [rows, rows, affine], [run], [])

    def folding(self, norms: int) -> Case:
        """The statistics of ``norms`` normalizations, 32 groups each, as scales and offsets: once a call."""
        c = self.level.channels
        recorded = [torch.ones(BATCH, 32, device=self.device) for _ in range(2 * norms)]
        weight, bias, shift = (self.make(norms * c) for _ in range(3))
        slots, groups, channels = list(range(norms)), [32] * norms, [c] * norms
        fold = self.kernels["fold_group_norms"]
        means, rstds = slots, [norms + slot for slot in slots]
        given: list[Tensor] | Tensor = recorded
        if self.device.type == "cuda":  # by address, as an edit gives them
            given = torch.tensor([[row.data_ptr() for row in each] for each in recorded], device=self.device)
        run = partial(fold, given, means, rstds, groups, channels, weight, bias, shift[None])
        moved = [*recorded, weight, bias, shift, torch.empty(2, BATCH, norms * c)]
        case = self.case("fold_group_norms", f"{norms} norms of {c} channels", 0, moved, [run], [])
        return replace(case, read=recorded)


def attention_run(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Run:
    split = [t.unflatten(2, (heads, HEAD)).transpose(1, 2).contiguous() for t in (query, key, value)]  # [B, h, *, d]
    return partial(F.scaled_dot_product_attention, *split)


def position_table(active: Tensor) -> Tensor:
    """int32 ``[1, R]``: for each position the active row that holds it, else N + its number."""
    flat = active.flatten()
    number = int(flat.sum())
    table = number + torch.arange(flat.numel(), device=flat.device)
    table[flat] = torch.arange(number, device=flat.device)
    return table[None].int()


def neighbor_sources(active: Tensor) -> Tensor:
    """int32 ``[1, N, 9]``: the rows that each active output of a padded 3x3 convolution reads; -1 outside the map."""
    height, width = active.shape
    table = F.pad(position_table(active).view(height, width), (1, 1, 1, 1), value=-1)
    y, x = active.nonzero(as_tuple=True)
    return torch.stack([table[y + dy, x + dx] for dy in range(3) for dx in range(3)], -1)[None]


def load_kernels(provider: str) -> dict[str, Callable[..., Any]]:
    """The functions of ``OPS`` that a provider has, and ``BLOCKS``: a convolution in blocks, if the provider has it."""
    found = {op: getattr(import_module(f"fisedit.runtime.kernels.{op}.{provider}"), op) for op in OPS}
    if provider == "reference":
        return {**found, BLOCKS: found["multiply_rows"]}
    return {**found, BLOCKS: in_blocks}


def in_blocks(**given: Any) -> Any:
    """A convolution whose arguments for blocks are not apart, by Triton's kernels."""
    blocks = import_module("fisedit.runtime.tuning.blocks")
    return blocks.run_blocks(**given, blocks={name: given[name] for name in blocks.BLOCKS})
