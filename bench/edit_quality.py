"""Does the edit happen, and does the rest stay? Random edits of the demo model, judged by its own image encoder.

    python bench/edit_quality.py --edits 24 --steps 4 --steps 8 --steps 25 --sampler DDIM --sampler Euler --device cuda

For held-out scenes it changes one color, one object or one attachment and prints, for each sampler, number of steps and
setting of the detection:

- how often the new word is seen in the edited picture, and every other object still is what it was ("both": together).
  Only bases that show what their own prompt says are counted. The first line is the dense rerun of the new prompt from
  the same noise, which keeps nothing on purpose;
- how much of the region that the words change lies in the mask ("covered"; "found": at least 80 % of it), and how much
  of the mask lies in that region or near it ("on target"). The region is where the drawings of the two scenes differ,
  in their mean layout: the model puts objects there within a few latent pixels. All bases are counted;
- the active share, and the background's PSNR in pixels.

The samplers are those of the demo model's schedule (trailing timesteps, zero terminal SNR). Results are written after
each schedule.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fisedit import DetectConfig, EditPipeline
from fisedit.contact_sheet import Panel, changed_words, draw_contact_sheet, overlay_mask
from fisedit.demo import load_clip, load_pipeline
from fisedit.demo.captions import PHRASINGS, alternatives, caption
from fisedit.demo.clip import DemoClip
from fisedit.demo.scenes import LAYOUT, Scene, render, sample_scenes
from fisedit.environment import describe_environment, environment_line
from fisedit.mask import dilate

FIELDS = ("color", "kind", "attachment")
SAMPLERS = {
    "DDIM": "DDIMScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler",
    "Euler": "EulerDiscreteScheduler",
    "LCM": "LCMScheduler",
    "TCD": "TCDScheduler",
}
FOUND = 0.8
"""The least share of the changed region that a mask must cover to count as found."""
NEAR = 4
"""Latent pixels around the changed region that still are on target: dilation, and the layout's freedom."""


@dataclass(frozen=True)
class Case:
    """One edit: a scene and the scene that differs in ``field`` of object ``index``."""

    before: Scene
    after: Scene
    field: str
    index: int
    phrasing: int
    seed: int

    @property
    def prompts(self) -> tuple[str, str]:
        return caption(self.before, self.phrasing), caption(self.after, self.phrasing)

    def region(self, size: tuple[int, int]) -> Tensor:
        """Where the two scenes differ: bool ``[H, W]`` over the latent."""
        scenes = [replace(scene, layout=(0.5,) * LAYOUT) for scene in (self.before, self.after)]
        drawn = render(scenes)  # [2, 3, R, R]
        differs = (drawn[0] - drawn[1]).abs().amax(0) > 0.05  # [R, R]
        return torch.nn.functional.adaptive_avg_pool2d(differs[None].float(), size)[0] > 0.5


@dataclass
class Outcome:
    """What became of a case: its base, the dense rerun, and the picture, mask and figures of each setting."""

    case: Case
    base: Image.Image
    shown: bool
    rerun: Image.Image
    pictures: dict[str, tuple[Image.Image, Tensor]] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)


def draw_cases(count: int, seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    scenes = sample_scenes(count, torch.Generator().manual_seed(seed), split="held_out").scenes()
    for number, scene in enumerate(scenes):
        changed, index = FIELDS[number % len(FIELDS)], rng.randrange(len(scene.objects))
        others = alternatives(scene, changed, index)[1:]
        if changed == "attachment":  # adding a specification, never taking one away
            others = [s for s in others if s.objects[index].attachment is not None]
        phrasing = rng.randrange(PHRASINGS // 2, PHRASINGS)  # one that names sizes, which the region depends on
        yield Case(scene, rng.choice(others), changed, index, phrasing, seed * 1000 + number)


def sees(clip: DemoClip, image: Image.Image, scene: Scene, attribute: str) -> list[bool]:
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
    return clip.confirms(pixels, [scene], attribute)


def judge(clip: DemoClip, case: Case, image: Image.Image) -> dict[str, float]:
    """Whether the new word is seen, and whether every other object still is what it was."""
    seen = sees(clip, image, case.after, case.field)[case.index]
    rest = [sees(clip, image, case.after, attribute) for attribute in ("kind", "color")]
    kept = all(answers[i] for answers in rest for i in range(len(case.after.objects)) if i != case.index)
    return {"new word seen": seen, "others kept": kept, "both": seen and kept}


def judge_mask(case: Case, mask: Tensor) -> dict[str, float]:
    region = case.region((mask.shape[0], mask.shape[1]))
    covered = float(mask[region].float().mean()) if region.any() else float("nan")
    on_target = float(dilate(region, NEAR)[mask].float().mean()) if mask.any() else float("nan")
    share = float(mask.float().mean())
    return {"covered": covered, "found": covered >= FOUND, "on target": on_target, "active share": share}


def background_psnr(before: Image.Image, after: Image.Image, mask: Tensor) -> float:
    """PSNR in dB over the pixels outside ``mask`` (bool ``[H, W]`` over the latent)."""
    grid = Image.fromarray(mask.cpu().numpy()).resize(before.size, Image.Resampling.NEAREST)
    outside = ~np.asarray(grid)
    error = (np.asarray(before, np.float64) - np.asarray(after, np.float64))[outside] / 255
    return float(-10 * np.log10(max(1e-10, np.mean(error**2)))) if outside.any() else float("nan")


def settings(steps: int) -> dict[str, DetectConfig]:
    """The settings that are compared; the first is the default."""
    return {
        "default": DetectConfig(),
        "no control": DetectConfig(control=False),
        "paper's mask": DetectConfig(method="paper"),
        "an eighth of the steps": DetectConfig(steps=max(1, steps // 8)),
        "a third of the steps": DetectConfig(steps=max(1, steps // 3)),
        "half of the steps": DetectConfig(steps=max(1, steps // 2)),
        "dilation 3": DetectConfig(dilation=3),
    }


def run_cases(editor: EditPipeline, clip: DemoClip, cases: list[Case], steps: int, guidance: float) -> list[Outcome]:
    """Cases that run at once."""
    befores, afters = zip(*(case.prompts for case in cases), strict=True)
    seeds = [case.seed for case in cases]
    bases = editor.generate(list(befores), seed=seeds, num_inference_steps=steps, guidance_scale=guidance)
    outcomes = []
    for case, base, after in zip(cases, bases, afters, strict=True):
        shown = all(all(sees(clip, base.image, case.before, attribute)) for attribute in ("kind", "color"))
        rerun = editor.rerun(base, after)[0][0]
        outcomes.append(Outcome(case, base.image, shown, rerun))
        outcomes[-1].figures["dense rerun"] = judge(clip, case, rerun)
    for name, detect in settings(steps).items():
        results = editor.edit(bases, list(afters), detect=detect, record=False, batch_size=len(cases))
        for outcome, result in zip(outcomes, results, strict=True):
            mask = result.mask.cpu()
            psnr = background_psnr(outcome.base, result.image, mask)
            outcome.pictures[name] = (result.image, mask)
            figures = {**judge(clip, outcome.case, result.image), **judge_mask(outcome.case, mask)}
            outcome.figures[name] = {**figures, "background PSNR": psnr}
    for base in bases:
        base.recording.release()
    return outcomes


def average(values: list[float]) -> float:
    known = [float(value) for value in values if not np.isnan(value)]
    return mean(known) if known else float("nan")


def summarize(outcomes: list[Outcome]) -> dict[str, dict[str, float]]:
    """The figures of each setting, averaged: of masks over all bases, of pictures over those that show their prompt."""
    summary: dict[str, dict[str, float]] = {}
    for name in outcomes[0].figures:
        summary[name] = {}
        for figure in outcomes[0].figures["default"]:
            judged = figure in ("new word seen", "others kept", "both")
            counted = [o for o in outcomes if o.shown or not judged]
            summary[name][figure] = average([o.figures[name].get(figure, float("nan")) for o in counted])
        for changed in FIELDS:
            own = [o for o in outcomes if o.case.field == changed]
            summary[name][f"{changed} seen"] = average([o.figures[name]["new word seen"] for o in own if o.shown])
            found = [o.figures[name].get("found", float("nan")) for o in own]
            summary[name][f"{changed} found"] = average(found)
    return summary


def print_summary(console: Console, title: str, summary: dict[str, dict[str, float]]) -> None:
    table = Table("", *summary, title=title)
    for figure in summary["default"]:
        shown = (f"{row[figure]:.1f} dB" if "PSNR" in figure else f"{row[figure]:.0%}" for row in summary.values())
        table.add_row(figure, *("" if "nan" in value else value for value in shown))
    console.print(table)


def draw_sheet(outcomes: list[Outcome]) -> Image.Image:
    rows = []
    for outcome in outcomes[:24]:
        image, mask = outcome.pictures["default"]
        old, new = changed_words(*outcome.case.prompts)
        old.insert(0, (f"{outcome.case.seed}:", False))
        rows.append([Panel(outcome.base, old), Panel(image, new), Panel(overlay_mask(image, mask)),
                     Panel(outcome.rerun, new)])  # fmt: skip
    return draw_contact_sheet(rows, ("before", "after", "mask", "dense rerun"))


def main(
    edits: Annotated[int, typer.Option(help="Scenes to edit.")] = 12,
    steps: Annotated[list[int], typer.Option(help="Steps of the schedule; may be given several times.")] = [25],  # noqa: B006
    sampler: Annotated[list[str], typer.Option(help=f"Any of {', '.join(SAMPLERS)}.")] = ["DDIM"],  # noqa: B006
    guidance: float = 5.0,
    seed: int = 1,
    batch: Annotated[int, typer.Option(help="Edits that one U-Net call carries.")] = 4,
    device: str = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for the JSON and the sheets.")] = Path("bench/results"),
) -> None:
    console = Console(width=max(160, Console().width))
    pipe = load_pipeline(device=device)
    pipe.set_progress_bar_config(disable=True)
    config, editor, clip = pipe.scheduler.config, EditPipeline(pipe), load_clip(device)
    cases = list(draw_cases(edits, seed))
    environment = describe_environment(device)
    report: dict[str, Any] = {"environment": environment, "guidance": guidance, "edits": edits, "schedules": []}
    console.print(environment_line(environment))
    output.mkdir(parents=True, exist_ok=True)
    for name, count in ((name, count) for name in sampler for count in steps):
        editor.pipe.scheduler = getattr(diffusers, SAMPLERS[name]).from_config(config)
        outcomes: list[Outcome] = []
        for start in range(0, len(cases), batch):
            outcomes += run_cases(editor, clip, cases[start : start + batch], count, guidance)
            console.print(f"{name}, {count} steps: {len(outcomes)} of {edits} scenes")
        shown, summary = sum(outcome.shown for outcome in outcomes), summarize(outcomes)
        title = f"{name}, {count} steps: {edits} edits, {shown} of bases that show their prompt; guidance {guidance}"
        print_summary(console, title, summary)
        made = {"sampler": name, "steps": count, "bases that show their prompt": shown, "summary": summary}
        each = [{"prompts": o.case.prompts, "seed": o.case.seed, "shown": o.shown, **o.figures} for o in outcomes]
        report["schedules"].append({**made, "cases": each})
        (output / "edit_quality.json").write_text(json.dumps(report, indent=2))
        draw_sheet(outcomes).save(output / f"edit_quality_{name.lower().strip('+')}_{count}.png")


if __name__ == "__main__":
    typer.run(main)
