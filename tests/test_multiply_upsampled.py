"""Convolutions of an upsampled map by the parities of its positions, against PyTorch's over whole maps in float64.

Without a GPU, Triton's kernels run interpreted.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from fisedit.runtime.geometry import ConvGeometry, Upsample  # noqa: E402
from fisedit.runtime.kernels.launch import specializes  # noqa: E402
from fisedit.runtime.kernels.multiply_rows.triton import Config  # noqa: E402
from fisedit.runtime.kernels.multiply_upsampled_rows import reference  # noqa: E402
from fisedit.runtime.plan import Table  # noqa: E402
from fisedit.runtime.row_plan import LevelMasks, RowPlan  # noqa: E402
from fisedit.runtime.tuning import multiply_rows as tuning  # noqa: E402
from fisedit.runtime.tuning.product import Product, candidates, estimate, ways, workspace  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Sums of weights are rounded, and so is the result."""
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
SMALL = Config(16, 32, 32, 4, 2, parities=True)
SHARED = Config(16, 32, 32, 4, 2, split=3, parities=True)
ON_GPU = pytest.mark.skipif(DEVICE == "cpu" or not specializes(), reason="warps with tasks of their own: on a Hopper")
HOPPER = [
    Config(64, 64, 64, 4, 6, specialized=True, parities=True),
    Config(128, 128, 64, 8, 4, specialized=True, parities=True),
    Config(128, 128, 64, 8, 4, split=3, specialized=True, parities=True),
    Config(64, 128, 128, 4, 3, split=2, specialized=True, parities=True),
    Config(128, 64, 64, 4, 4, parities=True),
    Config(128, 256, 64, 8, 3, split=2, parities=True),
]


class Case:
    """A map of ``side``² rows, upsampled and convolved, under masks of the result, one for each sample if ``own``."""

    def __init__(self, side: int, channels: int, outputs: int, dtype: torch.dtype, batch: int = 2, own: bool = False):
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.masks = torch.rand(batch if own else 1, 2 * side, 2 * side, generator=generator) < 0.3
        self.masks[:, : side // 2] = False
        small, large = (side, side), (2 * side, 2 * side)
        geometry = ConvGeometry(small, large, (3, 3), (1, 1), (1, 1), (1, 1), Upsample(large, None))
        coarse = ConvGeometry(small, small, (3, 3), (1, 1), (1, 1), (1, 1))
        keys = [Table("sources", geometry), Table("sources", coarse), Table("places", geometry)]
        keys += [Table("number", large), Table("number", small), Table("active", small)]
        levels = LevelMasks(self.masks, [large, small])
        plan = RowPlan(keys, levels.buckets, batch, torch.device(DEVICE))
        plan.write(levels)
        sources, coarse_sources, places, count, coarse_count, active = map(plan.table, keys)
        assert isinstance(active, torch.Tensor)
        self.map = random(batch, side * side, channels)
        index = active.clamp_max(side * side - 1).expand(batch, -1)[:, :, None].expand(-1, -1, channels)
        here = torch.zeros(len(active), side * side + 1, dtype=torch.bool, device=DEVICE).scatter_(1, active, True)
        self.weight, self.bias = random(outputs, 3, 3, channels) / (3 * channels**0.5), random(outputs)
        recorded = self.map.masked_fill(here[:, :-1, None], float("nan"))  # what is active is not read there
        self.given: dict[str, Any] = {
            "rows": self.map.gather(1, index), "rows2": None, "recorded": recorded, "sources": sources,
            "weight": self.weight.flatten(1), "bias": self.bias, "affine": None, "full": False, "residual": None,
            "count": count, "locks": plan.locks, "activation": "none", "gated": False, "positions": 4 * side * side,
        }  # fmt: skip
        self.coarse: dict[str, Any] = {
            "coarse_sources": coarse_sources, "coarse_count": coarse_count, "places": places,
            "parities": self.parities(),
        }  # fmt: skip

    def parities(self) -> torch.Tensor:
        """By which taps meet the same row: ``[parity, tap, of four]`` for lines, and for columns."""
        meet = torch.tensor([[[1, 0], [0, 1], [0, 1]], [[1, 0], [1, 0], [0, 1]]]).to(DEVICE, torch.float64)
        four = torch.einsum("ayi,bxj,oyxc->aboijc", meet, meet, self.weight.double())
        return four.flatten(0, 2).flatten(1).to(self.weight.dtype)  # [4 * Co, 4 * C]

    def check(self, out: torch.Tensor) -> None:
        """Against the dense layers, each sample's active outputs in their order."""
        side = int(self.map.shape[1] ** 0.5)
        dense = self.map.double().mT.unflatten(2, (side, side))  # [B, C, h, w]
        up = F.interpolate(dense, scale_factor=2.0, mode="nearest")
        wanted = F.conv2d(up, self.weight.double().permute(0, 3, 1, 2), self.bias.double(), padding=1)
        for number, (rows, own) in enumerate(zip(out, wanted, strict=True)):
            mask = self.masks[number % len(self.masks)].to(DEVICE)
            expected = own[:, mask].T  # [N', Co]
            difference = (rows[: len(expected)].double() - expected).abs().max()
            assert difference <= TOLERANCE[self.map.dtype] * wanted.abs().max()


@pytest.mark.parametrize("own", [False, True], ids=["one mask", "a mask for each"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference(dtype: torch.dtype, own: bool) -> None:
    case = Case(6, 16, 24, dtype, own=own)
    case.check(reference.multiply_upsampled_rows(*case.given.values(), **case.coarse))


@pytest.mark.parametrize("own", [False, True], ids=["one mask", "a mask for each"])
@pytest.mark.parametrize("way", [SMALL, SHARED, "rule", "library"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_way(dtype: torch.dtype, way: Any, own: bool) -> None:
    """Columns that end within a tile, and steps of channels that do not."""
    for batch, channels, outputs in ((2, 32, 40), (3, 40, 32)):
        case = Case(6, channels, outputs, dtype, batch, own)
        case.check(tuning.run(way, {**case.given, **case.coarse}))


@ON_GPU
@pytest.mark.parametrize("way", HOPPER, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_of_a_hopper(dtype: torch.dtype, way: Config) -> None:
    for batch, own in ((2, False), (3, True)):
        case = Case(24, 256, 320, dtype, batch, own)
        case.check(tuning.run(way, {**case.given, **case.coarse}))


def test_rows_that_it_is_timed_with() -> None:
    """As many of the map before as the real ones have, over and over, and every output one place."""
    case = Case(6, 16, 24, torch.float32)
    given = {**case.given, **case.coarse}
    real, coarse = int(given["count"]), int(given["coarse_count"])
    for number in (real, 3 * real, real // 2):
        repeated = tuning.Stopwatch(given).with_rows(number)
        places = repeated["places"].flatten()
        assert repeated["places"].shape[1] == repeated["coarse_sources"].shape[1] == round(coarse * number / real)
        taken = sorted(place for place in places.tolist() if place >= 0)
        assert taken == list(range(len(taken))) and number - 4 <= len(taken) <= number


PRODUCT = Product(9, 2, (640, 0, 0), 640, torch.float16, "bias", upsampled=True)


def test_tiles_of_one_parity_are_timed_beside_the_others() -> None:
    plain = ways(replace(PRODUCT, upsampled=False), 2816)
    found = ways(PRODUCT, 2816)
    by_parity = [way for way in found if isinstance(way, Config) and way.parities]
    assert [way for way in found if way not in by_parity] == plain and by_parity
    assert set(by_parity) <= set(candidates(PRODUCT, 2816)) and "upsampled" in PRODUCT.key[-1]
    assert all(str(way).endswith(" by parity") for way in by_parity)


def test_what_tiles_of_one_parity_multiply() -> None:
    """4/9 of the others, of many rows: about as much less time; with few, where weights decide, more."""
    tile, wide = Config(128, 128, 64, 8, 7, specialized=True), replace(PRODUCT, channels=(1280, 0, 0), outputs=1280)
    shared = Config(64, 64, 64, 4, 8, split=3, specialized=True)
    for way, product, rows, low, high in ((tile, PRODUCT, 16384, 0.4, 0.6), (shared, wide, 48, 1.1, 1.8)):
        ratio = estimate(replace(way, parities=True), product, rows) / estimate(way, product, rows)
        assert low < ratio < high
    assert workspace(replace(shared, parities=True), PRODUCT, 512) > 0 == workspace(tile, PRODUCT, 512)
