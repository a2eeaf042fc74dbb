"""Which inputs a convolution's outputs read: sizes only, no tensors of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Level = tuple[int, int]
"""A resolution level, named by its size ``(height, width)``."""
Tile = tuple[int, int]
"""Height and width of a tile of outputs."""


@dataclass(frozen=True)
class Upsample:
    """Nearest upsampling to ``size``; ``scale`` is set where the model gave a factor instead of a size."""

    size: Level
    scale: tuple[float, float] | None

    def source(self, dim: int, length: int, device: torch.device) -> Tensor:
        """For each line of the upsampled map, the source line of ``length`` (``F.interpolate``'s own rounding)."""
        lines = torch.arange(length, dtype=torch.float32, device=device)[None, None]  # [1, 1, length]
        if self.scale is not None:
            out = F.interpolate(lines, scale_factor=self.scale[dim], mode="nearest")
        else:
            out = F.interpolate(lines, size=self.size[dim], mode="nearest")
        return out[0, 0].long()


@dataclass(frozen=True)
class ZeroInsertion:
    """The input of a transposed convolution: its lines ``step`` apart, zeros between them, ``size`` in all."""

    size: Level
    step: tuple[int, int]

    def source(self, dim: int, length: int, device: torch.device) -> Tensor:
        """For each line of the widened map, its source line, -1 for zeros."""
        lines = torch.arange(self.size[dim], device=device)
        return torch.where(lines % self.step[dim] == 0, lines // self.step[dim], -1)


@dataclass(frozen=True)
class ConvGeometry:
    """Which inputs a convolution's outputs read, apart from channels."""

    source: Level
    target: Level
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    upsample: Upsample | ZeroInsertion | None = None

    @property
    def pointwise(self) -> bool:
        """Whether each output reads just the input at its own position."""
        return (self.kernel, self.stride, self.padding, self.upsample) == ((1, 1), (1, 1), (0, 0), None)

    def block(self, tile: Tile) -> tuple[int, int]:
        """The size of the input block that a tile of outputs reads."""
        height, width = ((tile[i] - 1) * self.stride[i] + (self.kernel[i] - 1) * self.dilation[i] + 1 for i in (0, 1))
        return height, width

    def __str__(self) -> str:
        name = f"conv{self.kernel[0]}x{self.kernel[1]}_s{self.stride[0]}" + ("_up" if self.upsample else "")
        return f"{name}_{self.source[0]}x{self.source[1]}_to_{self.target[0]}x{self.target[1]}"


def block_positions(geometry: ConvGeometry, tile: Tile, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Source positions that tiles of outputs read, and which of them lie inside the map.

    Args:
        rows, columns: of the tiles, int64 ``[T]``.
    Returns:
        int64 and bool ``[T, bh, bw]``.
    """
    block, device = geometry.block(tile), rows.device
    lines, inside = [], []
    for dim, start in enumerate((rows, columns)):
        virtual = geometry.upsample.size[dim] if geometry.upsample else geometry.source[dim]
        line = start[:, None] * (tile[dim] * geometry.stride[dim]) - geometry.padding[dim]
        line = line + torch.arange(block[dim], device=device)  # [T, b]
        within = (line >= 0) & (line < virtual)
        line = line.clamp(0, virtual - 1)
        if geometry.upsample:
            line = geometry.upsample.source(dim, geometry.source[dim], device)[line]
            within &= line >= 0
        lines.append(line.clamp(min=0))
        inside.append(within)
    positions = lines[0][:, :, None] * geometry.source[1] + lines[1][:, None, :]
    return positions, inside[0][:, :, None] & inside[1][:, None, :]
