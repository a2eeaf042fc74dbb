"""How good the model of tiles is, by the timings that an edit left in the user's cache folder. It needs no GPU.

    python bench/tile_model.py                       the timings of this machine's GPU
    python bench/tile_model.py --timings file.json   those of another one

*Of the model*: the best of those tiles that it takes for the fastest of a kernel, over the best that was timed of it.
*A bucket further*: what was the fastest for the next smaller number of rows, over the best that was timed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import mean, quantiles, stdev
from typing import Annotated

import torch
import typer

from fisedit.runtime.calibration import Timings
from fisedit.runtime.kernels.multiply_rows.triton import Config
from fisedit.runtime.tuning.product import (
    GATED_TURNS_BETWEEN,
    GATHERED,
    LIBRARY,
    LIBRARY_BETWEEN,
    ROWS,
    TILES,
    WEIGHTS,
    Product,
    estimate,
)

POINT = re.compile(r"(?P<kind>.+?) (?P<key>\[.*\]) (?P<rows>\d+)$")
SIZES = re.compile(r"(?P<batch>\d+) x (?P<channels>[\d+]+) to (?P<outputs>\d+)$")
KNOWN = {(tile.m, tile.n, tile.k) for tile in TILES}
TILE = re.compile(r"(\d+)x(\d+)x(\d+) w(\d+) s(\d+) /(\d+)( specialized)?( in turns)?$")


@dataclass(frozen=True)
class Measured:
    """A product at a number of rows: µs of the tiles that were timed, and of PyTorch's product."""

    product: Product
    rows: int
    tiles: dict[Config, float]
    pytorch: float

    @property
    def best(self) -> float:
        return min([self.pytorch, *self.tiles.values()])


def read(table: dict[str, dict[str, float]]) -> Iterator[Measured]:
    """The products in half precision of a table of timings."""
    for point, times in table.items():
        found = POINT.match(point)
        sizes = SIZES.match(json.loads(found["key"])[0]) if found else None
        if found is None or sizes is None or (dtype := json.loads(found["key"])[1]) == "float32":
            continue
        channels = (*map(int, sizes["channels"].split("+")), 0, 0)[:3]
        taps = int(found["kind"].split()[2]) if found["kind"].startswith("convolution") else 0
        shape = Product(taps, int(sizes["batch"]), channels, int(sizes["outputs"]), getattr(torch, dtype),
                        json.loads(found["key"])[2])  # fmt: skip
        parsed = {text: TILE.match(text) for text, time in times.items() if math.isfinite(time)}
        tiles = {Config(*map(int, match.groups()[:6]), match[7] is not None, match[8] is not None): times[text]
                 for text, match in parsed.items() if match}  # fmt: skip
        tiles = {tile: time for tile, time in tiles.items() if (tile.m, tile.n, tile.k) in KNOWN}
        if tiles:
            yield Measured(shape, int(found["rows"]), tiles, times.get(LIBRARY, math.inf))


def errors(measured: list[Measured]) -> list[float]:
    """Logarithms of what the model takes over what was measured."""
    return [
        math.log((estimate(tile, one.product, one.rows) + one.product.between(tile)) / time)
        for one in measured
        for tile, time in one.tiles.items()
    ]


def of_the_model(measured: list[Measured], most: int) -> list[float]:
    """The best of the ``most`` tiles that the model takes for the fastest of a kernel over the best of it, of more."""
    found = []
    for one, kernel in product(measured, ((False, False), (True, False), (True, True))):
        tiles = [tile for tile in one.tiles if (tile.specialized, tile.turns) == kernel]
        times = [one.tiles[tile] for tile in sorted(tiles, key=lambda tile: estimate(tile, one.product, one.rows))]
        if len(times) > most:
            found.append(min(times[:most]) / min(times))
    return found


def a_bucket_further(measured: list[Measured]) -> list[float]:
    """What is the fastest for a number of rows, over the best for the next number, where it was timed as well."""
    found = []
    for shape in {one.product for one in measured}:
        points = sorted((one for one in measured if one.product == shape), key=lambda one: one.rows)
        for one, following in pairwise(points):
            before, times = ({**each.tiles, LIBRARY: each.pytorch} for each in (one, following))
            fastest = min(before, key=before.__getitem__)
            if fastest in times:
                found.append(times[fastest] / following.best)
    return found


def line(name: str, ratios: list[float]) -> str:
    if not ratios:
        return f"| {name} | 0 | | | |"
    high = quantiles(ratios, n=20, method="inclusive")[-1] if len(ratios) > 1 else max(ratios)
    return f"| {name} | {len(ratios)} | {mean(ratios) - 1:.1%} | {high - 1:.1%} | {max(ratios) - 1:.1%} |"


def main(
    timings: Annotated[Path | None, typer.Option(help="A file of timings; default: that of this machine.")] = None,
) -> None:
    """Print the model's error and the regret of what it chooses."""
    path = timings or Timings.load("cuda" if torch.cuda.is_available() else "cpu").path
    assert path is not None
    kept = json.loads(path.read_text(encoding="utf-8"))
    measured = list(read(kept["microseconds"]))
    off = errors(measured)
    print(f"{len(measured)} products at a number of rows, {len(off)} timings of tiles: the model takes "
          f"{math.exp(mean(off)) - 1:+.0%} of them on average, off by {math.exp(stdev(off)) - 1:.0%}\n")  # fmt: skip
    print("| choice | cases | mean regret | 95th percentile | largest |\n| --- | ---: | ---: | ---: | ---: |")
    for most in (1, 2, 3):
        print(line(f"of the model, the best of {most}", of_the_model(measured, most)))
    print(line("a bucket further", a_bucket_further(measured)))
    print(f"\nby the model, a multiprocessor takes in a KB of rows by descriptor in {ROWS} µs, gathered in {GATHERED}, "
          f"and of weights in {WEIGHTS}; a library's product counts for {LIBRARY_BETWEEN} µs more, a gated one in "
          f"turns for {GATED_TURNS_BETWEEN}")  # fmt: skip
    machine = kept["machine"]
    print(f"\n{machine['device']}; torch {machine['pytorch']}, triton {machine['triton']}")


if __name__ == "__main__":
    typer.run(main)
