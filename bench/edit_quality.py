"""Does the edit happen, and does the rest stay? Random edits of the demo model, judged by its own image encoder.

    python bench/edit_quality.py --edits 24 --device cuda

For held-out scenes it changes one color, one object or one attachment and prints, per setting of the detection: how
often the new word is seen in the edited picture, how often the other objects are still seen, the active share, and the
background's PSNR in pixels. The first line is the dense rerun of the new prompt from the same noise, which keeps
nothing on purpose. Only bases that show what their own prompt says are counted.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fisedit import DetectConfig, EditPipeline, EditResult, Generation
from fisedit.contact_sheet import Panel, changed_words, draw_contact_sheet, overlay_mask
from fisedit.demo import load_clip, load_pipeline
from fisedit.demo.captions import alternatives, caption
from fisedit.demo.clip import DemoClip
from fisedit.demo.scenes import Scene, sample_scenes
from fisedit.environment import describe_environment, environment_line

FIELDS = ("color", "kind", "attachment")


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


def draw_cases(count: int, seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    scenes = sample_scenes(count, torch.Generator().manual_seed(seed), split="held-out").scenes()
    for number, scene in enumerate(scenes):
        field, index = FIELDS[number % len(FIELDS)], rng.randrange(len(scene.objects))
        others = alternatives(scene, field, index)[1:]
        if field == "attachment":  # adding a specification, never taking one away
            others = [s for s in others if s.objects[index].attachment is not None]
        yield Case(scene, rng.choice(others), field, index, rng.randrange(6), seed * 1000 + number)


def sees(clip: DemoClip, image: Image.Image, scene: Scene, field: str) -> list[bool]:
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
    return clip.confirms(pixels, [scene], field)


def judge(clip: DemoClip, case: Case, image: Image.Image) -> tuple[bool, bool]:
    """Whether the new word is seen, and whether every other object still is what it was."""
    seen = sees(clip, image, case.after, case.field)[case.index]
    rest = [sees(clip, image, case.after, field) for field in ("kind", "color")]
    kept = all(answers[i] for answers in rest for i in range(len(case.after.objects)) if i != case.index)
    return seen, kept


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
        "an eighth of the steps": DetectConfig(steps=max(2, steps // 8)),
        "a third of the steps": DetectConfig(steps=steps // 3),
        "dilation 3": DetectConfig(dilation=3),
    }


def run_case(editor: EditPipeline, clip: DemoClip, case: Case, steps: int, guidance: float) -> dict[str, Any] | None:
    before, after = case.prompts
    base = editor.generate(before, seed=case.seed, num_inference_steps=steps, guidance_scale=guidance)
    if not all(all(sees(clip, base.image, case.before, field)) for field in ("kind", "color")):
        return None
    rerun = editor.rerun(base, after)[0][0]
    outcome: dict[str, Any] = {"case": case, "base": base.image, "rerun": rerun}
    outcome["dense rerun"] = (*judge(clip, case, rerun), 1.0, float("nan"))
    outcome["images"] = {}
    for name, detect in settings(steps).items():
        result = editor.edit(base, after, detect=detect, record=False)
        psnr = background_psnr(base.image, result.image, result.mask)
        outcome[name] = (*judge(clip, case, result.image), float(result.mask.float().mean()), psnr)
        outcome["images"][name] = (result.image, result.mask)
    release(base)
    return outcome


def release(base: Generation | EditResult) -> None:
    if base.recording is not None:
        base.recording.release()


def summarize(outcomes: list[dict[str, Any]], steps: int) -> dict[str, dict[str, float]]:
    summary = {}
    for name in ("dense rerun", *settings(steps)):
        seen, kept, share, psnr = zip(*(outcome[name] for outcome in outcomes), strict=True)
        summary[name] = {
            "new word seen": mean(seen),
            "others kept": mean(kept),
            "both": mean(a and b for a, b in zip(seen, kept, strict=True)),
            "active share": mean(share),
            "background PSNR": float(np.nanmean(psnr)) if not np.isnan(psnr).all() else float("nan"),
        }
        for field in FIELDS:
            own = [o[name][0] for o in outcomes if o["case"].field == field]
            summary[name][f"{field} seen"] = mean(own) if own else float("nan")
    return summary


def main(
    edits: Annotated[int, typer.Option(help="Scenes to edit; those whose base fails are left out.")] = 12,
    steps: int = 25,
    guidance: float = 5.0,
    seed: int = 1,
    device: str = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for the JSON and the sheet.")] = Path("bench/results"),
) -> None:
    console = Console()
    pipe = load_pipeline(device=device)
    pipe.set_progress_bar_config(disable=True)
    editor, clip = EditPipeline(pipe), load_clip(device)
    cases = list(draw_cases(edits, seed))
    outcomes = [o for o in (run_case(editor, clip, case, steps, guidance) for case in cases) if o is not None]
    summary = summarize(outcomes, steps)
    names = list(next(iter(summary.values())))
    title = f"{len(outcomes)} edits of {edits} scenes, {steps} steps, guidance {guidance}"
    table = Table("setting", *names, title=title)
    for name, figures in summary.items():
        table.add_row(name, *(f"{figures[n]:.1f}" if "PSNR" in n else f"{figures[n]:.0%}" for n in names))
    console.print(table)
    environment = describe_environment(device)
    console.print(environment_line(environment))
    output.mkdir(parents=True, exist_ok=True)
    report = {"environment": environment, "steps": steps, "guidance": guidance, "edits": len(outcomes)}
    (output / "edit_quality.json").write_text(json.dumps(report | {"summary": summary}, indent=2))
    rows = []
    for outcome in outcomes:
        before, after = outcome["case"].prompts
        image, mask = outcome["images"]["default"]
        old, new = changed_words(before, after)
        old.insert(0, (f"{outcome['case'].seed}:", False))
        rows.append([Panel(outcome["base"], old), Panel(image, new), Panel(overlay_mask(image, mask)),
                     Panel(outcome["rerun"], new)])  # fmt: skip
    draw_contact_sheet(rows, ("before", "after", "mask", "dense rerun")).save(output / "edit_quality.png")


if __name__ == "__main__":
    typer.run(main)
