"""One U-Net call of the published architectures: the fastest dense way against an edit, under blob and ragged masks.

    python bench/unet.py --output unet.json   SD2.1, SD1.5 and SDXL, fp16, batch 2, on a GPU
    python bench/unet.py --models SD2.1 --quick --profile "blob 5%"       few masks, and the kernels of a sparse call
    python bench/unet.py --tiny               a small model on any device, to try the script out

The baseline is ``torch.compile(mode="reduce-overhead")`` of the channels-last model. Every time is that of a call in a
loop as samplers make it (timesteps are views of a tensor on the device, the device is waited for once, at the end),
the median over several loops; dense and sparse loops take turns. Weights are random; they do not change the time.
An edit repeats the recorded prompt and noise, so that its output must be the dense one.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from calls import Loop, Subject, compiled, float32_output, loop, milliseconds, prepare, relative_error, wait
from kernel_table import PROFILE, profile_call, totals
from kernel_table import markdown as kernel_markdown
from masks import blob, family
from published import MODELS, TINY
from roofline import Work, count_work, mean_work, peak_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fisedit
from fisedit.environment import describe_environment, environment_line
from fisedit.explanation import layer_choices, rows_of_mask
from fisedit.recording import Recording

BLOB_SHARES = "0.05,0.15,0.30,0.60,0.80,1.00"
WAYS = ("compiled", "record", "outside", "eager")
"""Ways to call the dense model: by the baseline, recording, outside sessions, as diffusers does."""
WARM = 2
"""Calls of a session that are not part of its loop: the new mask's tables, and what is captured for its sizes."""


@dataclass(frozen=True)
class EditLoop:
    """A session under one mask. ``new_mask``: ms of its first calls beyond those of the later ones; ``entered``: ms
    before them, until the session is open."""

    loop: Loop
    new_mask: float
    entered: float
    error: float
    macs: int | None


@dataclass(frozen=True)
class Row:
    """One line of the table: a mask, or the mean over a family of masks, ``each`` of them. Times are in ms; errors, of
    edits and of the dense model, are over the active positions, the largest of all masks."""

    model: str
    mask: str
    active: float
    dense: float
    ours: float
    ours_gpu: float
    each: list[float]
    new_mask_unknown: list[float]
    new_mask_known: list[float]
    entered: list[float]
    error: float
    error_dense: float
    macs_dense: int
    macs: int
    work: Work
    floor: float | None

    @property
    def ratio(self) -> float:
        return self.dense / self.ours


@dataclass
class Results:
    """What was measured so far; written after each piece, so that a run that is cut keeps what it has."""

    path: Path | None
    values: dict[str, Any] = field(default_factory=dict)

    def put(self, model: str, name: str, value: Any) -> None:
        self.values.setdefault(model, {})[name] = value
        if self.path is not None:
            self.path.write_text(json.dumps(self.values, indent=2) + "\n", encoding="utf-8")


def measure_edit(
    subject: Subject, base: Recording, mask: Tensor, ours: fisedit.CompiledUNet | None = None, count: bool = False
) -> EditLoop:
    """One session under a mask that is new to it; ``count``: its multiply-accumulates too, which takes a while."""
    ours, device, mask = ours or subject.ours, subject.device, mask.to(subject.device)
    step, start = subject.step(ours), wait(device)
    with ours.edit(base, mask) as edit:
        entered = (wait(device) - start) * 1e3
        first = [milliseconds(partial(step, timestep), device) for timestep in subject.timesteps[:WARM]]
        timed, out = loop(step, subject.timesteps[WARM:], device)
    assert subject.wanted is not None
    error = relative_error(out, subject.wanted, mask)
    macs = edit.report().macs_sparse if count else None
    return EditLoop(timed, sum(first) - WARM * timed.wall, entered, error, macs)


def measure_record(subject: Subject, ours: fisedit.CompiledUNet) -> tuple[Loop, Recording]:
    with ours.record() as base:
        step = subject.step(ours)
        milliseconds(lambda: step(subject.timesteps[0]), subject.device)
        timed, _ = loop(step, subject.timesteps[1:], subject.device)
    return timed, base


def measure_dense(
    subject: Subject, results: Results, chosen: Sequence[str], repeats: int, autotune: float
) -> dict[str, Any]:
    """The chosen ``WAYS`` to call the dense model; their loops take turns."""
    step, device = subject.step, subject.device

    def repeat(model: Callable[..., Any]) -> Callable[[], Loop]:
        return lambda: loop(step(model), subject.timesteps, device)[0]

    every = {"compiled": repeat(subject.dense), "record": lambda: _recorded(subject),
             "outside": repeat(subject.ours), "eager": repeat(subject.unet)}  # fmt: skip
    ways = {way: run for way, run in every.items() if way in chosen}
    if autotune and (tuned := autotuned(subject, autotune)) is not None:
        ways["max-autotune"] = repeat(tuned)
    seconds = {way: milliseconds(run, device) / 1e3 for way, run in ways.items()}  # captures and compiles
    for run in ways.values():
        run()
    times: dict[str, list[Loop]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            times[way].append(run())
    made = {way: asdict(Loop(median(t.wall for t in each), median(t.gpu for t in each))) for way, each in times.items()}
    results.put(subject.name, "dense", made)
    results.put(subject.name, "first loop, seconds", seconds)
    return made


def _recorded(subject: Subject) -> Loop:
    timed, base = measure_record(subject, subject.ours)
    base.release()
    return timed


def autotuned(subject: Subject, limit: float) -> Callable[..., Any] | None:
    """The model compiled with max-autotune; ``None`` if that fails or takes longer than ``limit`` seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        tuned = compiled(subject.unet, "max-autotune")
        for timestep in subject.timesteps[:3]:
            subject.step(tuned)(timestep)
        return tuned
    except (TimeoutError, RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        print(f"{subject.name}: max-autotune: {error}", flush=True)
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def count_macs(subject: Subject, results: Results) -> int:
    """Dense multiply-accumulates: by the package, by ``roofline.py``, and by PyTorch's own counter."""
    from fisedit.passes.count_macs import count_macs as package_count

    # The counter knows the attention kernels of GPUs, but not that of CPUs.
    plain = sdpa_kernel(SDPBackend.MATH) if subject.device.type == "cpu" else nullcontext()
    with FlopCounterMode(display=False) as counter, plain:
        subject.step(subject.unet)(subject.timesteps[0])
    counts = {
        "package": package_count(subject.graph),
        "roofline": count_work(subject.graph).macs,
        "torch.utils.flop_counter": counter.get_total_flops() // 2,
    }
    results.put(subject.name, "dense MACs", counts)
    return counts["package"]


def measure_masks(
    subject: Subject, base: Recording, name: str, masks: list[Tensor], repeats: int, macs_dense: int
) -> Row:
    """Sessions under each mask, each beside a dense loop; the times are the medians, their mean over the masks."""
    assert subject.wanted is not None
    dense, errors = list[float](), list[float]()
    loops: list[list[EditLoop]] = [[] for _ in masks]
    for mask, made in zip(masks, loops, strict=True):
        for _ in range(repeats):
            timed, out = loop(subject.step(subject.dense), subject.timesteps[WARM:], subject.device)
            dense.append(timed.wall)
            errors.append(relative_error(out, subject.wanted, mask.to(subject.device)))
            made.append(measure_edit(subject, base, mask, count=not made))
    times = [median(one.loop.wall for one in made) for made in loops]
    works = [count_work(subject.graph, mask) for mask in masks]
    peak = peak_of(describe_environment(subject.device)["device"])
    return Row(
        model=subject.name,
        mask=name,
        active=mean(float(mask.float().mean()) for mask in masks),
        dense=median(dense),
        ours=mean(times),
        ours_gpu=mean(median(one.loop.gpu for one in made) for made in loops),
        each=times,
        new_mask_unknown=[made[0].new_mask for made in loops],
        new_mask_known=[median(one.new_mask for one in made[1:]) for made in loops if made[1:]],
        entered=[one.entered for made in loops for one in made],
        error=max(one.error for made in loops for one in made),
        error_dense=max(errors),
        macs_dense=macs_dense,
        macs=round(mean(made[0].macs or macs_dense for made in loops)),
        work=mean_work(works),
        floor=mean(work.floor(peak) for work in works) * 1e3 if peak else None,
    )


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| U-Net | mask | active | dense compiled, ms | edit, ms | faster | GMACs, dense / edit | fewer | MB moved "
        "| floor, ms | floor / edit | error |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        floor = ("", "") if row.floor is None else (f"{row.floor:.2f}", f"{row.floor / row.ours:.0%}")
        lines.append(
            f"| {row.model} | {row.mask} | {row.active:.1%} | {row.dense:.2f} | {row.ours:.2f} | **{row.ratio:.2f}×** "
            f"| {giga(row.macs_dense)} / {giga(row.macs)} | {row.macs_dense / row.macs:.1f}× "
            f"| {row.work.bytes / 1e6:.0f} | {floor[0]} | {floor[1]} | {row.error:.1e} |"
        )
    return "\n".join(lines)


def giga(number: float) -> str:
    return f"{number / 1e9:.0f}" if number >= 1e10 else f"{number / 1e9:.2g}"


def summary(rows: list[Row], dense: dict[str, Any]) -> Iterator[str]:
    """What the table does not hold: other dense ways, recording, new masks."""
    for way, timed in dense.items():
        change = f", {timed['wall'] / dense['compiled']['wall'] - 1:+.1%}" if way != "compiled" else ""
        yield f"{way}: {timed['wall']:.2f} ms a call ({timed['gpu']:.2f} on the GPU){change}"
    for row in rows:
        if len(row.new_mask_unknown) > 1:
            low, middle, high = torch.quantile(torch.tensor(row.each), torch.tensor([0.05, 0.5, 0.95])).tolist()
            faster = mean(row.dense / time for time in row.each)
            yield f"{row.mask}: 5th percentile {low:.2f} ms, median {middle:.2f}, 95th {high:.2f}"
            yield f"{row.mask}: {row.ratio:.2f} times as fast in all, {faster:.2f} in the mean of the masks"
        for known, extra in (("seen before", row.new_mask_known), ("new", row.new_mask_unknown)):
            if extra:
                more = f"{median(extra):.1f} ms more, at most {max(extra):.1f}"
                yield f"{row.mask}, mask's sizes {known}: first calls {more}"
        yield f"{row.mask}: error {row.error:.1e}, of the dense model {row.error_dense:.1e}"
        yield f"{row.mask}: a session opens in {median(row.entered):.1f} ms, at most {max(row.entered):.1f}"


def memory(subject: Subject, base: Recording) -> dict[str, float]:
    """GiB: the model, a recorded step, all that is held now, and the most that was."""
    weights = sum(p.numel() * p.element_size() for p in subject.unet.parameters())
    held = {"model": weights, "recorded step": base.nbytes / len(base.calls)}
    if subject.device.type == "cuda":
        held |= {"allocated": torch.cuda.memory_allocated(), "most allocated": torch.cuda.max_memory_allocated(),
                 "most reserved": torch.cuda.max_memory_reserved()}  # fmt: skip
    return {name: size / 2**30 for name, size in held.items()}


def mask_set(size: tuple[int, int], shares: Sequence[float], count: int) -> dict[str, list[Tensor]]:
    """Masks by name: a blob each, and the ragged family."""
    blobs = {f"blob {share:.0%}": [blob(size, share)] for share in shares}
    ragged = family(size, count)
    return {**blobs, f"ragged, {count} masks": ragged}


def measure_variants(
    subject: Subject,
    base: Recording,
    masks: dict[str, list[Tensor]],
    variants: list[str],
    rows: list[Row],
    repeats: int,
) -> list[dict[str, Any]]:
    """The same edits under other options, and the regret of the default: its time over the best of all and dense."""
    times: dict[str, dict[str, float]] = {row.mask: {"default": row.ours, "dense": row.dense} for row in rows}
    for text in variants:
        with variant(subject, base, parse_options(text)) as (ours, recorded):
            for name, of_kind in masks.items():
                each = [[measure_edit(subject, recorded, mask, ours) for _ in range(repeats)] for mask in of_kind]
                times[name][text] = mean(median(one.loop.wall for one in made) for made in each)
    return [{"mask": name, "ms": of, "regret": of["default"] / min(of.values())} for name, of in times.items()]


@contextmanager
def variant(
    subject: Subject, base: Recording, options: dict[str, Any]
) -> Iterator[tuple[fisedit.CompiledUNet, Recording]]:
    """The model under other ``options`` of ``compile``, recorded anew; or the same model, if all that changes is its
    cost model's ``dense_above``, the active share from which on edits run dense."""
    threshold = options.pop("dense_above", None)
    ours = fisedit.compile(copy.copy(subject.unet), **options) if options else subject.ours
    recorded = measure_record(subject, ours)[1] if options else base
    before = ours.cost_model
    if threshold is not None:
        ours.cost_model = replace(before, dense_above=threshold)
    try:
        yield ours, recorded
    finally:
        ours.cost_model = before
        if recorded is not base:
            recorded.release()


def parse_options(text: str) -> dict[str, Any]:
    """``"cost=rows,dense_above=0.9"`` as keyword arguments of ``compile``."""
    options: dict[str, Any] = {}
    for pair in text.split(","):
        name, value = pair.split("=")
        try:
            options[name] = float(value)
        except ValueError:
            options[name] = value
    return options


@contextmanager
def measured(subject: Subject) -> Iterator[None]:
    """Free a model's memory afterwards, for the next one."""
    try:
        yield
    finally:
        del subject.dense, subject.ours, subject.unet
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def profile_edit(subject: Subject, base: Recording, mask: Tensor) -> dict[str, Any]:
    """The launches of one sparse call in their order; of its layers, what was chosen, and what each way takes alone."""
    step = subject.step(subject.ours)
    with subject.ours.edit(base, mask.to(subject.device)):
        for timestep in subject.timesteps[:-1]:
            step(timestep)
        wait(subject.device)
        launches = profile_call(lambda: step(subject.timesteps[-1]), subject.device)
    print(f"\nkernels of one call of {subject.name}:\n\n{kernel_markdown(totals(launches))}\n", flush=True)
    return {"launches": [asdict(launch) for launch in launches], "layers": layers(subject, mask)}


def layers(subject: Subject, mask: Tensor) -> list[dict[str, Any]]:
    """The products and self-attentions of a sparse call, as ``explain`` knows them."""
    program = next(iter(subject.ours._live.programs.values()))
    if not program.fused:
        return []
    from fisedit.runtime.tuning.choose import timings_of  # needs Triton

    graph, dtype = program.graphs["edit"].graph, subject.call["sample"].dtype
    choices = layer_choices(graph, rows_of_mask(graph, mask), dtype, timings_of(subject.device))
    return [asdict(choice) for choice in choices]


def measure_model(
    subject: Subject, results: Results, *, repeats: int, shares: Sequence[float], ragged_masks: int,
    ways: Sequence[str], autotune: float, profile: list[str], variants: list[str], edits: bool,
) -> list[Row]:  # fmt: skip
    name = subject.name
    subject.wanted = float32_output(subject)
    dense = measure_dense(subject, results, ways, repeats, autotune)
    if not edits:
        everywhere = torch.ones(subject.published.size, dtype=torch.bool, device=subject.device)
        error = relative_error(subject.step(subject.dense)(subject.timesteps[-1]), subject.wanted, everywhere)
        results.put(name, "dense error", error)
        print("", *summary([], dense), f"error of the dense model: {error:.1e}", sep="\n", flush=True)
        return []
    _, base = measure_record(subject, subject.ours)
    macs_dense = count_macs(subject, results)
    masks, rows = mask_set(subject.published.size, shares, ragged_masks), []
    for kind, of_kind in masks.items():
        rows.append(
            measure_masks(subject, base, kind, of_kind, max(2, repeats if len(of_kind) == 1 else 2), macs_dense)
        )
        row = rows[-1]
        print(f"{name}, {kind}: dense {row.dense:.2f} ms, edit {row.ours:.2f} ms, {row.ratio:.2f}x", flush=True)
        results.put(name, "rows", [{**asdict(row), "ratio": row.ratio} for row in rows])
    for kind in profile:
        results.put(name, PROFILE + kind, profile_edit(subject, base, masks[kind][0]))
    results.put(name, "GiB", memory(subject, base))
    if variants:
        results.put(name, "variants", measure_variants(subject, base, masks, variants, rows, max(2, repeats // 2)))
    base.release()
    print("", *summary(rows, dense), sep="\n", flush=True)
    for kind, value in results.values[name].items():
        if kind in ("dense MACs", "first loop, seconds", "GiB", "variants"):
            print(f"{kind}: {json.dumps(value)}", flush=True)
    return rows


def main(
    models: Annotated[str, typer.Option(help="Names of bench/published.py, with commas.")] = "SD2.1,SD1.5,SDXL",
    dtype: Annotated[str | None, typer.Option(help="Default: float16 on a GPU, float32 on a CPU.")] = None,
    steps: Annotated[int, typer.Option(min=WARM + 1, help="Recorded steps; each loop is as long.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Loops of each kind; the median is shown.")] = 5,
    ragged_masks: Annotated[int, typer.Option(min=1, help="Masks of the ragged family.")] = 24,
    output: Annotated[Path | None, typer.Option(help="JSON file, written as figures come.")] = None,
    ways: Annotated[str, typer.Option(help="Ways to call the dense model; compiled is always timed.")] = ",".join(WAYS),
    profile: Annotated[list[str], typer.Option(help="Masks whose sparse call is profiled: --profile 'blob 5%'.")] = [],  # noqa: B006
    variant: Annotated[list[str], typer.Option(help="To compare: --variant dense_above=1.1.")] = [],  # noqa: B006
    max_autotune: Annotated[float, typer.Option(help="Seconds to allow it; 0 leaves it out.")] = 0.0,
    blobs: Annotated[str, typer.Option(help="Active shares of the masks of one region.")] = BLOB_SHARES,
    dense: Annotated[str, typer.Option(help="How what we run dense is compiled; 'eager': not at all.")] = "inductor",
    quick: Annotated[bool, typer.Option(help="Blobs of 5 and 15 % and four ragged masks.")] = False,
    edits: Annotated[bool, typer.Option(help="Edits under masks, too; else the ways to call the dense model.")] = True,
    tiny: Annotated[bool, typer.Option(help="A small model instead, on any device.")] = False,
    verbose: Annotated[bool, typer.Option(help="Tell how long graphs take to rehearse and to capture.")] = False,
) -> None:
    """Measure U-Net calls, dense and sparse."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fisedit").setLevel(logging.DEBUG if verbose else logging.INFO)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    of = getattr(torch, dtype or ("float16" if device.type == "cuda" else "float32"))
    environment = {**describe_environment(device), "dtype": str(of).removeprefix("torch."), "batch": 2}
    print(environment_line(environment), environment["dtype"], flush=True)
    results, rows = Results(output, {"environment": environment}), []
    shares = [float(share) for share in blobs.split(",")][: 2 if quick or tiny else None]
    for name, published in ({"tiny": TINY} if tiny else {name: MODELS[name] for name in models.split(",")}).items():
        with torch.no_grad():
            subject = prepare(name, published, device, of, steps, dense=dense)
            with measured(subject):
                rows += measure_model(
                    subject, results, repeats=repeats, shares=shares, profile=profile, variants=variant,
                    ragged_masks=4 if quick else ragged_masks, ways=["compiled", *ways.split(",")],
                    autotune=max_autotune, edits=edits,
                )  # fmt: skip
        below = f"{environment_line(environment)}, {environment['dtype']}, batch 2\n"
        print(*([f"\n{table(rows)}"] if rows else []), f"\n{below}", sep="\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
