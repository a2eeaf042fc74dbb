"""Why an edit is computed as it is: the choices of the cost model as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fisedit.runtime.calibration import Choice
from fisedit.runtime.cost_model import SIDES, CostModel
from fisedit.runtime.geometry import ConvGeometry, Tile
from fisedit.runtime.plan import project_mask

SHOWN = 4
"""Candidates of a layer that are shown: the chosen one and the cheapest others."""


@dataclass(frozen=True)
class CallChoice:
    """How a whole call runs, and the expected ms of both ways where they are known."""

    share: float
    dense: bool
    sparse_ms: float | None = None
    dense_ms: float | None = None

    def __str__(self) -> str:
        known = [f"{way} {ms:.2f} ms" for way, ms in (("sparse", self.sparse_ms), ("dense", self.dense_ms)) if ms]
        expected = f" (expected: {', '.join(known)})" if known else ""
        return f"{self.share:.1%} active: the edit runs {'dense' if self.dense else 'sparse'}{expected}"


def explain_choices(choices: Sequence[Choice], unit: str, call: CallChoice | None = None) -> str:
    """A line for each kind of layer: how many there are, what was chosen, and what the candidates cost.

    Args:
        choices: of all layers of a call.
        unit: of their costs, such as ``"µs"``.
        call: whether the call runs sparse at all.
    """
    alike: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], Choice] = {}
    for choice in choices:
        name = (f"{choice.kind} {_words(choice.key)}", f"{choice.rows} rows")
        alike[name] += 1
        first.setdefault(name, choice)
    lines = [str(call)] if call is not None else []
    width = max((len(name) for name, _ in alike), default=0)
    for name, number in alike.items():
        choice = first[name]
        lines.append(f"{number:3} x {name[0]:<{width}}  {name[1]:>10}: {choice.chosen}{_why(choice, unit)}")
    total = sum(alike[name] * choice.costs.get(choice.chosen, math.nan) for name, choice in first.items())
    if alike and not math.isnan(total):
        lines.append(f"all {sum(alike.values())} layers: {_figure(total)} {unit}")
    return "\n".join(lines)


def _why(choice: Choice, unit: str) -> str:
    """What the chosen candidate costs, and what the next ones would."""
    if not choice.costs:
        return " (nothing was measured)"
    others = sorted((cost, name) for name, cost in choice.costs.items() if name != choice.chosen)
    shown = [f"{name} {_figure(cost)}" for cost, name in others[: SHOWN - 1]]
    rest = f", {len(others) - len(shown)} more" if len(others) > len(shown) else ""
    own = choice.costs.get(choice.chosen)
    cost = "" if own is None else f" {_figure(own)} {unit}"
    return f"{cost}; against {', '.join(shown)}{rest}" if shown else f"{cost}, the only candidate"


def _figure(value: float) -> str:
    return "left out" if math.isinf(value) else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _words(key: Iterable[object]) -> str:
    return " ".join(str(part) for part in key)


def tile_choices(geometries: Iterable[ConvGeometry], mask: Tensor, cost_model: CostModel) -> list[Choice]:
    """How the cost model cuts convolutions under a mask, in units of one multiply-add row.

    Args:
        geometries: of all convolutions, one for each.
        mask: bool ``[H, W]`` over the latent.
    """
    made: dict[ConvGeometry, Choice] = {}
    choices = []
    for geometry in geometries:
        if geometry not in made:
            made[geometry] = _tile_choice(geometry, project_mask(mask, geometry.target), cost_model)
        choices.append(made[geometry])
    return choices


def _tile_choice(geometry: ConvGeometry, active: Tensor, cost_model: CostModel) -> Choice:
    whole = geometry.target
    tiles = [(1, 1), *((h, w) for h in SIDES for w in SIDES if h <= whole[0] and w <= whole[1]), whole]
    chosen = (1, 1) if geometry.kernel == (1, 1) else cost_model.choose(active, geometry)
    costs: Mapping[str, float] = {}
    if cost_model.cost == "halo":
        costs = {_tile_name(tile, whole): cost_model.halo(active, geometry, tile) for tile in tiles}
    return Choice("convolution", (str(geometry),), int(active.sum()), _tile_name(chosen, whole), costs)


def _tile_name(tile: Tile, whole: Tile) -> str:
    return "rows" if tile == (1, 1) else "dense" if tile == whole else f"tiles of {tile[0]}x{tile[1]}"
