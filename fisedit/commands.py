"""What the commands of the command line do, on a loaded pipeline."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fisedit.alignment import align_prompts
from fisedit.comparison import Comparison, compare
from fisedit.config import DetectConfig
from fisedit.contact_sheet import Panel, draw_contact_sheet, mask_image
from fisedit.environment import describe_environment
from fisedit.errors import UnknownOptionError
from fisedit.manifest import check_empty
from fisedit.mask import user_mask
from fisedit.pipeline import EditPipeline
from fisedit.results import HEADINGS, Generation


def draw_image(
    editor: EditPipeline, prompt: str, seed: int, settings: dict[str, Any], save: Path | None = None
) -> Image.Image:
    """The image that ``editor.generate`` gives, without keeping anything for an edit but in the folder ``save``.

    Raises:
        SavedBaseExistsError, CacheWriteError: the folder is not empty, or cannot be written to.
        PromptTooLongError: the prompt has more tokens than the text encoder takes.
        UnknownOptionError: a size or a number of steps that the pipeline does not take.
    """
    check_settings(editor, settings)
    align_prompts(editor.pipe.tokenizer, prompt, prompt)
    if save is not None:
        check_empty(save)
        base = editor.generate(prompt, seed=seed, **settings)
        base.save(save)
        return base.image
    return editor.pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images[0]


def edit_to_folder(
    editor: EditPipeline,
    prompts: Sequence[str],
    output: Path,
    *,
    seed: int,
    settings: dict[str, Any],
    mask: str | Path = "auto",
    detect: DetectConfig | None = None,
    rounds: bool = False,
    rerun: bool = False,
    saved: Path | None = None,
) -> list[Comparison]:
    """Generate the first of ``prompts``, edit it to each other one, and write images, masks, sheet and report.

    Args:
        saved: the folder of a saved base, which is then edited to all of ``prompts``, under its own settings.
        output: the folder for base.png, edit_N.png, mask_N.png, contact_sheet.png and report.json; made if missing.
        rounds: each edit starts from the former one, not from the base.
        rerun: also rerun each new prompt dense, and show it on the sheet.
    Returns:
        the figures of each edit.

    Raises:
        PromptTooLongError, InvalidMaskError, UnknownOptionError, ScheduleTooShortError: before anything is generated.
        SavedBaseMismatchError, CacheReadError and the like: ``saved`` cannot be loaded, see :meth:`EditPipeline.load`.
    """
    if saved is None:
        _check_edits(editor, prompts, settings, mask, detect)
        base = editor.generate(prompts[0], seed=seed, **settings)
    else:
        base, settings = editor.load(saved), {"base": str(saved)}
        prompts = [base.prompt, *prompts]
    output.mkdir(parents=True, exist_ok=True)
    base.image.save(output / "base.png")
    start: Generation = base
    rows: list[list[Panel]] = []
    comparisons: list[Comparison] = []
    for number, prompt in enumerate(prompts[1:], 1):
        result = editor.edit(start, prompt, mask=mask, detect=detect, record=rounds)
        result.image.save(output / f"edit_{number}.png")
        mask_image(result.mask, result.image.size).save(output / f"mask_{number}.png")
        comparison, dense = compare(result, rerun=rerun)
        comparisons.append(comparison)
        rows += result.panels(dense)
        start = result if rounds else base
    draw_contact_sheet(rows, HEADINGS[: 4 if rerun else 3]).save(output / "contact_sheet.png")
    report = {
        "environment": describe_environment(editor.pipe.device),
        "settings": {**settings, **({} if saved else {"seed": seed}), "rounds": rounds, "mask": str(mask)},
        "edits": [comparison.to_dict() for comparison in comparisons],
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return comparisons


def _check_edits(
    editor: EditPipeline,
    prompts: Sequence[str],
    settings: dict[str, Any],
    mask: str | Path,
    detect: DetectConfig | None,
) -> None:
    """Raise for what would fail only after the base is generated, so that no time is lost."""
    check_settings(editor, settings)
    for prompt in prompts:
        align_prompts(editor.pipe.tokenizer, prompts[0], prompt)
    if mask == "auto":
        (detect or DetectConfig()).resolve(settings["num_inference_steps"])
    else:
        user_mask(mask, (1, 1))


def check_settings(editor: EditPipeline, settings: dict[str, Any]) -> None:
    """Raise for a size or a number of steps that the pipeline or its scheduler would refuse.

    Raises:
        UnknownOptionError: names the option and what it takes.
    """
    multiple = math.lcm(8, editor.pipe.vae_scale_factor)  # diffusers' pipelines ask for 8 themselves
    for name in ("height", "width"):
        if name in settings and (settings[name] < 1 or settings[name] % multiple):
            raise UnknownOptionError(option=name, given=settings[name], allowed=f"multiples of {multiple}")
    steps, most = settings["num_inference_steps"], editor.pipe.scheduler.config.num_train_timesteps
    if steps > most:
        raise UnknownOptionError(
            option="steps", given=steps, allowed=f"1 to {most}, as many as the model was trained on"
        )


def inspect_graph(editor: EditPipeline, kind: str, settings: dict[str, Any]) -> str:
    """Capture the U-Net with one recorded step; its graph ``kind`` (edit, detect or record) as text, with passes,
    refusals and dense islands."""
    check_settings(editor, settings)
    editor.generate("", seed=0, **{**settings, "num_inference_steps": 1, "output_type": "latent"})
    return editor.pipe.unet.inspect(kind)
