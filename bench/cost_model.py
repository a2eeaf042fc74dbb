"""Does the cost model choose the fastest cut of a convolution? Measures every cut, prints the regret, fits constants.

    OMP_NUM_THREADS=1 python bench/cost_model.py --output cost_model.json

For 3x3 convolutions of the demo U-Net's levels, under blob and ragged masks, the reference ``sparse_conv`` is timed as
rows, as every tile from {2, 4, 8, 16, 32}² and as one dense block. The regret of a choice is its time over the best.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from masks import blob, ragged
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fisedit.environment import describe_environment, environment_line
from fisedit.runtime.cost_model import SIDES, CostModel, HaloCost, Tile
from fisedit.runtime.kernels.sparse_conv.reference import sparse_conv
from fisedit.runtime.plan import ConvGeometry, MaskPlan, project_mask
from fisedit.runtime.plan import Table as Index

LEVELS = ((64, 64), (32, 128), (16, 192), (8, 192))
"""Side and channels of the demo U-Net's levels."""
BATCH = 2
GATHER = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
TILED = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)
OVERHEAD = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


@dataclass(frozen=True)
class Case:
    """A convolution under a mask, and the seconds of each cut."""

    mask: str
    side: int
    share: float
    active: Tensor
    geometry: ConvGeometry
    seconds: dict[Tile, float]

    @property
    def best(self) -> Tile:
        return min(self.seconds, key=self.seconds.__getitem__)

    def regret(self, tile: Tile) -> float:
        """Time of a cut over that of the best, at least 1."""
        return self.seconds[tile] / self.seconds[self.best]

    def to_dict(self) -> dict[str, Any]:
        milliseconds = {f"{tile[0]}x{tile[1]}": seconds * 1e3 for tile, seconds in self.seconds.items()}
        return {"mask": self.mask, "side": self.side, "share": self.share, "ms": milliseconds}


@dataclass(frozen=True)
class Fixed(CostModel):
    """A cost model that always cuts in the same way."""

    tile: Tile = (1, 1)

    def choose(self, mask: Tensor, geometry: ConvGeometry) -> Tile:
        return self.tile


def conv_geometry(side: int) -> ConvGeometry:
    return ConvGeometry((side, side), (side, side), (3, 3), (1, 1), (1, 1), (1, 1))


def cuts(side: int) -> list[Tile]:
    """Rows, every tile that fits, and dense."""
    tiles = [(h, w) for h in SIDES for w in SIDES if h <= side and w <= side]
    return list(dict.fromkeys([(1, 1), *tiles, (side, side)]))


def time_cuts(mask: Tensor, side: int, channels: int, repeats: int, device: torch.device) -> dict[Tile, float]:
    """Seconds of each cut under a latent mask: the least of ``repeats``, in turns."""
    geometry, plans = conv_geometry(side), {}
    weight = torch.randn(channels, 9 * channels, device=device)
    for tile in cuts(side):
        plan = MaskPlan(mask.to(device), Fixed(tile=tile))
        plans[tile] = [plan.table(Index(kind, geometry)) for kind in Index.CONV]
    count = int(project_mask(mask, (side, side)).sum())
    rows = torch.randn(BATCH, count, channels, device=device)
    best = dict.fromkeys(plans, float("inf"))
    for _ in range(repeats + 1):
        for tile, (halo_index, neighbors, outputs) in plans.items():
            assert halo_index is not None and neighbors is not None
            halo = torch.zeros(BATCH, halo_index.shape[1], channels, device=device)
            start = _now(device)
            sparse_conv(rows, halo, neighbors, outputs, weight, None, [3, 3], [1, 1], [1, 1], 1)
            best[tile] = min(best[tile], _now(device) - start)
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def cases(repeats: int, device: torch.device) -> Iterator[Case]:
    masks = [(f"blob {share:.0%}", blob((64, 64), share)) for share in (0.02, 0.05, 0.10, 0.15, 0.30, 0.60)]
    masks += [(f"ragged {share:.0%}", ragged((64, 64), 0, share)) for share in (0.08, 0.16, 0.23, 0.40)]
    for (name, mask), (side, channels) in itertools.product(masks, LEVELS):
        active = project_mask(mask, (side, side))
        seconds = time_cuts(mask, side, channels, repeats, device)
        yield Case(name, side, float(active.float().mean()), active, conv_geometry(side), seconds)


def fit(measured: list[Case]) -> HaloCost:
    """The constants of least mean regret over the measured cases, by grid search (ties: the smaller constants)."""
    grid = torch.cartesian_prod(*(torch.tensor(values) for values in (GATHER, TILED, OVERHEAD)))  # [G, 3]
    total = torch.zeros(len(grid))
    for case in measured:
        tiles = list(case.seconds)
        # The cost is linear in its constants: take it apart into what each one multiplies.
        fixed = torch.tensor([HaloCost(0.0, 0.0, 0.0)(case.active, case.geometry, tile) for tile in tiles])  # [T]
        units = [HaloCost(1.0, 0.0, 0.0), HaloCost(0.0, 1.0, 0.0), HaloCost(0.0, 0.0, 1.0)]
        parts = torch.tensor([[unit(case.active, case.geometry, tile) for tile in tiles] for unit in units]) - fixed
        chosen = (grid @ parts + fixed).argmin(1)  # [G]
        total += torch.tensor([case.regret(tile) for tile in tiles])[chosen]
    gather, tiled, overhead = (round(value, 3) for value in grid[int(total.argmin())].tolist())
    return HaloCost(gather, tiled, overhead)


def policies(fitted: HaloCost) -> dict[str, CostModel]:
    shipped = CostModel()
    return {
        "halo, shipped": shipped,
        "halo, fitted": replace(shipped, halo=fitted),
        "paper": CostModel("paper"),
        "rows": CostModel("rows"),
        "dense": CostModel("dense"),
    }


def print_cases(measured: list[Case], models: dict[str, CostModel], title: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("mask", no_wrap=True)
    for heading in ("level", "active", "best", "ms", *models):
        table.add_column(heading, justify="right")
    for case in measured:
        cells = []
        for model in models.values():
            tile = model.choose(case.active, case.geometry)
            cells.append(f"{_name(tile, case.side)} {case.regret(tile):.2f}")
        table.add_row(
            case.mask, str(case.side), f"{case.share:.0%}", _name(case.best, case.side),
            f"{case.seconds[case.best] * 1e3:.2f}", *cells,
        )  # fmt: skip
    Console(width=130).print(table)


def _name(tile: Tile, side: int) -> str:
    return "rows" if tile == (1, 1) else "dense" if tile == (side, side) else f"{tile[0]}x{tile[1]}"


def mean_regrets(measured: list[Case], models: dict[str, CostModel]) -> dict[str, float]:
    """Mean regret of each model, and of all convolutions together (sum of chosen over sum of best)."""
    out: dict[str, float] = {}
    for name, model in models.items():
        chosen = [model.choose(case.active, case.geometry) for case in measured]
        spent = sum(case.seconds[tile] for case, tile in zip(measured, chosen, strict=True))
        out[name] = sum(c.regret(t) for c, t in zip(measured, chosen, strict=True)) / len(measured)
        out[f"{name}, total time"] = spent / sum(case.seconds[case.best] for case in measured)
    return out


def main(
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="The least time is taken.")] = 7,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure cuts of convolutions, the cost model's choices, and fit its constants."""
    where = torch.device(device)
    environment = describe_environment(where)
    with torch.no_grad():
        measured = list(cases(repeats, where))
    fitted = fit(measured)
    models = policies(fitted)
    print_cases(
        measured,
        models,
        f"3x3 convolutions, batch {BATCH}; each choice with its regret; {environment_line(environment)}",
    )
    regrets = mean_regrets(measured, models)
    for name in models:
        print(f"{name:<14} mean regret {regrets[name]:.3f}; all cases together {regrets[f'{name}, total time']:.3f}")
    print(f"fitted: {fitted}")
    if output is not None:
        rows = [case.to_dict() for case in measured]
        result = {"environment": environment, "fitted": asdict(fitted), "regrets": regrets, "cases": rows}
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
