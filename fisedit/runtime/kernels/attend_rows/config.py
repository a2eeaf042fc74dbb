"""Tile sizes of an attention, and how many programs share its work."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fisedit.runtime.kernels.launch import cdiv, next_power_of_2, shared_memory, starts_early
from fisedit.runtime.kernels.share_out import MOST_PARTS

MULTIPROCESSORS = 132
"""Of an H100 or H200, for which ``choose_config`` was measured."""
DEEPEST = 15
"""Stages: before its first product, a program runs through all but one."""
GROUPS, GROUP = 3, 64
"""Groups of four warps that attend where warps have tasks of their own, each for so many queries of a tile."""


@dataclass(frozen=True)
class Config:
    """Tile sizes of a launch: queries and keys; how many programs share the work, 0: each does a tile; a thread's
    registers at most; whether keys and values are put in one piece each before it; whether warps have tasks of their
    own, see ``specialized.py``."""

    m: int
    n: int
    warps: int
    stages: int
    programs: int = 0
    registers: int | None = None
    whole: bool = False
    specialized: bool = False

    def __str__(self) -> str:
        limit, whole = f" r{self.registers}" if self.registers else "", " whole" if self.whole else ""
        own = " specialized" if self.specialized else ""
        return f"{self.m}x{self.n} w{self.warps} s{self.stages}{limit} p{self.programs}{whole}{own}"

    @property
    def parts(self) -> int:
        """Parts of a tile that are shared each for itself, with a lock of its own."""
        return GROUPS if self.specialized else 1


def choose_config(queries: int, keys: int, head_dim: int, pairs: int, itemsize: int, gathered: bool) -> Config:
    """Tiles for ``queries`` rows over ``keys`` keys, ``gathered`` by a table or not, for each of batch * heads pairs.

    Without warps of their own for loads, products and exponentials, two or more programs on a multiprocessor must fill
    each other's gaps: hence the limits on registers. Tiles of 128 queries read every key from L2 half as often as
    those of 64, which would wait for it. A table costs two stages of the pipeline.
    """
    deep = 5 if gathered else 3
    if itemsize == 4:
        tile = Config(32, 32, 4, 2) if head_dim <= 128 else Config(16, 32, 4, 1)
    elif keys <= 128 and head_dim > 64:
        tile = Config(64, 32, 4, 2) if head_dim > 128 else Config(32, 128, 4, 2)
    elif head_dim > 128 and shared_memory() < 176 * 1024:  # less than an H100 has
        tile = Config(64, 32, 4, 3 if gathered else 2)
    elif head_dim > 128:
        tile = Config(64, 64, 8, 3)
    elif keys <= 128:
        tile = Config(64, 128 if keys > 64 else 64, 4, 2)
    elif head_dim > 64:
        tile = Config(64, 64, 4, 3, registers=168)
    elif queries > 64:
        tile = Config(128, 64, 8, deep, registers=128)
    else:
        tile = Config(64, 64, 4, deep, registers=128)
    tile = replace(tile, programs=best_programs(tile, queries, keys, pairs)[0])
    return deepen(tile, queries, pairs, head_dim) if gathered and itemsize == 2 else tile


def deepen(tile: Config, queries: int, pairs: int, head_dim: int) -> Config:
    """A tile whose pipeline is deep enough that no more programs fit into a multiprocessor than each of them gets: one
    more than elsewhere would take longer, and while the kernel before them ends they start where there is room. GPUs
    that do not start them then have less shared memory, too: there a tile stays as it is."""
    if tile.specialized or not starts_early():
        return tile
    each = cdiv(tile.programs or cdiv(queries, tile.m) * pairs, MULTIPROCESSORS)
    row = 2 * max(16, next_power_of_2(head_dim))  # bytes in half precision
    own, block = tile.m * row, tile.n * 2 * row + (0 if tile.whole else tile.n * 4)  # queries; keys, values, table
    memory = shared_memory(2)
    blocks = (memory // (each + 1) - own) // block + 1
    stages = blocks if tile.whole else 2 * blocks - 1  # a block is loaded two stages after its table
    fits = each <= 2 and stages <= DEEPEST and own + blocks * block <= memory // each
    return replace(tile, stages=max(tile.stages, stages)) if fits else tile


def partial_bytes(tile: Config, queries: int, pairs: int, head_dim: int, locks: int) -> int:
    """What the parts of tiles take, two of each program: sums of values, and of weights, and maxima."""
    shared = tile.programs > 0 and cdiv(queries, tile.m) * pairs * tile.parts <= locks
    return 2 * tile.programs * tile.m * (max(16, next_power_of_2(head_dim)) + 2) * 4 if shared else 0


def best_programs(tile: Config, queries: int, keys: int, pairs: int) -> list[int]:
    """How many programs may share the work, the best first; 0: each does a tile."""
    most = cdiv(queries, tile.m) * pairs * cdiv(keys, tile.n)
    each = (1,) if tile.specialized else (1, 2, 3, 4)
    numbers = [0, *(some * MULTIPROCESSORS for some in each if some * MULTIPROCESSORS < most)]
    return sorted(numbers, key=lambda number: cost(replace(tile, programs=number), queries, keys, pairs))


def cost(tile: Config, queries: int, keys: int, pairs: int) -> float:
    """About how many blocks of keys the busiest multiprocessor walks, one after the other.

    To start costs about four blocks, and to begin another tile; to write a part of the sums, two; to read them all,
    four and half a block for each part. A program that has its multiprocessor for itself takes half as long again,
    waiting.
    """
    tiles, blocks, programs = cdiv(queries, tile.m) * pairs, cdiv(keys, tile.n), tile.programs
    share, begins = blocks, 4
    if programs >= 3 * tiles:
        share, begins = cdiv(blocks, min(programs // tiles, MOST_PARTS)), 6
        programs = tiles * cdiv(blocks, share)
    elif programs:
        share, begins = cdiv(tiles * blocks, programs), 10
    each = cdiv(programs or tiles, MULTIPROCESSORS)
    combined = 4 + cdiv(blocks, share) / 2 if programs else 0
    return (each + each % 2 / 2) * (share + begins) + combined
