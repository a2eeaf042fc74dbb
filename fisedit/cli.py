"""The command line: ``fisedit generate | edit | demo | inspect``.

Everything that takes long to import is imported by the command that needs it, so that ``--help`` is quick.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from fisedit.errors import FISEditError
from fisedit.warnings import FISEditWarning

if TYPE_CHECKING:
    from fisedit.config import CacheConfig, CompileConfig
    from fisedit.pipeline import EditPipeline


class Commands(TyperGroup):
    """Shows our own errors as one red message and our warnings as a yellow one, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _shown(warnings.showwarning)
                return super().invoke(ctx)
        except FISEditError as error:
            _say(f"Error: {error}", "bold red")
            raise typer.Exit(1) from None


def _shown(default: Callable[..., None]) -> Callable[..., None]:
    """A ``warnings.showwarning`` that shows ours in yellow and leaves those of others to ``default``."""

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        if isinstance(message, FISEditWarning):
            _say(f"Warning: {message}", "yellow")
        else:
            default(message, *where, **more)

    return show


def _say(message: str, style: str) -> None:
    Console(stderr=True).print(message, style=style, markup=False, highlight=False)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Generate an image, change words of its prompt, and compute only the region that they touch.",
)


class Dtype(StrEnum):
    """Of the weights."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class KeysValues(StrEnum):
    """What self-attention of the active positions looks at."""

    CACHED = "cached"
    INT8 = "int8"
    ACTIVE = "active"


class Storage(StrEnum):
    """How recorded feature maps are stored."""

    EXACT = "exact"
    INT8 = "int8"


class CostName(StrEnum):
    """How convolutions are cut."""

    HALO = "halo"
    PAPER = "paper"
    ROWS = "rows"
    DENSE = "dense"


class GraphKind(StrEnum):
    """The three graphs of a captured U-Net."""

    EDIT = "edit"
    DETECT = "detect"
    RECORD = "record"


Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)]
Model = Annotated[
    Path | None, typer.Option(help="Folder of a diffusers pipeline.", show_default="the demo model that ships")
]
Device = Annotated[str | None, typer.Option(help="Such as cpu, cuda, cuda:1.", show_default="a GPU if there is one")]
Precision = Annotated[
    Dtype | None, typer.Option("--dtype", help="Of the weights.", show_default="float16 on a GPU, float32 on a CPU")
]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of the noise.", metavar="INTEGER")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")]
Size = Annotated[
    str | None, typer.Option(metavar="HxW", help="Height and width of the image.", show_default="the model's own")
]

NewPrompts = Annotated[
    list[str] | None,
    typer.Argument(metavar="NEW_PROMPT...", help="The prompt with other words; one or more.", show_default=False),
]
Save = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Also keep what `edit --base` needs, in a new folder.")
]
Base = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Edit what `generate --save` kept; every prompt is then a new one."),
]
OF_THE_BASE = ("seed", "steps", "guidance", "size")
"""Options of `edit` that a saved base brings with it."""
EditFolder = Annotated[Path, typer.Option(help="Folder to write images, masks, contact sheet and report to.")]
Mask = Annotated[
    str,
    typer.Option(metavar="auto|FILE", help="'auto' finds where the image may change; or a picture, white there."),
]
Rounds = Annotated[bool, typer.Option("--rounds", help="Each edit starts from the one before, not from the base.")]
Compare = Annotated[bool, typer.Option("--compare", help="Also rerun each new prompt dense.")]
DetectSteps = Annotated[int | None, typer.Option(help="Dense steps that find the mask.", show_default="a fifth of all")]
Dilation = Annotated[int, typer.Option(help="Latent pixels by which a found mask grows.")]
KV = Annotated[
    KeysValues,
    typer.Option(
        help="Keys and values of self-attention: 'int8' keeps them in 8 bits; 'active' approximates and loads nothing."
    ),
]
GpuCache = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="The most that feature maps take of the GPU's memory, such as 8GiB.",
        show_default="60 % of what is free",
    ),
]
HostCache = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="The most that they take of the host's memory.", show_default="50 % of what is free"
    ),
]
DiskCache = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where they go that find no room in memory.", show_default="nowhere"),
]
Stored = Annotated[
    Storage, typer.Option("--storage", help="Feature maps as they are, or in 8 bits: smaller, less exact.")
]
CACHE_OPTIONS = ("gpu_cache", "host_cache", "disk_cache", "storage")
Cost = Annotated[CostName, typer.Option(help="How convolutions are cut: by cost model, or forced.")]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", help="JSON file to write what ran when to, for ui.perfetto.dev.", show_default="none"),
]

DemoFolder = Annotated[Path, typer.Option(help="Folder to write contact_sheet.png and report.json to.")]
DemoSteps = Annotated[int | None, typer.Option(min=3, help="Denoising steps.", show_default="25, or 5 with --quick")]
Quick = Annotated[bool, typer.Option("--quick", help="Few steps: shows that it runs, not how it looks.")]


@app.command()
def generate(
    context: typer.Context,
    prompt: Prompt,
    output: Annotated[Path, typer.Option(help="Image file to write.")] = Path("image.png"),
    seed: Seed = 0,
    steps: Steps = 25,
    guidance: Guidance = 5.0,
    size: Size = None,
    save: Save = None,
    gpu_cache: GpuCache = None,
    host_cache: HostCache = None,
    disk_cache: DiskCache = None,
    storage: Stored = Storage.EXACT,
    model: Model = None,
    device: Device = None,
    dtype: Precision = None,
) -> None:
    """Generate an image from a prompt."""
    from fisedit.config import CompileConfig

    if save is None:
        _refuse(context, CACHE_OPTIONS, "goes with --save; without it no feature map is kept")
    settings = _settings(steps, guidance, size)
    _make_folder(output.parent)
    _check_image_name(output)
    config = CompileConfig(cache=_cache(gpu_cache, host_cache, disk_cache, storage))
    editor = _load(model, device, dtype, config)
    from fisedit.commands import draw_image

    image = draw_image(editor, prompt, seed, settings, save)
    image.save(output)
    Console().print(f"wrote {output}", highlight=False)


@app.command()
def edit(
    context: typer.Context,
    prompt: Prompt,
    new_prompts: NewPrompts = None,
    output: EditFolder = Path("edit"),
    mask: Mask = "auto",
    rounds: Rounds = False,
    compare: Compare = False,
    detect_steps: DetectSteps = None,
    dilation: Dilation = 2,
    kv: KV = KeysValues.CACHED,
    cost: Cost = CostName.HALO,
    gpu_cache: GpuCache = None,
    host_cache: HostCache = None,
    disk_cache: DiskCache = None,
    storage: Stored = Storage.EXACT,
    trace: TraceFile = None,
    seed: Seed = 0,
    steps: Steps = 25,
    guidance: Guidance = 5.0,
    size: Size = None,
    base: Base = None,
    model: Model = None,
    device: Device = None,
    dtype: Precision = None,
) -> None:
    """Generate PROMPT, then edit it to each NEW_PROMPT; the rest of the image stays."""
    from fisedit.config import CompileConfig, DetectConfig

    _check_base(context, base, new_prompts)
    settings = _settings(steps, guidance, size)
    detect = DetectConfig(steps=detect_steps, dilation=dilation)
    cache = _cache(gpu_cache, host_cache, disk_cache, storage)
    _make_folder(output)
    from fisedit.commands import edit_to_folder
    from fisedit.comparison import comparison_table
    from fisedit.environment import describe_environment, environment_line
    from fisedit.tracing import trace as traced

    prompts = [prompt, *(new_prompts or [])]
    options: dict[str, Any] = {"mask": mask, "detect": detect, "rounds": rounds, "rerun": compare, "saved": base}
    with nullcontext() if trace is None else traced(trace):
        editor = _load(model, device, dtype, CompileConfig(kv=kv.value, cost=cost.value, cache=cache))
        comparisons = edit_to_folder(editor, prompts, output, seed=seed, settings=settings, **options)
    title = environment_line(describe_environment(editor.pipe.device))
    names = [f"edit {number}" for number in range(1, len(comparisons) + 1)]
    Console().print(comparison_table(comparisons, names, title))
    Console().print(f"wrote {output}/: base, edits, masks, contact_sheet.png, report.json", highlight=False)
    if trace is not None:
        Console().print(f"wrote {trace}: open it in https://ui.perfetto.dev", highlight=False)


@app.command()
def demo(
    output: DemoFolder = Path("demo"),
    steps: DemoSteps = None,
    quick: Quick = False,
    model: Model = None,
    device: Device = None,
    dtype: Precision = None,
) -> None:
    """Three edits on the demo model, each beside the dense rerun, with a table of what was saved."""
    _make_folder(output)
    editor = _load(model, device, dtype)
    from fisedit.demo.showcase import QUICK_STEPS, STEPS, run_showcase

    run_showcase(editor, output, steps=steps or (QUICK_STEPS if quick else STEPS))


@app.command()
def inspect(
    graph: Annotated[GraphKind, typer.Option(help="Which of the three graphs.")] = GraphKind.EDIT,
    guidance: Guidance = 5.0,
    size: Size = None,
    model: Model = None,
    device: Device = None,
    dtype: Precision = None,
) -> None:
    """Print a graph of the U-Net: its nodes, the passes that made it, what they left alone, and dense islands."""
    settings = _settings(1, guidance, size)
    editor = _load(model, device, dtype)
    from fisedit.commands import inspect_graph

    typer.echo(inspect_graph(editor, graph.value, settings))


def _check_base(context: typer.Context, base: Path | None, new_prompts: list[str] | None) -> None:
    """A base brings its prompt, seed and settings; without one, there must be a prompt to start from."""
    if base is None and not new_prompts:
        raise typer.BadParameter("Missing argument: there is nothing to edit PROMPT to", param_hint="NEW_PROMPT...")
    if base is not None:
        _refuse(context, OF_THE_BASE, f"goes with a new picture, not with --base {base}")


def _refuse(context: typer.Context, options: Sequence[str], reason: str) -> None:
    """Raise for any of ``options`` that was given."""
    for name in options:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(reason, param_hint=f"--{name.replace('_', '-')}")


def _cache(gpu: str | None, host: str | None, disk: Path | None, storage: Storage) -> CacheConfig:
    """Where feature maps lie.

    Raises:
        UnknownOptionError: a size that is none.
        typer.BadParameter: a folder that cannot be made.
    """
    from fisedit.config import CacheConfig, parse_size

    budgets = parse_size("gpu-cache", gpu), parse_size("host-cache", host)
    if disk is not None:
        _make_folder(disk, "--disk-cache")
    return CacheConfig(*budgets, disk=disk, storage=storage.value)


def _load(
    model: Path | None, device: str | None, dtype: Dtype | None, config: CompileConfig | None = None
) -> EditPipeline:
    import torch

    from fisedit.loading import load_editor

    return load_editor(model, device, getattr(torch, dtype.value) if dtype else None, config)


def _settings(steps: int, guidance: float, size: str | None) -> dict[str, Any]:
    """The arguments of the pipeline that the options stand for."""
    if not math.isfinite(guidance):
        raise typer.BadParameter(f"{guidance} is no scale; give a number such as 5", param_hint="--guidance")
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    if size is not None:
        found = re.fullmatch(r"(\d+)[xX](\d+)", size)
        if found is None:
            raise typer.BadParameter(f"{size!r} is no size; give height x width, such as 512x768", param_hint="--size")
        settings |= {"height": int(found[1]), "width": int(found[2])}
    return settings


def _make_folder(folder: Path, option: str = "--output") -> None:
    """Make the folder that an option names, before any time is spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{str(folder)!r} cannot be made: {error.strerror}", param_hint=option) from None


def _check_image_name(output: Path) -> None:
    from PIL import Image

    suffixes = sorted(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE)
    if output.suffix.lower() not in suffixes or output.is_dir():
        common = ", ".join(suffix for suffix in (".png", ".jpg", ".webp") if suffix in suffixes)
        raise typer.BadParameter(f"{str(output)!r} is no image file; give one such as {common}", param_hint="--output")
