"""APSC: choose how a convolution is cut, for a level and a mask.

Adaptive pixel-wise sparse convolution covers the active outputs with tiles and gathers one input block a tile. A tile
of 1x1 is "rows" (a neighbor table, no wasted output); one tile of the whole map is "dense".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fisedit.runtime.geometry import ConvGeometry, Tile

Cost = Literal["halo", "paper", "rows", "dense"]
COSTS: tuple[str, ...] = get_args(Cost)
SIDES = (2, 4, 8, 16, 32)


def count_tiles(mask: Tensor, tile: Tile) -> int:
    """N(h, w): tiles of a regular grid over ``mask`` (bool ``[H, W]``) that hold an active position."""
    return int(F.max_pool2d(mask[None, None].float(), tile, tile, ceil_mode=True).sum())


def paper_cost(mask: Tensor, geometry: ConvGeometry, tile: Tile) -> float:
    """The paper's formula as printed (section "Adaptive Pixel-Wise Sparse Convolution").

    ``f(h, w) = (h - h_k + 1) * (w - w_k + 1) * N(h, w)``. Read literally, h = 2 under a 3x3 kernel costs nothing.
    """
    height, width = (tile[i] - geometry.kernel[i] + 1 for i in (0, 1))
    return float(height * width * count_tiles(mask, tile))


@dataclass(frozen=True)
class HaloCost:
    """Time of a tiled convolution, in units of one multiply-add row: what is gathered and what is computed.

    ``N(h, w) * (gather * bh * bw + tiled * h * w * kh * kw + tile_overhead)``, with ``bh x bw`` the input block
    including its halo; rows cost ``N * (gather + 1) * kh * kw``. ``bench/cost_model.py`` fitted the defaults on a CPU.
    """

    gather: float = 0.5
    tiled: float = 0.9
    tile_overhead: float = 256.0

    def __call__(self, mask: Tensor, geometry: ConvGeometry, tile: Tile) -> float:
        kernel = geometry.kernel[0] * geometry.kernel[1]
        if tile == (1, 1):
            return float(mask.sum()) * (self.gather * kernel + kernel)
        block = geometry.block(tile)
        computed = self.tiled * tile[0] * tile[1] * kernel
        return count_tiles(mask, tile) * (self.gather * block[0] * block[1] + computed + self.tile_overhead)


@dataclass(frozen=True)
class CostModel:
    """Chooses a tile of outputs per convolution geometry and mask.

    Args:
        cost: ``"halo"`` (default) picks the cheapest of rows, a tile (h, w) from {2, 4, 8, 16, 32}² and dense;
            ``"paper"`` picks by the printed formula; ``"rows"`` and ``"dense"`` force those.
        dense_above: the active share from which on a whole call on a GPU runs dense.
    """

    cost: Cost = "halo"
    halo: HaloCost = HaloCost()
    dense_above: float = 0.85

    def prefers_dense(self, share: float, device: torch.device) -> bool:
        """Whether a U-Net call of which ``share`` (0 to 1) is active is expected to be faster dense than sparse."""
        return device.type == "cuda" and share >= self.dense_above

    def choose(self, mask: Tensor, geometry: ConvGeometry) -> Tile:
        """The tile (h, w) for the active outputs ``mask`` (bool ``[H, W]`` at the output level)."""
        dense = (mask.shape[0], mask.shape[1])
        if self.cost == "rows":
            return (1, 1)
        if self.cost == "dense":
            return dense
        tiles: list[Tile] = [(h, w) for h in SIDES for w in SIDES if h <= dense[0] and w <= dense[1]] or [dense]
        score: Callable[[Tensor, ConvGeometry, Tile], float] = paper_cost
        if self.cost == "halo":
            tiles, score = [(1, 1), *tiles, dense], self.halo
        return min(tiles, key=lambda tile: score(mask, geometry, tile))
