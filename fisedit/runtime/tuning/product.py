"""The shapes of products of rows, the ways to compute them, and what each takes by a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from fisedit.runtime.kernels.launch import CachedByGpu, cdiv, shared_memory, specializes, starts_early
from fisedit.runtime.kernels.multiply_rows.attend import blocks_of
from fisedit.runtime.kernels.multiply_rows.triton import Config, choose, split_of
from fisedit.runtime.kernels.share_out import MOST_PARTS
from fisedit.runtime.row_plan import LOCKS, smallest, typical
from fisedit.runtime.tuning.choose import RULE

LIBRARY = "library"
WINOGRAD = "winograd"
Way = str | Config
"""The kernel by its own rule, in a configuration, or PyTorch's product with kernels before and after it: of the rows,
or of the sums of ``winograd.py``."""
TILES = (
    Config(16, 64, 128, 4, 6),
    Config(32, 64, 128, 4, 6),
    Config(64, 32, 128, 4, 4),
    Config(64, 64, 128, 4, 7),
    Config(64, 64, 64, 4, 7),
    Config(64, 128, 64, 4, 4),
    Config(64, 128, 128, 4, 4),
    Config(64, 128, 128, 8, 4),
    Config(128, 64, 64, 4, 4),
    Config(128, 64, 64, 8, 4),
    Config(128, 64, 128, 4, 4),
    Config(128, 128, 64, 8, 4),
    Config(128, 256, 64, 8, 3),
)
SPECIALIZED = (
    Config(64, 32, 128, 4, 8, specialized=True),
    Config(64, 64, 128, 4, 8, specialized=True),
    Config(64, 64, 64, 4, 8, specialized=True),
    Config(64, 128, 64, 4, 8, specialized=True),
    Config(64, 128, 128, 4, 4, specialized=True),
    Config(128, 64, 64, 4, 8, specialized=True),
    Config(128, 64, 128, 4, 4, specialized=True),
    Config(128, 128, 64, 8, 8, specialized=True),
)
"""Tiles whose warps have tasks of their own: some load, some multiply."""
TURNS = (
    Config(64, 64, 64, 4, 8, specialized=True, turns=True),
    Config(64, 128, 64, 4, 5, specialized=True, turns=True),
    Config(128, 64, 64, 4, 6, specialized=True, turns=True),
)
"""Such tiles of linear layers that two groups of warps take in turn."""
MULTIPROCESSORS = 132
LEAST_STEPS = 4
"""Of the inner dimension, for a program of a split product."""
TIMED = 3
"""Tiles of a kernel that are timed: those that the model takes for the fastest. Of the first kernel it is one where
others can do it: theirs are seldom slower."""
HOPELESS = 1.4
"""Times the best estimate: tiles that take longer by the model are not timed."""
LIBRARY_BETWEEN, GATED_TURNS_BETWEEN = 1.5, 4.0
"""µs on an H100, by calls of whole models: of a library's product, and of a gated one in turns."""
BARRIERS, DEVIATION = 512, 8
"""Bytes of shared memory at most by which warps of different tasks wait for each other, and of what they tell of a
row."""


@dataclass(frozen=True)
class Product:
    """The shape of a product of rows, all but their number: what its timings are kept by.

    Args:
        taps: rows that an output reads; 0 for a linear layer.
        channels: of one row, of all three sources. outputs: rows of the weight.
        fused: what else is computed, from :func:`fused_parts`.
        text: channels of a head and keys of the text that its rows attend to; zeros for none.
    """

    taps: int
    batch: int
    channels: tuple[int, int, int]
    outputs: int
    dtype: torch.dtype
    fused: str
    text: tuple[int, int] = (0, 0)

    @staticmethod
    def of(given: Mapping[str, Any]) -> Product:
        """That of the arguments of a ``multiply_rows``."""
        rows, sources = given["rows"], given["sources"]
        rows2, rows3 = (0 if more is None else more.shape[2] for more in (given["rows2"], given.get("rows3")))
        fused = fused_parts(given, given["full"], norm_of(**given["norm"]) if "norm" in given else "")
        taps = 0 if sources is None else sources.shape[2]
        channels, outputs = (rows.shape[2], rows2, rows3), given["weight"].shape[0]
        text = given.get("text")
        attends = (0, 0) if text is None else (outputs // text["heads"], text["key"].shape[1])
        return Product(taps, len(rows), channels, outputs, rows.dtype, fused, attends)

    @property
    def kind(self) -> str:
        return f"convolution of {self.taps} taps" if self.taps else "linear"

    @property
    def key(self) -> tuple[str, ...]:
        inputs = "+".join(str(channels) for channels in self.channels if channels)
        attends = f" heads of {self.text[0]}, {self.text[1]} keys" if self.text[1] else ""
        fused = (self.fused + attends).strip()
        return (f"{self.batch} x {inputs} to {self.outputs}", str(self.dtype).removeprefix("torch."), fused)

    def ways(self, rows: int) -> list[Way]:
        """The tiles that the model takes for the fastest, and PyTorch's product; see :class:`Shape`."""
        return ways(self, rows)

    def between(self, way: Any) -> float:
        """µs that a way takes more between other kernels than in a row of its own. Where kernels may start before those
        in front of them end, a library's do not."""
        if isinstance(way, Config):
            return GATED_TURNS_BETWEEN if way.turns and self.gated else 0.0
        return LIBRARY_BETWEEN if way in (LIBRARY, WINOGRAD) and starts_early() else 0.0

    def workspace(self, way: Any, rows: int) -> int:
        """Bytes that a way needs besides what it reads and gives."""
        return workspace(way, self, rows)

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


@dataclass(frozen=True)
class Blocks:
    """The shape of a 3x3 convolution in blocks of 2x2 outputs, all but their number: what its timings are kept by.

    Args:
        sums: of a block, 16, or 9 of a map that is upsampled.
    """

    product: Product
    sums: int

    @staticmethod
    def of(given: Mapping[str, Any]) -> Blocks:
        """That of the arguments of a ``multiply_rows`` that has blocks."""
        return Blocks(Product.of(given), given["blocks"]["block_sources"].shape[2])

    @property
    def kind(self) -> str:
        return "convolution of 9 taps in blocks"

    @property
    def key(self) -> tuple[str, ...]:
        shape, dtype, fused = self.product.key
        return shape, dtype, (fused + " upsampled" * (self.sums == 9)).strip()

    def ways(self, blocks: int) -> list[Way]:
        """There is one."""
        return [WINOGRAD]

    def workspace(self, way: Any, blocks: int) -> int:
        """Bytes of the sums and of their products."""
        (channels, *_), product = self.product.channels, self.product
        return self.sums * product.batch * blocks * (channels + product.outputs) * product.dtype.itemsize


def norm_of(norm_affine: Any = None, **_: Any) -> str:
    """The norm of a ``multiply_norm_rows``, by its keywords."""
    return "layer_norm" if norm_affine is None else "normalize"


def fused_parts(given: Mapping[str, Any], full: bool, norm: str = "") -> str:
    """What a ``multiply_rows`` does besides multiplying, by its arguments; ``norm``: what it makes of its rows too."""
    parts = [name for name in ("bias", "affine", "residual") if given[name] is not None]
    if given["activation"] != "none":
        parts.append(given["activation"])
    if given.get("center") is not None:
        parts.append("moments")
    return " ".join(parts + ["gated"] * given["gated"] + ["full"] * full + [norm] * bool(norm))


@CachedByGpu
def candidates(product: Product, rows: int) -> list[Config]:
    """All tiles that can compute a product of so many rows of each sample, split as the model likes best."""
    if product.dtype == torch.float32 or product.steps(1) < 64:
        return []
    tiles = TILES + SPECIALIZED + TURNS if specializes() else TILES
    return [fit(tile, product, rows) for tile in tiles if _makes_sense(tile, product, product.batch * rows)]


def _makes_sense(tile: Config, product: Product, rows: int) -> bool:
    """Whether a tile suits a number of rows, takes channels in whole chunks if one does, and is pipelined."""
    fewest = 64 if product.text[1] else 16
    if tile.m > max(fewest, 2 * rows) or (tile.m < 64 and rows > 4 * tile.m):
        return False
    if product.text[1] and (tile.n != product.text[0] or tile.m < 16 * tile.warps or tile.turns):
        return False  # a tile has the columns of one head, and a warp whole rows of them
    of_kernel = TURNS if tile.turns else SPECIALIZED if tile.specialized else TILES
    alike = [other for other in of_kernel if (other.m, other.n) == (tile.m, tile.n)]
    if len({other.warps for other in alike if other.k == tile.k}) > 1 and (tile.warps == 8) != (product.taps > 1):
        return False  # eight warps gather rows faster, and load none faster that lie side by side
    in_whole_chunks = [other for other in alike if not any(channels % other.k for channels in product.channels)]
    if any(channels % tile.k for channels in product.channels) and (
        tile.specialized or product.channels[1] or in_whole_chunks
    ):
        return False
    sums = tile.m * wide(tile, product) // (32 * tile.warps)  # of each thread, in registers
    return sums <= 128 and _deepest(tile, product, shared_memory()) >= 3 and not (tile.turns and product.taps)


@CachedByGpu
def ways(product: Product, rows: int) -> list[Way]:
    """See :meth:`Product.ways`. The rule stands in where there is no tile; of the few tiles that a text leaves, whose
    attention the model does not know, all that have warps of different tasks are timed."""
    tiles = sorted(candidates(product, rows), key=lambda way: estimate(way, product, rows))
    if not tiles:
        return [RULE, LIBRARY]
    most, some = HOPELESS * estimate(tiles[0], product, rows), TIMED
    if product.text[1]:
        most, some = math.inf, len(tiles)
    hopeful = [tile for tile in tiles if estimate(tile, product, rows) <= most]
    plain = [tile for tile in hopeful if not tile.specialized]
    specialized = [tile for tile in hopeful if tile.specialized and not tile.turns][:some]
    turns = [tile for tile in hopeful if tile.turns][:TIMED]
    return [*plain[: 1 if specialized else TIMED], *specialized, *turns, LIBRARY]


def wide(tile: Config, product: Product) -> int:
    """Rows of weights that a program multiplies at a time."""
    return tile.n * (2 if product.gated or tile.turns else 1)


@CachedByGpu
def fit(tile: Config, product: Product, rows: int) -> Config:
    """A tile with its work split as the model likes best; in turns, it is not split."""
    if tile.turns:
        return tile
    tiles = _tiles(tile, product, rows, rows if _is_full(product) else typical(rows))
    most = max(1, min(MOST_PARTS, product.steps(tile.k) // LEAST_STEPS, 2 * MULTIPROCESSORS // tiles))
    if product.text[1]:
        most = 1
    split = (replace(tile, split=split) for split in range(1, most + 1))
    best = min(split, key=lambda way: estimate(way, product, rows))
    return replace(best, stages=_stages(best, product, tiles * best.split))


def _tiles(way: Config, product: Product, rows: int, active: int) -> int:
    """How many tiles have work to do: those of padding alone have none, see ``has_work`` of the kernel."""
    if product.taps:
        down = cdiv(product.batch * active, way.m)
    else:
        first, last = ([(number * rows + row) // way.m for number in range(product.batch)] for row in (0, active - 1))
        shared = sum(before == after for before, after in zip(last, first[1:], strict=False))
        down = sum(last) - sum(first) + product.batch - shared
    return down * cdiv(product.outputs, wide(way, product))


@cache
def actives(way: Way, product: Product, rows: int) -> tuple[int, ...]:
    """With how many rows active a way is timed for a padded number: typically many; or the fewest and the most, if
    between them a further round of tiles begins."""
    if _is_full(product):
        return (rows,)
    if isinstance(way, Config):
        ends = smallest(rows), rows
        rounds = {cdiv(_tiles(way, product, rows, active) * way.split, MULTIPROCESSORS) for active in ends}
        if len(rounds) > 1:
            return ends
    return (typical(rows),)


def _is_full(product: Product) -> bool:
    return "full" in product.fused.split()


def _stages(tile: Config, product: Product, programs: int) -> int:
    """As deep as the tile says and fits; no deeper than lets two programs share a multiprocessor, where they can: one
    starts or ends while the other multiplies.

    Where there is a multiprocessor for each program, deep enough that no two fit into one: while the kernel before them
    ends, programs start where there is room, and two in one place take twice as long as the rest.
    """
    wanted = next(of.stages for of in TILES + SPECIALIZED if replace(of, split=tile.split, stages=tile.stages) == tile)
    memory = shared_memory()
    deep, shared = (_deepest(tile, product, size) for size in (memory, memory // 2))
    if programs <= MULTIPROCESSORS and starts_early():
        return min(max(wanted, shared + 1), deep)
    alone = tile.warps == 8 and (product.taps > 1 or tile.n > 128)  # for its registers
    if tile.specialized:
        alone = tile.warps == 8 or (product.taps > 1 and tile.n > 64)
    return min(wanted, shared if shared >= 3 and not alone else deep)


def _deepest(tile: Config, product: Product, memory: int) -> int:
    """How many steps of a product fit into so many bytes. Of few rows, one lies in the registers besides."""
    rows, weights = (size * tile.k * product.dtype.itemsize for size in (tile.m, wide(tile, product)))
    beside = BARRIERS + DEVIATION * tile.m + text_bytes(product) if tile.specialized else 0
    return (memory - beside) // (rows + weights) + (tile.m < 64)


START, SPLIT, SPLIT_SPECIALIZED = 1.7, 2.9, 3.7
"""µs of an H100: of any program, and more of one that shares its sums, by its kernel."""
ROWS, GATHERED, WEIGHTS = 0.0076, 0.0158, 0.0165
"""µs for each KB that a multiprocessor takes in."""
STEP, STEADY, APART = 0.08, 0.6, 0.8
"""µs of a step at least, and what a step takes of the time that its bytes tell where eight warps gather 128 channels,
half as many waits for as much, and where warps of their own gather."""
MEMORY, FULL = 0.41, 63
"""µs for each MB of weights, if so many programs ask for them."""
FINISH, PART, PARTS = 0.083, 0.21, 0.09
"""µs for 1024 numbers of a tile: to finish them, to add up a share of all parts, or each part."""
IN_LINES = 0.15
"""Of what parts take, where warps of different tasks store them in whole lines."""
TAKEN, BESIDE = 0.0108, 0.28
"""µs for each KB that a multiprocessor takes in for tiles in turns while all others do, half as long without them; and
to finish 1024 numbers beside products."""


def text_bytes(product: Product) -> int:
    """Of shared memory, for one head of the keys and values that a tile's rows attend to."""
    head_dim, keys = product.text
    return 2 * sum(blocks_of(keys)) * head_dim * product.dtype.itemsize if keys else 0


@cache
def estimate(way: Config, product: Product, rows: int) -> float:
    """µs of a product in a tile, about: what was fitted to some thousand timings on an H100.

    A multiprocessor takes in rows and weights at a limited pace, which all its programs share: the busiest one decides.
    """
    numbers = actives(way, product, rows)
    return sum(_estimate(way, product, _tiles(way, product, rows, active)) for active in numbers) / len(numbers)


def _estimate(way: Config, product: Product, tiles: int) -> float:
    taken = [size * way.k * product.dtype.itemsize / 1024 for size in (way.m, wide(way, product))]  # KB a step
    step = max(STEP, taken[0] * (GATHERED if product.taps > 1 else ROWS) + taken[1] * WEIGHTS)
    if product.taps > 1:
        step *= APART if way.specialized else STEADY if (way.warps, way.k) == (8, 128) else 1.0
    load = cdiv(tiles * way.split, MULTIPROCESSORS)
    loop = cdiv(product.steps(way.k), way.split) * load * step
    memory = MEMORY * product.outputs * product.steps(1) * product.dtype.itemsize / 1e6
    memory *= max(1.0, FULL / (tiles * way.split))
    area, parts = way.m * wide(way, product) / 1024, 0.0
    if way.turns:
        crowd = min(1.0, tiles / MULTIPROCESSORS) ** 2
        loop, finish = product.steps(way.k) * sum(taken) * TAKEN * (1 + crowd) / 2, area * BESIDE
        return START + max((load - 1) * max(loop, (loop + finish) / 2) + loop, memory) + finish
    if way.split > 1:
        share = PART if tiles * way.split <= MULTIPROCESSORS else PARTS * way.split * load
        parts = SPLIT_SPECIALIZED + area * share * IN_LINES if way.specialized else SPLIT + area * share
    return START + max(loop, memory) + area * FINISH * load + parts


def workspace(way: Way, product: Product, rows: int) -> int:
    """See :meth:`Product.workspace`; what is gathered, or multiplied and not finished, and sums in parts."""
    rows, item = product.batch * rows, product.dtype.itemsize
    if way == LIBRARY:
        gathered = rows * product.steps(1) * item if product.taps else 0
        plain = product.fused in ("", "bias") and (product.taps > 0 or not product.channels[1]) and not product.text[1]
        return gathered + (0 if plain else rows * product.outputs * item)
    config = way if isinstance(way, Config) else rule(product, rows)
    tiles = cdiv(rows, config.m) * cdiv(product.columns, config.n)
    splits = split_of(config.split, product.steps(config.k), tiles, LOCKS)
    return tiles * splits * config.m * config.n * (2 if product.gated else 1) * 4 if splits > 1 else 0


def rule(product: Product, rows: int) -> Config:
    """What the kernel's rule chooses for so many rows of all samples."""
    chunk = math.gcd(*(channels for channels in product.channels if channels))
    return choose(rows, product.columns, product.steps(1), chunk, product.gated, product.taps > 0, product.dtype)
