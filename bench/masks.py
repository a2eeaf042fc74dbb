"""Masks to measure with: single blobs of a given size, and ragged masks like those that edits of photographs make.

python bench/masks.py        prints the ragged family's occupancy per level
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RAGGED_SHARE = (2.8, 9.4)
"""Beta distribution of the ragged masks' active share: mean 23 %, 5th to 95th percentile 8 to 39 %."""
SCALES = ((0.11, 1.0), (0.012, 0.36))
"""Gaussian scales of the ragged masks' noise, as shares of the width, and their weights: regions, and their fringes."""


def blob(size: tuple[int, int], share: float, seed: int = 0) -> Tensor:
    """One roundish region of ``share`` (0..1) of the map, somewhere inside: bool ``[H, W]``."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    center = 0.35 + 0.3 * torch.rand(2, generator=generator)
    wobble = 0.25 * _noise(size, 0.15, generator)
    y = torch.linspace(0, 1, height)[:, None] - center[0]
    x = torch.linspace(0, 1, width)[None, :] - center[1]
    return _largest(-(y.square() + x.square()).sqrt() * (1 + wobble), share)


def ragged(size: tuple[int, int], seed: int, share: float | None = None) -> Tensor:
    """Several regions with holes and fringes, of a random share unless given: bool ``[H, W]``."""
    generator = torch.Generator().manual_seed(seed)
    share = random_share(seed) if share is None else share
    noise = sum(weight * _noise(size, scale, generator) for scale, weight in SCALES)
    assert isinstance(noise, Tensor)
    return _largest(noise, share)


def random_share(seed: int) -> float:
    """The active share, 0..1, of the ragged mask of this seed."""
    with torch.random.fork_rng(devices=[]):  # distributions draw from the global generator
        torch.manual_seed(seed)
        return float(torch.distributions.Beta(*RAGGED_SHARE).sample())


def family(size: tuple[int, int], count: int = 24) -> list[Tensor]:
    """Ragged masks whose shares stand for the distribution: the middles of its ``count`` equal parts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shares = torch.distributions.Beta(*RAGGED_SHARE).sample(torch.Size((20_000,)))
    middles = torch.quantile(shares, (torch.arange(count) + 0.5) / count).tolist()
    return [ragged(size, seed, share) for seed, share in enumerate(middles)]


def occupancy(masks: list[Tensor], levels: int = 4) -> list[float]:
    """Mean active share at the latent and after each further 2x pooling."""
    shares, current = [], [mask[None, None].float() for mask in masks]
    for _ in range(levels):
        shares.append(float(torch.stack([mask.mean() for mask in current]).mean()))
        current = [F.max_pool2d(mask, 2, ceil_mode=True) for mask in current]
    return shares


def _noise(size: tuple[int, int], scale: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise smoothed over ``scale`` of the width, of unit variance: float ``[H, W]``."""
    sigma = scale * size[1]
    radius = max(1, round(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    raw = torch.randn(1, 1, size[0] + 2 * radius, size[1] + 2 * radius, generator=generator)
    smooth = F.conv2d(F.conv2d(raw, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[0, 0]
    return (smooth - smooth.mean()) / smooth.std()


def _largest(values: Tensor, share: float) -> Tensor:
    """The ``share`` of positions with the largest values."""
    count = max(1, round(share * values.numel()))
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.flatten().topk(count).indices] = True
    return mask.view(values.shape)


if __name__ == "__main__":
    masks = family((96, 96))
    shares = torch.stack([mask.float().mean() for mask in masks])
    low, middle, high = torch.quantile(shares, torch.tensor([0.05, 0.5, 0.95])).tolist()
    print(f"{len(masks)} ragged masks of 96x96: mean {shares.mean():.1%}, median {middle:.1%}, "
          f"5-95 %: {low:.1%} to {high:.1%}")  # fmt: skip
    print("mean share per level (96, 48, 24, 12):", ", ".join(f"{share:.1%}" for share in occupancy(masks)))
