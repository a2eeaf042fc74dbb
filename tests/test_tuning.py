"""Every way to compute a product gives the product, and the fastest one is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fisedit.runtime import tuning
from fisedit.runtime.calibration import Timings
from fisedit.runtime.kernels.multiply_rows import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVE, POSITIONS, CHANNELS, OUTPUTS = 5, 9, 64, 96


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.float16)


def arguments(taps: int) -> dict[str, Any]:
    """A product of 5 rows, as a linear layer or a convolution of 9 positions."""
    rows, recorded, sources = random(2, ACTIVE, CHANNELS, seed=1), None, None
    if taps > 1:
        recorded = random(2, POSITIONS, CHANNELS, seed=2)
        sources = torch.randint(-1, ACTIVE + POSITIONS, (1, ACTIVE, taps), generator=torch.Generator().manual_seed(3))
        sources = sources.to(DEVICE, torch.int32)
    return {
        "rows": rows, "rows2": None, "recorded": recorded, "sources": sources,
        "weight": random(OUTPUTS, taps * CHANNELS, seed=4) * 0.05, "bias": random(OUTPUTS, seed=5), "column_sum": None,
        "affine": None, "full": False, "residual": random(2, ACTIVE, OUTPUTS, seed=6),
        "count": torch.tensor([ACTIVE], dtype=torch.int32, device=DEVICE),
        "locks": torch.zeros(64, dtype=torch.int32, device=DEVICE), "activation": "silu", "gated": False, "eps": 1e-5,
    }  # fmt: skip


@pytest.mark.parametrize("taps", [1, 9])
def test_every_way_gives_the_product(taps: int) -> None:
    given = arguments(taps)
    wide: dict[str, Any] = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()
    }
    wanted = reference.multiply_rows(**wide)
    ways = tuning.candidates(given)
    assert ways[0] == tuning.RULE and ways[-1] == tuning.LIBRARY and len(ways) == len(tuning.TILES) + 2
    for way in ways if DEVICE == "cuda" else (ways[0], ways[1], ways[-1]):  # interpreted: slowly
        out = tuning.run(way, given)
        assert (out.double() - wanted).abs().max() <= 2e-3 * wanted.abs().max(), way


def test_the_fastest_way_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings, asked = Timings.load(DEVICE, tmp_path), []

    def measure(given: dict[str, Any], way: str, rows: int) -> float:
        asked.append((way, rows))
        return 1.0 if way == tuning.LIBRARY else 2.0

    monkeypatch.setattr(tuning, "_measure", measure)
    monkeypatch.setattr(tuning, "timings_of", lambda device: timings)
    linear, conv = arguments(1), arguments(9)
    with timings.collect() as choices:
        out = tuning.multiply_rows(*linear.values())
        tuning.multiply_rows(*linear.values())
        tuning.choose_way(conv, timings)
    assert torch.equal(out, reference.multiply_rows(**linear))
    assert len(asked) == 2 * len(tuning.candidates(linear)) and {rows for _, rows in asked} == {6}
    assert [(choice.kind, choice.chosen) for choice in choices] == [
        ("linear", "library"), ("linear", "library"), ("convolution of 9 taps", "library"),
    ]  # fmt: skip


def test_channels_of_two_sources_come_in_whole_chunks() -> None:
    given = arguments(1) | {"rows2": random(2, ACTIVE, 192, seed=7), "weight": random(OUTPUTS, 256, seed=8)}
    tiles = [way for way in tuning.candidates(given) if way in tuning.TILES]
    assert tiles == [name for name, tile in tuning.TILES.items() if tile.k == 64]
    narrow = arguments(1) | {"weight": random(OUTPUTS, 32, seed=9)}
    assert tuning.candidates(narrow) == [tuning.RULE, tuning.LIBRARY]


def test_work_is_split_where_tiles_are_few() -> None:
    given, tile = arguments(9), tuning.TILES["16x64x128 w4 s6 /1"]
    assert tuning._split(tile, given).split == 1  # four steps and a half: nothing to split
    deep = given | {"weight": random(OUTPUTS, 9 * 640, seed=8)}
    assert tuning._split(tile, deep).split == 11
    many = deep | {"sources": given["sources"].expand(1, ACTIVE, 9).repeat(1, 1000, 1)}
    assert tuning._split(tile, many).split == 1
