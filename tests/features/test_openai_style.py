"""U-Nets in the style of the original Stable Diffusion code against their own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equivalence import check_equivalence
from harness import Harness
from openai_style import openai_style
from torch import nn

TEXTS = "original-format: linear projections, a text for each transformer block, checkpointing by an autograd function"
CASES: dict[str, dict[str, Any]] = {
    "original-format U-Nets (`openaimodel`): einsum attention, float32 norms": {},
    "original-format: scale-shift norms, residual blocks that resample, classes, `torch.utils.checkpoint`": {
        "scale_shift": True, "resample_blocks": True, "attention": "new", "classes": 5, "checkpoint": "torch",
    },
    "original-format: attention over `[B, C, H*W]` (`QKVAttentionLegacy`)": {
        "multipliers": (1,), "attention": "legacy",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "options", [pytest.param(o, id=n, marks=pytest.mark.supports("Models", n)) for n, o in CASES.items()]
)
def test_packed(options: dict[str, Any]) -> None:
    h = check_equivalence(*openai_style(**options))
    assert not h.program.islands


@pytest.mark.supports("Models", TEXTS)
def test_context_as_a_list() -> None:
    model, call = openai_style(multipliers=(1,), linear_projection=True, depth=2, checkpoint="function")
    call["context"] = [call["context"], call["context"].flip(1) * 1.1]
    h = check_equivalence(model, call)
    assert not h.program.islands


@pytest.mark.supports("Models", "original-format: split attention (its loop stays dense)")
def test_split_attention() -> None:
    h = check_equivalence(*openai_style(multipliers=(1,), heads=2, slices=2))
    assert h.program.islands and all("attn" in island for island in h.program.islands)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As that code does: the norms over groups stay in float32."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.LayerNorm):
            module.to(dtype)
    return model


@pytest.mark.supports("Models", "original-format: attention scores in float32, autocast switched off around them")
def test_scores_in_float32_of_a_bfloat16_model() -> None:
    """Queries and keys are raised to float32, values are not: the rewritten attention takes both."""
    model, call = openai_style(multipliers=(1,), upcast=True)
    call |= {name: call[name].bfloat16() for name in ("x", "context")}
    h = Harness(cast(model, torch.bfloat16), call)
    reference, _ = openai_style(multipliers=(1,), upcast=True)
    reference.load_state_dict(model.state_dict())
    doubles = {name: value.double() if value.is_floating_point() else value for name, value in call.items()}
    exact = cast(reference, torch.double)(**doubles)
    limit = 2 * (h.dense.double() - exact).abs().max()  # rounding in another order, but no more of it
    assert (h.recorded.double() - exact).abs().max() <= limit
    assert (h.edit(torch.ones(6, 10, dtype=torch.bool)).double() - exact).abs().max() <= limit
