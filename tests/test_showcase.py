"""What ``make demo`` promises, on the model that ships: the edits happen, the rest stays, and it is faster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fisedit import EditPipeline
from fisedit.demo import load_clip, load_pipeline
from fisedit.demo.showcase import EDITS, Outcome, run_showcase

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def showcase(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Outcome], dict[str, Any], Path]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("demo")
    outcomes = run_showcase(EditPipeline(load_pipeline()), folder)
    yield outcomes, json.loads((folder / "report.json").read_text()), folder
    torch.set_num_threads(threads)


def test_edits_happen_and_the_rest_stays(showcase: tuple[list[Outcome], dict[str, Any], Path]) -> None:
    outcomes, report, folder = showcase
    assert (folder / "contact_sheet.png").stat().st_size > 10_000
    clip = load_clip()
    for edit, outcome, figures in zip(EDITS, outcomes, report["edits"], strict=True):
        assert figures["background_identical"] and figures["active_share"] <= 0.2, edit.name
        image = torch.tensor(np.asarray(outcome.result.image)).permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
        before, after = clip.embed_text([edit.before, edit.after]) @ clip.embed_images(image)[0]
        assert after > before, f"{edit.name}: the image encoder does not see the new words"


def test_it_is_faster(showcase: tuple[list[Outcome], dict[str, Any], Path]) -> None:
    """Needs a machine that computes nothing else meanwhile: two threads on two cores are starved by a third."""
    for figures in showcase[1]["edits"]:
        assert figures["active_share"] > 0.15 or figures["step_ratio"] >= 4, figures["name"]
        assert figures["edit_ratio"] >= 1.6, figures["name"]
