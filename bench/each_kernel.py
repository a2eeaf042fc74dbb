"""Each kernel alone, at the shapes of Stable Diffusion 2's U-Net (768x768, batch 2), beside its roofline.

    python bench/each_kernel.py --output kernels.json
    python bench/each_kernel.py --regret                 also other tile sizes: is the chosen one the fastest?
    python bench/each_kernel.py --tuned                  in the measured way; the first time, it is measured
    python bench/each_kernel.py --tuned --regret         also in all other ways, at the very numbers of rows
    python bench/each_kernel.py --tiny                   small shapes and the reference kernels, on any device

Calls are captured in a CUDA graph and replayed, so that no launch is waited for; weights and recorded maps take turns
with copies of themselves, so that they come from memory, as in a whole model. *library* is what PyTorch takes for
the product or the attention alone, on inputs that lie ready, gathered and contiguous.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from kernel_cases import LEVELS, TINY_LEVELS, Case, Cases, Run, load_kernels
from masks import blob, ragged
from roofline import Peak, peak_of

from fisedit.environment import describe_environment, environment_line
from fisedit.runtime.calibration import Choice, time_on_gpu
from fisedit.runtime.explain import explain_choices

TILES: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "multiply_rows": ("m n k warps stages split", [
        (*tile, split)
        for tile in ((16, 64, 128, 4, 6), (32, 32, 128, 4, 8), (32, 64, 128, 4, 5), (64, 32, 128, 4, 6),
                     (64, 64, 128, 4, 3), (64, 64, 128, 4, 5), (64, 128, 64, 4, 4), (64, 128, 64, 4, 6),
                     (128, 64, 64, 4, 4), (128, 64, 64, 4, 6), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3))
        for split in (1, 2, 4, 8)
    ]),
    "attend_rows": ("m n warps stages programs", [
        (*tile, programs) for tile in ((64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 8, 3)) for programs in (0, 132, 264)
    ]),
}  # fmt: skip
"""What ``--regret`` tries besides the kernels' own choice: fields of their ``Config``."""
WAYS_OF = {"multiply_rows": "product", "attend_rows": "attend_rows"}
"""Modules of ``fisedit.runtime.tuning`` that know all ways to compute an op."""


@dataclass(frozen=True)
class Timed:
    """µs of a case, of the library's part of it, and the floor by the GPU's data sheet."""

    op: str
    shape: str
    side: int
    mask: str
    rows: int
    microseconds: float
    pytorch: float | None
    floor: float | None
    tflops: float
    gigabytes: float
    chosen: float | None = None
    best: float | None = None
    best_config: str = ""

    @property
    def regret(self) -> float:
        """The time of what is chosen over that of the best."""
        return (self.chosen or self.microseconds) / (self.best or self.microseconds)


def microseconds(runs: Sequence[Run], device: torch.device) -> float:
    """µs of a call; on a CPU by the clock."""
    if device.type == "cuda":
        return time_on_gpu(*runs)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        runs[0]()
        times.append(time.perf_counter() - start)
    return median(times) * 1e6


def measure(case: Case, mask: str, peak: Peak | None, device: torch.device) -> Timed:
    case.runs[0]()  # compiled, and its tables made
    spent = microseconds(case.runs, device)
    floor = max(case.bytes / peak.bytes, case.macs / peak.macs) * 1e6 if peak else None
    return Timed(
        case.op, case.shape, case.level.side, mask, case.rows, spent,
        microseconds(case.pytorch, device) if case.pytorch else None, floor,
        tflops=2e-6 * case.macs / spent, gigabytes=1e-3 * case.bytes / spent,
    )  # fmt: skip


def configurations(op: str) -> list[Any]:
    """Other configurations of a Triton kernel that chooses one."""
    if op not in TILES:
        return []
    names, values = TILES[op]
    config = import_module(f"fisedit.runtime.kernels.{op}.triton").Config
    return [config(**dict(zip(names.split(), each, strict=True))) for each in values]


def with_best(timed: Timed, case: Case, device: torch.device) -> Timed:
    """``timed`` with the fastest configuration; the kernel's own is among them."""
    from triton.runtime.errors import OutOfResources

    best, name = timed.microseconds, "as chosen"
    for config in configurations(case.op):
        try:
            spent = microseconds([partial(run, config=config) for run in case.runs], device)
        except OutOfResources:
            continue
        best, name = min((best, name), (spent, str(config)))
    return replace(timed, best=best, best_config=name)


def prepare(cases: Sequence[Case]) -> None:
    """Time the ways of tuned ops that are not known yet, and compile on all processors what that needs."""
    from fisedit.runtime.kernels.compilers import Compilers
    from fisedit.runtime.kernels.launch import rehearse

    with Compilers() as compilers:
        for decide in (False, True):
            with rehearse(compilers, decide):
                for case in cases:
                    case.runs[0]()


def with_best_way(timed: Timed, case: Case, device: torch.device) -> Timed:
    """``timed``, if it is of a tuned op, with the times of the way that is chosen for it and of the fastest one.

    Timings are kept for padded numbers of rows; here all ways are timed for the case's own number.
    """
    from fisedit.runtime.kernels.compilers import Compilers
    from fisedit.runtime.kernels.launch import rehearse
    from fisedit.runtime.tuning.choose import RULE, choose_way, time_way, timings_of

    if case.op not in TILES or not (calls := [call_of(case.op, run) for run in case.runs])[0]:
        return timed
    every = import_module(f"fisedit.runtime.tuning.{WAYS_OF[case.op]}").candidates
    chosen = choose_way(calls[0], timings_of(device))
    ways = dict.fromkeys([chosen, RULE, *every(calls[0].shape, case.rows), *calls[0].shape.ways(case.rows)])
    with Compilers() as compilers, rehearse(compilers):
        for way in ways:
            calls[0].rehearse(way)
    times = {way: time_way([partial(call.rehearse, way) for call in calls]) for way in ways}
    best = min(times, key=times.__getitem__)
    return replace(timed, chosen=times[chosen], best=times[best], best_config=str(best))


def call_of(op: str, run: Any) -> Any:
    """A run of a tuned op as its tuning sees it; ``None`` where there is only one way."""
    tuning = import_module(f"fisedit.runtime.tuning.{op}")
    given = {**dict(zip(tuning.NAMES, run.args, strict=False)), **run.keywords}
    return None if op == "attend_rows" and not tuning.has_ways(given) else tuning.Call(given)


def regrets(timed: list[Timed]) -> list[str]:
    """A line for each kernel that chooses, and for each mask: the time of all cases over that of the best choices."""
    choosing = [one for one in timed if one.op in TILES and one.best is not None]
    groups: dict[str, list[Timed]] = {}
    for one in choosing:
        groups.setdefault(one.op, []).append(one)
    for one in choosing:
        groups.setdefault(one.mask, []).append(one)
    lines = []
    for name, own in groups.items():
        worst = max(own, key=lambda one: one.regret)
        total = sum(one.chosen or one.microseconds for one in own) / sum(one.best or 0.0 for one in own)
        lines.append(
            f"{name}, {len(own)} cases: {total:.3f} of the best in all, at worst {worst.regret:.2f} "
            f"({worst.shape}, {worst.rows} rows: {worst.best_config})"
        )
    return lines


HEADER = (
    "| kernel | shape | level | mask | rows | µs | library, µs | TFLOP/s | GB/s | floor, µs | floor / time |\n"
    "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def line(t: Timed) -> str:
    """A row of a Markdown table."""
    floor = ("", "") if t.floor is None else (f"{t.floor:.1f}", f"{t.floor / t.microseconds:.0%}")
    library = "" if t.pytorch is None else f"{t.pytorch:.1f}"
    return (
        f"| {t.op} | {t.shape} | {t.side} | {t.mask} | {t.rows} | {t.microseconds:.1f} | {library} "
        f"| {t.tflops:.0f} | {t.gigabytes:.0f} | {floor[0]} | {floor[1]} |"
    )


def main(
    shares: Annotated[str, typer.Option(help="Active shares of the blobs.")] = "0.05,0.15,0.3",
    ragged_share: Annotated[float, typer.Option(help="Of a ragged mask; 0 leaves it out.")] = 0.23,
    dtype: str = "float16",
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    tiny: Annotated[bool, typer.Option(help="Small shapes; the reference kernels on a CPU.")] = False,
    regret: Annotated[bool, typer.Option(help="Also time other configurations; on a GPU, some minutes.")] = False,
    tuned: Annotated[bool, typer.Option(help="In the measured way, as in an edit; on a GPU.")] = False,
) -> None:
    """Measure kernels one by one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = describe_environment(device)
    levels, peak = TINY_LEVELS if tiny else LEVELS, peak_of(environment["device"])
    kernels = load_kernels("triton" if device.type == "cuda" else "reference")
    tuning = import_module("fisedit.runtime.tuning.choose") if tuned and device.type == "cuda" else None
    if tuning is not None:
        for op in ("attend_rows", "multiply_rows"):
            kernels[op] = getattr(import_module(f"fisedit.runtime.tuning.{op}"), op)
    size = (levels[0].side, levels[0].side)
    masks = {f"blob {float(share):.0%}": blob(size, float(share)) for share in shares.split(",")}
    if ragged_share:
        masks[f"ragged {ragged_share:.0%}"] = ragged(size, 0, ragged_share)
    timed: list[Timed] = []
    choices: list[Choice] = []

    def add(case: Case, name: str) -> None:
        one = measure(case, name, peak, device)
        best = with_best_way if tuning else with_best
        timed.append(best(one, case, device) if regret else one)
        print(line(timed[-1]), flush=True)
        if output is not None:
            kept = {"environment": environment, "kernels": [asdict(one) for one in timed]}
            output.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")

    print(HEADER, flush=True)
    with torch.no_grad(), tuning.timings_of(device).collect() if tuning else nullcontext(choices) as choices:
        for name, mask in masks.items():
            for level in levels:
                cases = list(Cases(kernels, level, mask, device, dtype if device.type == "cuda" else "float32").all())
                if tuning is not None:
                    prepare(cases)
                for case in cases:
                    add(case, name)
        folding = Cases(kernels, levels[-1], mask, device, "float32").folding(norms=61)
        add(folding, "any")
    why = explain_choices(list({(one.kind, one.key, one.rows): one for one in choices}.values()), "µs")
    print("", *regrets(timed), why, environment_line(environment), sep="\n")


if __name__ == "__main__":
    typer.run(main)
