"""What a smaller base costs the picture: edits of the demo model, recorded in 8 bits or without keys, and exactly.

    python bench/storage_quality.py --edits 12 --steps 25 --device cuda

For held-out scenes it changes one color, object or attachment. Each way of keeping a base edits twice: under the mask
that the exact edit found, and seeking its own. Printed are

- bytes that a recorded step keeps;
- the PSNR, within that mask, between its edit and the exact one (outside, latents are the base's in all ways), and the
  same between the dense rerun of the new prompt and the exact edit: how far apart two pictures are that both are right;
- how much of the two masks is common to both (intersection over union);
- how often the new word is seen in the picture and every other object still is what it was, of the bases that show
  their own prompt, as in ``edit_quality.py``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from edit_quality import Case, average, draw_cases, judge, sees
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fisedit import CacheConfig, EditPipeline
from fisedit.demo import load_clip, load_pipeline
from fisedit.demo.clip import DemoClip
from fisedit.environment import describe_environment, environment_line

EXACT, RERUN = "exact", "dense rerun"
WAYS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "keys in 8 bits": {"kv": "int8"},
    "all in 8 bits": {"cache": CacheConfig(storage="int8")},
    "active keys": {"kv": "active"},
}
"""Options of ``compile``."""


@dataclass
class Figures:
    """Of one way, by figure: one value for each case; ``shown``: whether its base shows what its prompt says."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(float(value))

    def average(self, name: str) -> float:
        return average(self.values.get(name, []))


def psnr_within(one: Image.Image, other: Image.Image, mask: Tensor) -> float:
    """PSNR in dB over the pixels of ``mask`` (bool ``[H, W]`` over the latent); 100 for equal ones."""
    grid = np.asarray(Image.fromarray(mask.cpu().numpy()).resize(one.size, Image.Resampling.NEAREST))
    error = (np.asarray(one, np.float64) - np.asarray(other, np.float64))[grid] / 255
    return float(-10 * np.log10(max(1e-10, np.mean(error**2))))


def run_case(
    editors: dict[str, EditPipeline], clip: DemoClip, case: Case, settings: dict[str, Any], found: dict[str, Figures]
) -> None:
    """Edit one scene in every way, the exact one first."""
    before, after = case.prompts
    exact_image, exact_mask = None, None
    for name, editor in editors.items():
        base = editor.generate(before, seed=case.seed, **settings)
        mask = editor.edit(base, after, record=False).mask.cpu()
        exact_mask = mask if exact_mask is None else exact_mask
        image = editor.edit(base, after, mask=exact_mask, record=False).image
        if exact_image is None:
            exact_image = image
            shown = all(all(sees(clip, base.image, case.before, attribute)) for attribute in ("kind", "color"))
            rerun = editor.rerun(base, after)[0][0]
            found[RERUN].add(psnr=psnr_within(rerun, exact_image, exact_mask))
            if shown:
                found[RERUN].add(**judge(clip, case, rerun))
        common = float((mask & exact_mask).sum() / (mask | exact_mask).sum().clamp(min=1))
        kept = base.recording.nbytes / len(base.recording.calls)
        found[name].add(psnr=psnr_within(image, exact_image, exact_mask), bytes=kept, common=common)
        if shown:
            found[name].add(**judge(clip, case, image))
        base.recording.release()


def rows(found: dict[str, Figures]) -> list[tuple[str, ...]]:
    """The lines of the table, as text."""
    whole = found[EXACT].average("bytes")
    lines = []
    for name, figures in found.items():
        kept, common = figures.average("bytes"), figures.average("common")
        lines.append((
            name,
            "" if np.isnan(kept) else f"{kept / 1e6:.2f}",
            "" if np.isnan(kept) else f"{kept / whole:.0%}",
            "" if name == EXACT else f"{figures.average('psnr'):.1f}",
            "" if np.isnan(common) or name == EXACT else f"{common:.0%}",
            f"{figures.average('both'):.0%}",
        ))  # fmt: skip
    return lines


HEAD = ("base", "MB a step", "of exact", "PSNR to the exact edit, dB", "common mask", "seen, rest kept")


def main(
    edits: Annotated[int, typer.Option(help="Scenes to edit.")] = 12,
    steps: int = 25,
    size: Annotated[int | None, typer.Option(help="Pixels of a side; the model's own by default.")] = None,
    guidance: float = 5.0,
    seed: int = 1,
    device: str = "cpu",
    output: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Edit in every way and print how they differ."""
    console, clip = Console(width=max(120, Console().width)), load_clip(device)
    pipe = load_pipeline(device=device)
    pipe.set_progress_bar_config(disable=True)
    editors = {name: EditPipeline(pipe, **options) for name, options in WAYS.items()}
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    settings |= {} if size is None else {"height": size, "width": size}
    found = {name: Figures() for name in (*WAYS, RERUN)}
    with torch.no_grad():
        for number, case in enumerate(draw_cases(edits, seed)):
            run_case(editors, clip, case, settings, found)
            console.print(f"{number + 1} of {edits} scenes")
    table = Table(*HEAD, title=f"{edits} edits, DDIM, {steps} steps, guidance {guidance:g}")
    for line in rows(found):
        table.add_row(*line)
    console.print(table)
    environment = describe_environment(device)
    console.print(
        f"{environment_line(environment)}; {len(found[EXACT].values.get('both', []))} bases show their prompt"
    )
    if output is not None:
        values = {name: figures.values for name, figures in found.items()}
        output.write_text(json.dumps({"environment": environment, **values}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
