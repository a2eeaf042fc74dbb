"""What ``make demo`` promises, on the model that ships: the edits happen, the rest stays, and it is faster."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fisedit import EditPipeline
from fisedit.demo import load_clip, load_pipeline
from fisedit.demo.showcase import EDITS, run_showcase


@pytest.mark.nightly
def test_showcase(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    outcomes = run_showcase(EditPipeline(load_pipeline()), tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "contact_sheet.png").stat().st_size > 10_000
    clip = load_clip()
    for edit, outcome, figures in zip(EDITS, outcomes, report["edits"], strict=True):
        assert figures["background_identical"], edit.name
        assert figures["active_share"] <= 0.2, edit.name
        if figures["active_share"] <= 0.15:
            assert figures["step_ratio"] >= 4, edit.name
        assert figures["edit_ratio"] >= 1.6, edit.name
        image = torch.tensor(np.asarray(outcome.result.image)).permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
        before, after = clip.embed_text([edit.before, edit.after]) @ clip.embed_images(image)[0]
        assert after > before, f"{edit.name}: the image encoder does not see the new words"
    torch.set_num_threads(1)
