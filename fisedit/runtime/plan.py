"""From a mask to index tables: which rows are active at each level, and where each op finds its inputs.

A packed tensor holds the active rows of a level in raster order. A convolution reads from
``cat(active rows [N], halo rows [H], one zero row)``; its *neighbor table* says which of those each output needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.geometry import ConvGeometry, Level, Tile


@dataclass(frozen=True)
class Table:
    """The key of an index table: ``active`` of a level; ``halo``, ``neighbors`` or ``outputs`` of a convolution."""

    kind: str
    of: Level | ConvGeometry
    CONV: ClassVar[tuple[str, ...]] = ("halo", "neighbors", "outputs")

    def __str__(self) -> str:
        of = self.of if isinstance(self.of, ConvGeometry) else f"{self.of[0]}x{self.of[1]}"
        return f"{self.kind}:{of}"


def project_mask(mask: Tensor, level: Level) -> Tensor:
    """The mask at a level: a position is active if any base position that it covers is.

    Levels that strides of 2 lead to (9 rows, 5, 3, ...) see base position ``y`` at ``y // 2**k``; a level of any other
    size sees it at ``floor(y * h / H)``.

    Args:
        mask: bool ``[H, W]``.
    Returns:
        bool ``[h, w]``.
    """
    y, x = mask.nonzero(as_tuple=True)
    out = torch.zeros(level, dtype=torch.bool, device=mask.device)
    out[_project(y, mask.shape[0], level[0]), _project(x, mask.shape[1], level[1])] = True
    return out


def _project(line: Tensor, length: int, coarse: int) -> Tensor:
    factor = 1
    while -(-length // factor) > coarse:
        factor *= 2
    return line // factor if -(-length // factor) == coarse else line * coarse // length


class MaskPlan:
    """All index tables of one mask, built when first asked for.

    Args:
        mask: bool ``[H, W]`` over the latent, not empty; shared by the whole batch.
        cost_model: chooses the tile of each convolution geometry.
    """

    def __init__(self, mask: Tensor, cost_model: CostModel) -> None:
        self.mask = mask
        self.cost_model = cost_model
        self.tiles: dict[ConvGeometry, Tile] = {}
        self._tables: dict[Table, Tensor | None] = {}
        self._active: dict[Level, Tensor] = {}

    @property
    def base(self) -> Level:
        return (self.mask.shape[0], self.mask.shape[1])

    def active(self, level: Level) -> Tensor:
        """The mask at ``level``, bool ``[h, w]``."""
        if level not in self._active:
            self._active[level] = project_mask(self.mask, level)
        return self._active[level]

    def count(self, level: Level) -> int:
        return int(self.active(level).sum())

    def share(self, level: Level | None = None) -> float:
        """Active share of a level (default: the latent), 0 to 1."""
        return float(self.active(level or self.base).float().mean())

    def table(self, key: Table) -> Tensor | None:
        """An int64 table with leading dimension M = 1; ``None`` for an ``outputs`` table that would be the identity.

        Shapes: active ``[1, N]``; halo ``[1, H]``; neighbors ``[1, T, bh, bw]``; outputs ``[1, N']``.
        """
        if key not in self._tables:
            if isinstance(key.of, ConvGeometry):
                tables = self._conv_tables(key.of)
                self._tables.update({Table(kind, key.of): t for kind, t in zip(Table.CONV, tables, strict=True)})
            else:
                self._tables[key] = self.active(key.of).flatten().nonzero()[:, 0][None]  # [1, N]
        return self._tables[key]

    def _conv_tables(self, geometry: ConvGeometry) -> tuple[Tensor, Tensor, Tensor | None]:
        target = self.active(geometry.target)
        tile = (1, 1) if geometry.kernel == (1, 1) else self.cost_model.choose(target, geometry)
        self.tiles[geometry] = tile
        y, x = target.nonzero(as_tuple=True)
        columns = -(-geometry.target[1] // tile[1])
        tiles, which = torch.unique(y // tile[0] * columns + x // tile[1], return_inverse=True)  # [T], [N']
        positions, inside = self._block_positions(geometry, tile, tiles // columns, tiles % columns)
        halo, neighbors = self._look_up(geometry.source, positions, inside)
        outputs = None
        if tile != (1, 1):
            outputs = (which * (tile[0] * tile[1]) + y % tile[0] * tile[1] + x % tile[1])[None]  # [1, N']
        return halo, neighbors, outputs

    def _block_positions(
        self, geometry: ConvGeometry, tile: Tile, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Source positions that each tile reads, and which of them lie inside the map: both ``[T, bh, bw]``."""
        block, device = geometry.block(tile), self.mask.device
        lines, inside = [], []
        for dim, start in enumerate((rows, columns)):
            virtual = geometry.upsample.size[dim] if geometry.upsample else geometry.source[dim]
            line = start[:, None] * (tile[dim] * geometry.stride[dim]) - geometry.padding[dim]
            line = line + torch.arange(block[dim], device=device)  # [T, b]
            inside.append((line >= 0) & (line < virtual))
            line = line.clamp(0, virtual - 1)
            if geometry.upsample:
                line = geometry.upsample.source(dim, geometry.source[dim], device)[line]
            lines.append(line)
        positions = lines[0][:, :, None] * geometry.source[1] + lines[1][:, None, :]
        return positions, inside[0][:, :, None] & inside[1][:, None, :]

    def _look_up(self, source: Level, positions: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """The halo ``[1, H]`` and the neighbor table ``[1, T, bh, bw]`` into (active, halo, zero) rows."""
        active = self.active(source).flatten()
        wanted = torch.zeros_like(active)
        wanted[positions[inside]] = True
        halo = (wanted & ~active).nonzero()[:, 0]  # [H]
        place = torch.empty(active.numel(), dtype=torch.int64, device=active.device)
        count = int(active.sum())
        place[active] = torch.arange(count, device=active.device)
        place[halo] = count + torch.arange(len(halo), device=active.device)
        zero = count + len(halo)
        neighbors = torch.where(inside, place[positions.where(inside, halo.new_zeros(()))], zero)
        return halo[None], neighbors[None]
