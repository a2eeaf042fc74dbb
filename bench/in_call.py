"""What products take within a call, beside what they take alone: from what ``bench/unet.py`` wrote. It needs no GPU.

    python bench/unet.py --output unet.json --profile "blob 15%"
    python bench/in_call.py unet.json

A product's time within a call is that from the end of the launch in front to its own end, in a profile of one call;
alone, what the cost model knows. Where the two are far apart, a way may be chosen that is not the fastest there.
Products that PyTorch computes are left out: they are several launches.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from fisedit.environment import environment_line
from fisedit.runtime.tuning.product import LIBRARY

KERNELS = ("multiply_specialized", "multiply_in_turns", "_multiply")
PROFILE = "call, "
"""In front of the names of profiles."""


@dataclass(frozen=True)
class Layer:
    """Layers of one shape that are computed in one way; µs of each of them."""

    shape: str
    rows: int
    way: str
    number: int
    alone: float
    within: float

    @property
    def more(self) -> float:
        return self.number * (self.within - self.alone)


def kernel_of(way: str) -> str:
    """The kernel that computes a product in a way, by its name."""
    return KERNELS[1] if way.endswith(" in turns") else KERNELS[0] if way.endswith(" specialized") else KERNELS[2]


def times_within(launches: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """The name of each launch, and µs from the end of all before it to its own: what it adds to the call."""
    last = None
    for launch in sorted(launches, key=lambda launch: launch["start"]):
        end = launch["start"] + launch["microseconds"]
        yield launch["name"], 0.0 if last is None else max(0.0, end - last)
        last = end if last is None else max(last, end)


def compare(profile: Mapping[str, Any]) -> list[Layer]:
    """The products of a profiled call, those first that differ most.

    Raises:
        ValueError: the launches are not those of the layers.
    """
    products = [
        layer for layer in profile["layers"] if layer["kind"] != "self-attention" and layer["chosen"] != LIBRARY
    ]
    launches = [(name, time) for name, time in times_within(profile["launches"]) if name in KERNELS]
    if [kernel_of(layer["chosen"]) for layer in products] != [name for name, _ in launches]:
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
    lines = ["| product | rows | way | layers | alone, µs | within, µs | all of them: more, µs |",
             "| --- | ---: | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    lines += [f"| {one.shape} | {one.rows} | {one.way} | {one.number} | {one.alone:.1f} | {one.within:.1f} "
              f"| {one.more:+.0f} |" for one in layers]  # fmt: skip
    return "\n".join(lines)


def main(
    results: Annotated[Path, typer.Argument(help="What bench/unet.py wrote with --output.")],
    most: Annotated[int, typer.Option(help="Lines of a table.")] = 12,
) -> None:
    """Print a table for each profiled call."""
    values = json.loads(results.read_text(encoding="utf-8"))
    profiles = [(model, name, profile) for model, found in values.items() if isinstance(found, dict)
                for name, profile in found.items() if name.startswith(PROFILE)]  # fmt: skip
    if not profiles:
        raise typer.BadParameter(f'no profile in {results}; run bench/unet.py with --profile "blob 5%"')
    for model, name, profile in profiles:
        layers = compare(profile)
        print(f"\n{model}, {name.removeprefix(PROFILE)}: {sum(one.number for one in layers)} products, "
              f"{sum(one.number * one.alone for one in layers):.0f} µs alone, "
              f"{sum(one.more for one in layers):+.0f} within the call\n\n{table(layers[:most])}")  # fmt: skip
    print(f"\n{environment_line(values['environment'])}")


if __name__ == "__main__":
    typer.run(main)
