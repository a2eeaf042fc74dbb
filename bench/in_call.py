"""What products take within a call, beside what they were timed to take: from what ``bench/unet.py`` wrote. No GPU is
needed.

    python bench/unet.py --output unet.json --profile "blob 15%"
    python bench/in_call.py unet.json

A product's time within a call is that from the end of the launch in front to its own end, in a profile of one call;
timed, what the cost model knows. Where the two are far apart, a way may be chosen that is not the fastest there.
Products that PyTorch computes are left out: they are several launches.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from kernel_table import PROFILE, Launch, added

from fisedit.environment import environment_line
from fisedit.runtime.tuning.product import LIBRARY, WINOGRAD

KERNELS = ("multiply_specialized", "multiply_in_turns", "_multiply")
ATTENDING = {"multiply_specialized": "multiply_attend_specialized", "_multiply": "_multiply_attend"}
"""The kernels of products, and of those whose rows attend to a text."""


@dataclass(frozen=True)
class Layer:
    """Layers of one shape that are computed in one way; µs of each of them."""

    shape: str
    rows: int
    way: str
    number: int
    timed: float
    within: float

    @property
    def more(self) -> float:
        return self.number * (self.within - self.timed)


def kernel_of(layer: Mapping[str, Any]) -> str:
    """The kernel that computes a product in the chosen way, by its name."""
    way, attends = layer["chosen"], layer["key"][-1].endswith(" keys")
    name = KERNELS[1] if way.endswith(" in turns") else KERNELS[0] if " specialized" in way else KERNELS[2]
    return ATTENDING[name] if attends else name


def compare(profile: Mapping[str, Any]) -> list[Layer]:
    """The products of a profiled call, those first that differ most.

    Raises:
        ValueError: the launches are not those of the layers.
    """
    products = [
        layer
        for layer in profile["layers"]
        if layer["kind"] != "self-attention" and layer["chosen"] not in (LIBRARY, WINOGRAD)
    ]
    known = {*KERNELS, *ATTENDING.values()}
    every = [Launch(**launch) for launch in profile["launches"]]
    launches = [(launch, time) for launch, time in added(every) if launch.name in known]
    if [kernel_of(layer) for layer in products] != [launch.name for launch, _ in launches]:
        raise ValueError(f"{len(launches)} launches of products do not fit {len(products)} layers")
    found: dict[tuple[str, int, str], list[tuple[float, float]]] = defaultdict(list)
    for layer, (_, time) in zip(products, launches, strict=True):
        if layer["chosen"] in layer["costs"]:
            shape = ", ".join(part for part in (layer["kind"], layer["key"][0], layer["key"][-1]) if part)
            found[shape, layer["rows"], layer["chosen"]].append((layer["costs"][layer["chosen"]], time))
    layers = [
        Layer(*key, len(times), *(mean(column) for column in zip(*times, strict=True))) for key, times in found.items()
    ]
    return sorted(layers, key=lambda layer: -abs(layer.more))


def table(layers: Sequence[Layer]) -> str:
    """Markdown."""
    lines = ["| product | rows | way | layers | timed, µs | within, µs | all of them: more, µs |",
             "| --- | ---: | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    lines += [f"| {one.shape} | {one.rows} | {one.way} | {one.number} | {one.timed:.1f} | {one.within:.1f} "
              f"| {one.more:+.0f} |" for one in layers]  # fmt: skip
    return "\n".join(lines)


def main(
    results: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="What bench/unet.py wrote with --output.")
    ],
    most: Annotated[int, typer.Option(help="Lines of a table.")] = 12,
) -> None:
    """Print a table for each profiled call."""
    values = json.loads(results.read_text(encoding="utf-8"))
    profiles = {(model, name): profile for model, found in values.items()
                for name, profile in found.items() if name.startswith(PROFILE)}  # fmt: skip
    if not profiles:
        raise typer.BadParameter(f'no profile in {results}; run bench/unet.py with --profile "blob 5%"')
    for (model, name), profile in profiles.items():
        call = f"{model}, {name.removeprefix(PROFILE)}"
        try:
            layers = compare(profile)
        except ValueError as error:
            raise typer.BadParameter(f"{results}, {call}: {error}; profile it with these kernels") from error
        print(f"\n{call}: {sum(one.number for one in layers)} products by kernels of ours, "
              f"{sum(one.number * one.timed for one in layers):.0f} µs as timed, "
              f"{sum(one.more for one in layers):+.0f} within the call")  # fmt: skip
        if layers:
            print(f"\n{table(layers[:most])}")
    print(f"\n{environment_line(values['environment'])}")


if __name__ == "__main__":
    typer.run(main)
