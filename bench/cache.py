"""What recordings cost on each tier of memory, and what an edit waits for: our version of the paper's Table 2.

    python bench/cache.py --output cache.json              SD2.1 at 768x768, fp16, batch 2, on a GPU
    python bench/cache.py --bus 12,25                      also as if the bus moved so many GB/s
    python bench/cache.py --sizes                          what a step stores, counted; needs no GPU
    python bench/cache.py --tiny                           a small model on any device, to try the script out

*Exposed* is what a step waits for its recorded values: its time less that of the same step whose base lies whole on the
GPU. *Transfer* is how long the copies of a step take on their stream, hidden or not. Loops of tiers take turns with
those of the GPU tier and of the dense baseline, ``torch.compile(mode="reduce-overhead")``. Weights are random.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from calls import Loop, Subject, loop, milliseconds, prepare, relative_error
from masks import blob, family
from published import MODELS, TINY, Published, arguments, build
from torch import Tensor

import fisedit
from fisedit.capture import bind_call, capture
from fisedit.edit_session import EditSession
from fisedit.environment import describe_environment, environment_line
from fisedit.explanation import workspaces
from fisedit.passes.base import PassLog, run_passes
from fisedit.passes.ir import args, is_op
from fisedit.passes.ir import fisedit as ops
from fisedit.passes.pipeline import canonical_passes
from fisedit.passes.plan_memory import predict_peak
from fisedit.program import Program
from fisedit.recording import Recording
from fisedit.runtime.cache.block import SCALE
from fisedit.runtime.cache.tiers import Tiers
from fisedit.runtime.trace import Trace

Masks = dict[str, list[Tensor | None]]
"""By name; ``None`` stands for an edit that seeks its mask, in all steps that the base has the queries of."""
WARM = 2
"""Calls of a session that are not part of its loop."""
MB = 1e6


@dataclass(frozen=True)
class Tier:
    """Where a base lies: options of ``CacheConfig``, and of ``compile``. ``keys``: share of the GPU's budget for keys
    and values, in steps of the run."""

    cache: dict[str, Any]
    kv: str = "cached"
    keys_on_gpu: bool = False


TIERS = {
    "GPU": Tier({}),
    "GPU, active keys": Tier({}, kv="active"),
    "GPU, keys in 8 bits": Tier({}, kv="int8"),
    "GPU, all in 8 bits": Tier({"storage": "int8"}),
    "host, keys on GPU": Tier({}, keys_on_gpu=True),
    "host, keys streamed": Tier({"gpu": 0}),
    "host, keys in 8 bits": Tier({"gpu": 0}, kv="int8"),
    "host, active keys": Tier({"gpu": 0}, kv="active"),
    "host, all in 8 bits, keys on GPU": Tier({"storage": "int8"}, keys_on_gpu=True),
    "gpu=1GiB": Tier({"gpu": "1GiB"}),
    "disk": Tier({"gpu": 0, "host": 0}, kv="active"),
}
"""Those on the GPU in front: what the others are compared with, by kind of keys and storage."""


@dataclass(frozen=True)
class Line:
    """One line of the table. Milliseconds, and megabytes (10^6) a step."""

    tier: str
    mask: str
    bus: float | None
    gpu_step: float
    step: float
    loaded: float
    transfer: float
    identical: bool
    error: float

    @property
    def exposed(self) -> float:
        return self.step - self.gpu_step


@dataclass(frozen=True)
class Recorded:
    """What recording on a tier takes: ms of a call, of the dense baseline beside it, MB stored a step by kind."""

    tier: str
    first: float
    call: float
    dense: float
    stored: dict[str, float]
    placed: dict[str, dict[str, float]]
    transfer: float
    peak_gpu: float
    peak_host: float


@contextmanager
def ours(subject: Subject, tier: Tier, dense: str, keys: int, folder: Path) -> Iterator[fisedit.CompiledUNet]:
    """The model compiled for a tier; its memory is free afterwards."""
    options = dict(tier.cache)
    if tier.keys_on_gpu:
        options["gpu"] = keys
    if options.get("host") == 0:
        options["disk"] = folder
    unet = fisedit.compile(copy.copy(subject.unet), kv=tier.kv, dense=dense, cache=fisedit.CacheConfig(**options))
    try:
        yield unet
    finally:
        tiers_of(unet, subject.device).pool.trim()
        del unet
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def tiers_of(unet: fisedit.CompiledUNet, device: torch.device) -> Tiers:
    return unet.tiers(torch.device(device.type, torch.cuda.current_device()) if device.type == "cuda" else device)


def record(subject: Subject, unet: fisedit.CompiledUNet) -> tuple[Loop, Recording]:
    with unet.record() as base:
        step = subject.step(unet)
        milliseconds(lambda: step(subject.timesteps[0]), subject.device)
        timed, _ = loop(step, subject.timesteps[1:], subject.device)
    return timed, base


@contextmanager
def editing(
    subject: Subject, unet: fisedit.CompiledUNet, base: Recording, mask: Tensor | None
) -> Iterator[tuple[fisedit.Edit, list[Any]]]:
    """A session that edits under a mask, or seeks one, and the timesteps of its calls."""
    if mask is not None:
        with unet.edit(base, mask.to(subject.device)) as edit:
            yield edit, list(subject.timesteps)
        return
    steps = sum(any(block.kind == "queries" for block in made.cache.blocks()) for made in base.calls.values())
    with unet.edit(base, detect=fisedit.DetectConfig(steps=steps, window=(1, steps))) as edit:
        yield edit, list(subject.timesteps)[:steps]


def edit(
    subject: Subject, unet: fisedit.CompiledUNet, base: Recording, mask: Tensor | None
) -> tuple[float, Tensor, float]:
    """Ms of a call in a loop, the last output, and MB loaded by a call."""
    step = subject.step(unet)
    with editing(subject, unet, base, mask) as (edit, timesteps):
        for timestep in timesteps[:WARM]:
            step(timestep)
        timed, out = loop(step, timesteps[WARM:], subject.device)
        report = edit.report()
    loaded = report.bytes_fetched[WARM:] if report.bytes_fetched else [0]
    return timed.wall, out.clone(), mean(loaded) / MB


def transfers(
    subject: Subject, unet: fisedit.CompiledUNet, base: Recording, mask: Tensor | None
) -> tuple[float, float]:
    """Ms that the copies of a call take on their stream, and MB."""
    trace, step = Trace("bench"), subject.step(unet)
    with trace.open(), editing(subject, unet, base, mask) as (_, timesteps):
        for timestep in timesteps:
            step(timestep)
    print(f"  files: read at {rate(trace, 'read')}", flush=True)
    spans = [span for span in trace.spans() if span.track == "load"][WARM:] if subject.device.type == "cuda" else []
    if not spans:
        return 0.0, 0.0
    return median(s.end - s.start for s in spans) * 1e3, median(s.args["bytes"] for s in spans) / MB


def measure_record(
    subject: Subject, name: str, unet: fisedit.CompiledUNet, repeats: int, baseline: bool
) -> tuple[Recorded, Recording]:
    device, pool = subject.device, tiers_of(unet, subject.device).pool
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first, base = record(subject, unet)  # host memory is made now, and used again from then on
    stored = {kind: sum(of.values()) / len(base.calls) / MB for kind, of in base.placement().items()}
    placed = {kind: {t: n / MB for t, n in of.items()} for kind, of in base.placement().items()}
    peak = torch.cuda.max_memory_allocated() / MB if device.type == "cuda" else 0.0
    calls, dense = [], []
    for _ in range(repeats):
        base.release()
        gc.collect()
        timed, base = record(subject, unet)
        calls.append(timed.wall)
        if baseline:
            dense.append(loop(subject.step(subject.dense), subject.timesteps, device)[0].wall)
    trace = Trace("bench")
    base.release()
    gc.collect()
    with trace.open():
        _, base = record(subject, unet)
    print(f"  files: written at {rate(trace, 'write')}", flush=True)
    copies = sum(s.end - s.start for s in trace.spans() if s.track == "store") / len(base.calls) * 1e3
    made = Recorded(name, first.wall, median(calls), median(dense or [math.nan]), stored, placed, copies, peak,
                    (pool.used + pool.idle) / MB)  # fmt: skip
    return made, base


def measure_tier(
    subject: Subject, name: str, tier: Tier, masks: Masks, wanted: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Recorded, list[Line]]:  # fmt: skip
    """Record and edit on one tier; ``wanted``: ms and outputs of the same edits on the GPU, by kind of keys."""
    lines = []
    exact = f"{tier.kv} {tier.cache.get('storage', 'exact')}"
    with ours(subject, tier, options["dense"], options["keys"], options["folder"]) as unet:
        recorded, base = measure_record(subject, name, unet, options["repeats"], options["baseline"])
        print(f"{name}: recording {recorded.call:.2f} ms, dense {recorded.dense:.2f} ms", flush=True)
        for bus in (None, *options["bus"]) if name.startswith("host") else (None,):
            tiers_of(unet, subject.device).bus = bus * 1e9 if bus else None
            for mask_name, of_kind in masks.items():
                each = []
                for number, mask in enumerate(of_kind):
                    runs = [edit(subject, unet, base, mask) for _ in range(options["repeats"])]
                    best = median(run[0] for run in runs)
                    reference = wanted.setdefault(f"{exact} {mask_name} {number}", (best, runs[0][1]))
                    identical = all(torch.equal(run[1], reference[1]) for run in runs)
                    each.append(
                        (reference[0], best, runs[0][2], identical, error_of(wanted, mask_name, number, runs, mask))
                    )
                transfer, fetched = transfers(subject, unet, base, of_kind[0])
                of, step, loaded = (mean(one[part] for one in each) for part in range(3))
                same, error = all(one[3] for one in each), max(one[4] for one in each)
                lines.append(Line(name, mask_name, bus, of, step, loaded or fetched, transfer, same, error))
                print(f"  {lines[-1]}", flush=True)
        for of_kind in masks.values() if subject.device.type == "cuda" else ():
            if of_kind[0] is not None:
                print(f"  {intermediates(subject, unet, base, of_kind[0])}", flush=True)
        if name == "GPU":
            lines += moved(subject, unet, base, masks, wanted, exact)
        base.release()
    return recorded, lines


def error_of(wanted: dict[str, Any], name: str, number: int, runs: list[Any], mask: Tensor | None) -> float:
    """How far an edit's output is from that of the exact edit, of its largest value, over the active positions."""
    exact = wanted.get(f"cached exact {name} {number}")
    if exact is None:
        return math.nan
    everywhere = torch.ones(exact[1].shape[-2:], dtype=torch.bool)
    return relative_error(runs[0][1], exact[1].float(), everywhere if mask is None else mask)


def rate(trace: Trace, word: str) -> str:
    """Bytes a second of what a thread reads from files, or writes to them."""
    spans = [s for s in trace.spans() if s.track == "disk" and s.name.startswith(word)]
    seconds = sum(s.end - s.start for s in spans)
    return f"{sum(s.args['bytes'] for s in spans) / seconds / 1e9:.2f} GB/s" if spans else "nothing"


def intermediates(subject: Subject, unet: fisedit.CompiledUNet, base: Recording, mask: Tensor) -> str:
    """What the values between the kernels of a sparse call take, and what these need meanwhile: as planned, in a call
    op by op, in its CUDA graph."""
    from fisedit.runtime.tuning.choose import timings_of  # needs Triton

    step, dtype = subject.step(unet), subject.call["sample"].dtype
    program = next(iter(unet._live.programs.values()))
    with editing(subject, unet, base, mask) as (_, timesteps):
        for timestep in timesteps[:WARM]:
            step(timestep)
        session = next(found for found in gc.get_objects() if isinstance(found, EditSession))
        replay = next(group.replay for group in session.groups.values() if group.replay is not None)
        rows = {level: number for level, number, _ in replay.buckets.rows}
        graph = program.graphs["edit"].graph
        needed = workspaces(graph, rows, dtype, timings_of(subject.device))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        replay._call()
        measured = (torch.cuda.max_memory_allocated() - before) / MB
        values, planned = (predict_peak(graph, rows, each) / MB for each in ({}, needed))
        return (f"{max(rows.values())} rows: planned {planned:.1f} MB ({values:.1f} between kernels), "
                f"measured {measured:.1f}, pool {replay.graph_bytes / MB:.1f}")  # fmt: skip


def moved(
    subject: Subject, unet: fisedit.CompiledUNet, base: Recording, masks: Masks,
    wanted: dict[str, Any], exact: str,
) -> Iterator[Line]:  # fmt: skip
    """The same base, moved off the GPU: whatever else differs between two recordings, here nothing does."""
    if subject.device.type == "cuda":
        tiers_of(unet, subject.device).spill()
        for name, of_kind in masks.items():
            runs = [edit(subject, unet, base, mask) for mask in of_kind]
            known = [wanted[f"{exact} {name} {number}"] for number in range(len(of_kind))]
            identical = all(torch.equal(run[1], out) for run, (_, out) in zip(runs, known, strict=True))
            of, step, loaded = mean(k[0] for k in known), mean(r[0] for r in runs), mean(r[2] for r in runs)
            yield Line("the GPU's base, moved to the host", name, None, of, step, loaded, math.nan, identical, 0.0)


def record_table(rows: Sequence[Recorded]) -> str:
    lines = ["| base | recording, ms | dense compiled, ms | over it | first run, ms | stored a step, MB: maps, keys, "
             "queries | copies, ms | GPU peak, GB | host, GB |",
             "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |"]  # fmt: skip
    for row in rows:
        stored = ", ".join(f"{row.stored.get(kind, 0):.0f}" for kind in ("maps", "keys", "queries"))
        lines.append(
            f"| {row.tier} | {row.call:.2f} | {row.dense:.2f} | {row.call / row.dense - 1:+.1%} | {row.first:.0f} "
            f"| {stored} | {row.transfer:.1f} | {row.peak_gpu / 1e3:.1f} | {row.peak_host / 1e3:.1f} |"
        )
    return "\n".join(lines)


def edit_table(lines: Sequence[Line]) -> str:
    made = [
        "| base | bus, GB/s | mask | compute, ms | step, ms | exposed, ms | of the step | loaded, MB | transfer, ms "
        "| same image | error |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for line in lines:
        bus = "" if line.bus is None else f"{line.bus:g}"
        made.append(
            f"| {line.tier} | {bus} | {line.mask} | {line.gpu_step:.2f} | {line.step:.2f} | {line.exposed:.2f} "
            f"| {line.exposed / line.step:.1%} | {line.loaded:.1f} | {line.transfer:.2f} "
            f"| {'yes' if line.identical else 'no'} | {line.error:.1e} |"
        )
    return "\n".join(made)


def stored_sizes(published: Published, cache: fisedit.CacheConfig, steps: int) -> dict[str, float]:
    """MB that a recorded step stores of each kind, the mean over a run: counted on the graph, nothing is computed."""
    unet = build(published, torch.device("meta"), torch.float16)
    call = bind_call(unet, (), arguments(published, published.size, torch.device("meta"), torch.float16))
    program = Program(capture(unet, call), fisedit.CompileConfig(cache=cache, provider="triton"))
    program.logs["canonical"] = PassLog("canonical")
    run_passes(program.captured.module, canonical_passes(), program.logs["canonical"])
    program.executable("record")
    sizes: dict[str, float] = {}
    timesteps = [1 + (steps - 1 - step) * (1000 // steps) for step in range(steps)]  # as DDIM spaces them
    for node in program.graphs["record"].graph.nodes:
        if is_op(node, ops.cache_store.default) and (rows := node.meta.get("stores")) is not None:
            slot, scale = str(args(node)[1]).removeprefix(SCALE), str(args(node)[1]).startswith(SCALE)
            kind = program.uses[slot].kind
            kept = sum(kind in cache.kinds(n + 1, t / timesteps[0]) for n, t in enumerate(timesteps)) / steps
            number = rows.batch * rows.level[0] * rows.level[1]
            size = 4 if scale else rows.channels * (1 if "dtype" in node.meta else 2)
            sizes[kind] = sizes.get(kind, 0.0) + kept * number * size / MB
    return sizes


def mask_set(size: tuple[int, int], shares: Sequence[float], ragged: int) -> Masks:
    blobs: Masks = {f"blob {share:.0%}": [blob(size, share)] for share in shares}
    return {**blobs, f"ragged, {ragged} masks": [*family(size, ragged)], "sought": [None]}


def main(
    model: Annotated[str, typer.Option(help="A name of bench/published.py.")] = "SD2.1",
    steps: Annotated[int, typer.Option(min=WARM + 2, help="Steps of the base.")] = 50,
    repeats: Annotated[int, typer.Option(min=1, help="Loops of each kind; the median is shown.")] = 3,
    ragged: Annotated[int, typer.Option(min=1, help="Masks of the ragged family.")] = 8,
    blobs: Annotated[str, typer.Option(help="Active shares of the masks of one region.")] = "0.05,0.15,0.30",
    tiers: Annotated[str, typer.Option(help="Which of the tiers; with semicolons.")] = ";".join(TIERS),
    bus: Annotated[str, typer.Option(help="Slower buses to imitate, GB/s.")] = "",
    dense: Annotated[str, typer.Option(help="How what we run dense is compiled; 'eager': not at all.")] = "inductor",
    baseline: Annotated[bool, typer.Option(help="Whether to time the dense baseline, which compiles first.")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
    sizes: Annotated[bool, typer.Option("--sizes", help="Only count what a step stores; needs no GPU.")] = False,
    tiny: Annotated[bool, typer.Option(help="A small model instead, on any device.")] = False,
) -> None:
    """Measure recordings and edits on each tier."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = {**describe_environment(device), "dtype": "float16" if device.type == "cuda" else "float32"}
    print(environment_line(environment), environment["dtype"], flush=True)
    published = TINY if tiny else MODELS[model]
    if sizes:
        for storage in ("exact", "int8"):
            of = stored_sizes(published, fisedit.CacheConfig(storage=storage), steps)
            each = ", ".join(f"{kind} {size:.1f}" for kind, size in sorted(of.items()))
            without = sum(of.values()) - of.get("keys", 0.0)
            print(f"{model}, {storage}: {each} MB a step; {without:.1f} without keys and values")
        return
    folder = Path(tempfile.mkdtemp())
    recorded: list[Recorded] = []
    lines: list[Line] = []
    wanted: dict[str, Any] = {}
    with torch.no_grad():
        subject = prepare(model, published, device, getattr(torch, environment["dtype"]), steps, dense="eager")
        masks = mask_set(published.size, [float(share) for share in blobs.split(",")], ragged)
        options = {"dense": dense, "repeats": repeats, "folder": folder, "keys": 0, "baseline": baseline,
                   "bus": [float(b) for b in bus.split(",") if b]}  # fmt: skip
        for name in tiers.split(";"):
            of, made = measure_tier(subject, name, TIERS[name], masks, wanted, options)
            recorded.append(of)
            lines += made
            if name == "GPU":  # what the keys and values of the whole run take, and a little
                options["keys"] = round(1.02 * of.stored.get("keys", 0) * MB * steps)
            if output is not None:
                values = {"environment": environment, "recorded": [asdict(row) for row in recorded],
                          "edits": [{**asdict(line), "exposed": line.exposed} for line in lines]}  # fmt: skip
                output.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{record_table(recorded)}\n\n{edit_table(lines)}\n\n{environment_line(environment)}, batch 2", flush=True)


if __name__ == "__main__":
    typer.run(main)
