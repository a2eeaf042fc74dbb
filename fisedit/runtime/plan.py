"""From a mask to index tables: which rows are active at each level, and where each op finds its inputs.

A packed tensor holds the active rows of a level in raster order. A convolution reads from
``cat(active rows [N], halo rows [H], one zero row)``; its *neighbor table* says which of those each output needs.

The samples of one call may have masks of their own (M = B tables instead of one). Their rows are then padded to the
largest sample's: a padded ``active`` entry is R, one past the level's last row, which gathers any row and scatters
nowhere; a padded output reads zero rows; ``count`` says how many rows of each sample are real.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.geometry import ConvGeometry, Level, Tile, block_positions


@dataclass(frozen=True)
class Table:
    """The key of an index table.

    ``active`` or ``count`` of a level; ``halo``, ``neighbors`` or ``outputs`` of a convolution. For fused graphs
    (:class:`~fisedit.runtime.row_plan.RowPlan`): ``active``, ``keys``, ``number``, ``counts``, ``full``, ``partial`` or
    ``locks`` of a level, ``sources`` of a convolution over recorded rows, ``own sources`` over a map of the graph, and
    the ``places`` of its active outputs in blocks of 2x2.
    """

    kind: str
    of: Level | ConvGeometry
    CONV: ClassVar[tuple[str, ...]] = ("halo", "neighbors", "outputs")

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels whose active rows it is made from."""
        return (self.of.source, self.of.target) if isinstance(self.of, ConvGeometry) else (self.of,)

    def __str__(self) -> str:
        of = self.of if isinstance(self.of, ConvGeometry) else f"{self.of[0]}x{self.of[1]}"
        return f"{self.kind}:{of}"


def project_mask(mask: Tensor, level: Level) -> Tensor:
    """The mask at a level: a position is active if any base position that it covers is.

    Levels that strides of 2 lead to (9 rows, 5, 3, ...) see base position ``y`` at ``y // 2**k``; a smaller level of
    any other size sees it at ``floor(y * h / H)``; line ``y`` of a larger level covers base line ``floor(y * H / h)``.

    Args:
        mask: bool ``[H, W]``.
    Returns:
        bool ``[h, w]``.
    """
    for dim, length in enumerate(mask.shape):
        if level[dim] > length:
            mask = mask.index_select(dim, torch.arange(level[dim], device=mask.device) * length // level[dim])
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
    """All index tables of the masks of one call, built when first asked for.

    Args:
        masks: bool over the latent, ``[H, W]`` or ``[1, H, W]`` shared by the whole batch, or ``[B, H, W]``, one for
            each sample; not all empty.
        cost_model: chooses the tile of each convolution geometry.
    """

    def __init__(self, masks: Tensor, cost_model: CostModel) -> None:
        masks = masks[None] if masks.dim() == 2 else masks
        shared = bool((masks == masks[:1]).all())
        self.masks = masks[:1] if shared else masks  # [M, H, W]
        self.cost_model = cost_model
        self.tiles: dict[ConvGeometry, Tile] = {}
        self._tables: dict[Table, Tensor | None] = {}
        self._active: dict[Level, Tensor] = {}

    def active(self, level: Level) -> Tensor:
        """The masks at ``level``, bool ``[M, h, w]``."""
        if level not in self._active:
            self._active[level] = torch.stack([project_mask(mask, level) for mask in self.masks])
        return self._active[level]

    def rows(self, level: Level) -> int:
        """N: the rows of each packed sample at ``level``, padding included."""
        return int(self.active(level).flatten(1).sum(1).max())

    def share(self, level: Level | None = None) -> float:
        """Active share of a level (default: the latent), 0 to 1: the mean of the masks."""
        return float((self.masks if level is None else self.active(level)).float().mean())

    def table(self, key: Table) -> Tensor | None:
        """An int64 table. ``None`` for ``outputs`` that would be the identity, and for ``count`` without padding.

        Shapes: active ``[M, N]``; count ``[M]``; halo ``[M, H]``; neighbors ``[M, T, bh, bw]``; outputs ``[M, N']``.
        """
        if key not in self._tables:
            if isinstance(key.of, ConvGeometry):
                tables = self._conv_tables(key.of)
                self._tables.update({Table(kind, key.of): t for kind, t in zip(Table.CONV, tables, strict=True)})
            else:
                active, counts = self._level_tables(key.of)
                self._tables.update({Table("active", key.of): active, Table("count", key.of): counts})
        return self._tables[key]

    def _level_tables(self, level: Level) -> tuple[Tensor, Tensor | None]:
        each = [mask.flatten().nonzero()[:, 0] for mask in self.active(level)]
        counts = [len(index) for index in each]
        padded = len(set(counts)) > 1
        return _pad(each, level[0] * level[1]), torch.tensor(counts, device=self.masks.device) if padded else None

    def _conv_tables(self, geometry: ConvGeometry) -> tuple[Tensor, Tensor, Tensor | None]:
        targets = self.active(geometry.target)  # [M, h, w]
        largest = targets[int(targets.flatten(1).sum(1).argmax())]
        tile = (1, 1) if geometry.kernel == (1, 1) else self.cost_model.choose(largest, geometry)
        self.tiles[geometry] = tile
        cuts = [_cut(target, tile) for target in targets]
        halo, neighbors = self._look_up(geometry, tile, [tiles for tiles, _ in cuts])
        outputs = None if tile == (1, 1) else _pad([places for _, places in cuts], 0)  # [M, N']
        return halo, neighbors, outputs

    def _look_up(self, geometry: ConvGeometry, tile: Tile, tiles: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The halo ``[M, H]`` and the neighbor table ``[M, T, bh, bw]`` into (active, halo, zero) rows."""
        columns = -(-geometry.target[1] // tile[1])
        active = self.active(geometry.source).flatten(1)  # [M, R]
        read = [block_positions(geometry, tile, t // columns, t % columns) for t in tiles]
        halos = []
        for own, (positions, inside) in zip(active, read, strict=True):
            wanted = torch.zeros_like(own)
            wanted[positions[inside]] = True
            halos.append((wanted & ~own).nonzero()[:, 0])
        rows, halo = self.rows(geometry.source), _pad(halos, 0)
        zero = rows + halo.shape[1]
        neighbors = []
        for own, border, (positions, inside) in zip(active, halos, read, strict=True):
            place = torch.empty(own.numel(), dtype=torch.int64, device=own.device)
            place[own] = torch.arange(int(own.sum()), device=own.device)
            place[border] = rows + torch.arange(len(border), device=own.device)
            neighbors.append(torch.where(inside, place[positions.where(inside, border.new_zeros(()))], zero))
        return halo, _pad(neighbors, zero)


def _cut(target: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """The tiles ``[T]`` that hold the active outputs, and each output's place ``[N']`` among all outputs of them."""
    y, x = target.nonzero(as_tuple=True)
    columns = -(-target.shape[1] // tile[1])
    tiles, which = torch.unique(y // tile[0] * columns + x // tile[1], return_inverse=True)
    return tiles, which * (tile[0] * tile[1]) + y % tile[0] * tile[1] + x % tile[1]


def _pad(tables: list[Tensor], filler: int) -> Tensor:
    """Tables ``[n_m, ...]`` of the masks stacked to ``[M, max n, ...]``."""
    return torch.nn.utils.rnn.pad_sequence(tables, batch_first=True, padding_value=filler)
