"""What ``fisedit demo`` runs: three edits, each beside the dense rerun of its prompt."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from fisedit.comparison import Comparison, compare, comparison_table
from fisedit.config import DetectConfig
from fisedit.contact_sheet import draw_contact_sheet
from fisedit.environment import describe_environment, environment_line
from fisedit.pipeline import EditPipeline
from fisedit.results import HEADINGS, EditResult
from fisedit.warnings import EmptyMaskWarning


@dataclass(frozen=True)
class ShowcaseEdit:
    """One edit of the demo."""

    name: str
    seed: int
    before: str
    after: str


EDITS = (
    ShowcaseEdit(
        "another color", 1,
        "a red house on the left and a green tree on the right, on grass, at noon",
        "a blue house on the left and a green tree on the right, on grass, at noon",
    ),
    ShowcaseEdit(
        "another object", 3,
        "a yellow tower on the left and a purple boat on the right, on water, at noon",
        "a yellow rocket on the left and a purple boat on the right, on water, at noon",
    ),
    ShowcaseEdit(
        "an attachment", 8,
        "a pink mushroom on the right, on stone, at night",
        "a pink mushroom with a crown on the right, on stone, at night",
    ),
)  # fmt: skip

STEPS, QUICK_STEPS, GUIDANCE = 25, 5, 5.0


@dataclass(frozen=True)
class Outcome:
    """An edit as the sheet shows it and the table counts it."""

    edit: ShowcaseEdit
    result: EditResult
    figures: Comparison
    report: dict[str, Any]
    dense: list[Image.Image]


def run_showcase(
    editor: EditPipeline,
    output: Path,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    console: Console | None = None,
) -> list[Outcome]:
    """Generate, edit and rerun every entry of ``EDITS``; write ``contact_sheet.png`` and ``report.json``.

    Args:
        editor: over the demo model, or any other that draws these prompts.
        output: the folder for both files; made if missing.
        steps: of the schedule, at least 3.
    """
    console = console or Console()
    output.mkdir(parents=True, exist_ok=True)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance}
    _label(editor, "capture and first calls")
    setup = warm_up(editor, guidance)
    console.print(f"U-Net captured, passes run, first calls made: {setup:.1f} s, once per shape and not counted below")
    outcomes = []
    for number, edit in enumerate(EDITS, 1):
        console.print(
            f"\n[bold]{number}/{len(EDITS)} {edit.name}[/bold]\n  before: {edit.before}\n  after:  {edit.after}"
        )
        outcomes.append(run_edit(editor, edit, settings))
    draw_contact_sheet([row for o in outcomes for row in o.result.panels(o.dense)], HEADINGS).save(
        output / "contact_sheet.png"
    )
    environment = describe_environment(editor.pipe.device)
    report = to_report(outcomes, environment, settings, setup)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    title = f"{environment_line(environment)}; {steps} steps"
    console.print(comparison_table([o.figures for o in outcomes], [o.edit.name for o in outcomes], title))
    console.print(f"wrote {output / 'contact_sheet.png'} and {output / 'report.json'}")
    return outcomes


def warm_up(editor: EditPipeline, guidance: float) -> float:
    """Capture the U-Net and run each of its graphs once, so that no step is charged for it. Returns the seconds."""
    start = time.perf_counter()
    base = editor.generate("a ball", seed=0, num_inference_steps=2, guidance_scale=guidance, output_type="latent")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmptyMaskWarning)
        base.edit("a cat", detect=DetectConfig(steps=1), record=False)
    height, width = base.latents.shape[-2:]
    corner = torch.zeros(height, width, dtype=torch.bool)
    corner[: height // 4, : width // 4] = True
    base.edit("a cat", mask=corner, record=False)
    return time.perf_counter() - start


def run_edit(editor: EditPipeline, edit: ShowcaseEdit, settings: dict[str, Any]) -> Outcome:
    """Generate one base, edit it, and rerun the new prompt dense. The base's feature maps are freed afterwards."""
    _label(editor, "generate")
    base = editor.generate(edit.before, seed=edit.seed, **settings)
    _label(editor, "edit")
    result = base.edit(edit.after, record=False)
    _label(editor, "dense rerun")
    figures, dense = compare(result)
    outcome = Outcome(edit, result, figures, result.report.to_dict(), dense)
    assert base.recording is not None
    base.recording.release()
    return outcome


def to_report(
    outcomes: list[Outcome], environment: dict[str, Any], settings: dict[str, Any], setup: float
) -> dict[str, Any]:
    """What ``report.json`` holds: seconds, shares of 1, and counts of multiply-accumulates."""
    edits = [{"name": o.edit.name, "seed": o.edit.seed, **o.figures.to_dict(), "report": o.report} for o in outcomes]
    return {"environment": environment, "settings": settings, "setup_seconds": setup, "edits": edits}


def _label(editor: EditPipeline, text: str) -> None:
    """Name the progress bar; no bar where the output is no terminal."""
    editor.pipe.set_progress_bar_config(desc=f"  {text:<12}", disable=None)
