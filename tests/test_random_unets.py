"""U-Nets nobody chose: random configurations, sizes, masks, dtypes and options, all against the untouched model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from harness import Harness
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fisedit.runtime.cost_model import COSTS

TEXT = 24
PHASES = (Phase.explicit, Phase.generate)  # a failing case is printed whole; making it smaller takes minutes
HEALTH = (HealthCheck.too_slow, HealthCheck.data_too_large)


@dataclass(frozen=True)
class Case:
    """One U-Net, one call, one mask."""

    widths: tuple[int, ...]
    attention: tuple[bool, ...]
    middle: str | None
    layers: int
    depth: int
    heads: int
    groups: int
    act: str
    scale_shift: bool
    linear: bool
    size: tuple[int, int]
    batch: int
    dtype: torch.dtype
    kv: str
    cost: str
    active: float
    masks: int
    seed: int


@st.composite
def cases(draw: st.DrawFn, levels_of: tuple[int, ...], repeats: tuple[int, ...]) -> Case:
    """``levels_of``: how many levels; ``repeats``: how many layers a level and transformer layers an attention."""
    levels = draw(st.sampled_from(levels_of))
    groups, batch = draw(st.sampled_from((2, 4, 8))), draw(st.integers(1, 3))
    widths = tuple(draw(st.lists(st.sampled_from((8, 16, 24)), min_size=levels, max_size=levels)))
    size = (draw(st.integers(2, 13)), draw(st.integers(2, 13)))
    # PyTorch refuses to normalize a single value.
    assume(batch > 1 or groups not in widths or max(size) > 2 ** (levels - 1))
    return Case(
        widths=widths,
        attention=tuple(draw(st.lists(st.booleans(), min_size=levels, max_size=levels))),
        middle=draw(st.sampled_from(("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None))),
        layers=draw(st.sampled_from(repeats)),
        depth=draw(st.sampled_from(repeats)),
        heads=draw(st.sampled_from((1, 2, 4))),
        groups=groups,
        act=draw(st.sampled_from(("silu", "mish", "gelu", "relu"))),
        scale_shift=draw(st.booleans()),
        linear=draw(st.booleans()),
        size=size,
        batch=batch,
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float64))),
        kv=draw(st.sampled_from(("cached", "cached", "active"))),
        cost=draw(st.sampled_from(tuple(COSTS))),
        active=draw(st.sampled_from((0.0, 0.05, 0.2, 0.5, 0.9))),
        masks=draw(st.sampled_from((1, batch))),
        seed=draw(st.integers(0, 2**16)),
    )


def build(case: Case) -> UNet2DConditionModel:
    torch.manual_seed(case.seed)
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in case.attention]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(case.attention)]
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=TEXT, block_out_channels=case.widths,
        down_block_types=tuple(down), up_block_types=tuple(up), mid_block_type=case.middle,
        layers_per_block=case.layers, transformer_layers_per_block=case.depth, attention_head_dim=case.heads,
        norm_num_groups=case.groups, act_fn=case.act, use_linear_projection=case.linear,
        resnet_time_scale_shift="scale_shift" if case.scale_shift else "default",
    )  # fmt: skip
    return model.to(case.dtype).eval().requires_grad_(False)


def call(case: Case, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(case.batch, 4, *case.size, generator=generator)
    text = torch.randn(case.batch, 5, TEXT, generator=generator)
    return {"sample": sample.to(case.dtype), "timestep": 321, "encoder_hidden_states": text.to(case.dtype)}


def draw_masks(case: Case) -> Tensor:
    """``[M, H, W]`` of the case's density, one position at least in each."""
    generator = torch.Generator().manual_seed(case.seed)
    masks = torch.rand(case.masks, *case.size, generator=generator) < case.active
    for mask in masks:
        mask.view(-1)[torch.randint(mask.numel(), (), generator=generator)] = True
    return masks


class Yardstick:
    """How far from the exact (float64) result a value of the case's dtype may be.

    The sparse graphs add the same numbers in another order, so they may be as far from it as the dense model itself is,
    within a small factor: rounding errors of two orders differ from case to case, most where a deep level of one or
    two positions makes a group norm ill-conditioned. Any wrong index is orders of magnitude beyond. How far the dense
    model in float64 is from the exact result, its float32 errors tell: the worst of many, for in ill-conditioned cases
    one may be small by chance.
    """

    FACTOR = 6

    def __init__(self, model: UNet2DConditionModel, case: Case) -> None:
        self.model, self.double, self.case = model, copy.deepcopy(model).double(), case

    def dense(self, model: UNet2DConditionModel, inputs: dict[str, Any]) -> Tensor:
        dtype = next(model.parameters()).dtype
        with torch.no_grad():
            return model(**{k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in inputs.items()}).sample

    def rounding(self, inputs: dict[str, Any], exact: Tensor) -> float:
        """How far the dense model is from its exact result."""
        if self.case.dtype != torch.float64:
            return float((self.dense(self.model, inputs).double() - exact).abs().max())
        model, found = copy.deepcopy(self.model).float(), []
        for seed in range(16):
            moved = dict(inputs)
            for name, value in inputs.items() if seed else ():
                if isinstance(value, Tensor) and value.is_floating_point():
                    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=value.dtype)
                    moved[name] = value * (1 + noise * torch.finfo(torch.float32).eps / 2)
            found.append(float((self.dense(model, moved).double() - exact).abs().max()))
        return max(found) * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps

    def check(self, value: Tensor, inputs: dict[str, Any], where: Tensor | None = None) -> None:
        exact, eps = self.dense(self.double, inputs), torch.finfo(self.case.dtype).eps
        limit = max(self.FACTOR * self.rounding(inputs, exact), 64 * eps * float(exact.abs().max()))
        error = (value.double() - exact).abs()
        worst = float(error.max() if where is None else error[where].max())
        assert worst <= limit, f"{worst:.2e} > {limit:.2e}"


def check(case: Case) -> None:
    model = build(case)
    inputs, other = call(case, case.seed + 1), call(case, case.seed + 2)
    harness = Harness(model, inputs, kv=case.kv)
    yardstick = Yardstick(model, case)
    yardstick.check(harness.recorded, inputs)
    assert not harness.program.islands
    tensors = harness.call.tensors | {name: value for name, value in other.items() if isinstance(value, Tensor)}
    yardstick.check(harness.edit(torch.ones(case.size, dtype=torch.bool), case.cost, tensors), other)
    if case.kv == "cached":
        masks = draw_masks(case)
        where = masks[:, None].expand(case.batch, 4, *case.size)
        out = harness.edit(masks, case.cost)
        yardstick.check(out, inputs, where)
        assert torch.equal(out[~where], harness.recorded[~where])


@given(cases((1, 1, 2), (1,)))
@settings(max_examples=20, phases=PHASES, suppress_health_check=HEALTH)
def test_random_unets(case: Case) -> None:
    check(case)


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(8))  # for several workers: 200 in all
@given(case=cases((1, 1, 2, 2, 2, 3, 3, 4), (1, 1, 2)))
@settings(max_examples=25, phases=PHASES, suppress_health_check=HEALTH, derandomize=False, print_blob=True)
def test_more_random_unets(part: int, case: Case) -> None:
    check(case)


def test_the_yardstick_sees_a_wrong_index() -> None:
    """Two neighbors exchanged are beyond every limit."""
    case = Case((8, 16), (True, False), None, 1, 1, 2, 4, "silu", False, True, (5, 6), 1, torch.bfloat16, "cached",
                "halo", 0.2, 1, 0)  # fmt: skip
    model, inputs = build(case), call(case, 1)
    yardstick = Yardstick(model, case)
    out = yardstick.dense(model, inputs)
    yardstick.check(out, inputs)
    wrong = out.clone()
    wrong[..., 2, 2], wrong[..., 2, 3] = out[..., 2, 3], out[..., 2, 2]
    with pytest.raises(AssertionError):
        yardstick.check(wrong, inputs)
