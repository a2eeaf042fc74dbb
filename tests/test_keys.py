"""How keys and values are kept by plan, from budget and bandwidth."""

from __future__ import annotations

import re
import warnings
from typing import Any

import models
import pytest
import torch
from tiered import DEVICE, Small, compiled, edited, recorded, same, sizes
from toy_sampler import SIZE

import fisedit
from fisedit.config import CacheConfig
from fisedit.runtime.cache.keys import Bandwidth, plan_keys
from fisedit.warnings import CacheSpaceWarning

PROVIDERS = ("reference", "triton")


@pytest.mark.parametrize(
    ("budget", "bus", "kv", "why"),
    [(60, 55, "cached", "the budget is"), (6, 55, "int8", "half as much"), (1, 55, "int8", "2.0 ms over the bus"),
     (1, 12, "active", "9.3 ms over the bus.*active rows alone"), (1, None, "int8", "half as much")],
)  # fmt: skip
def test_the_plan_of_keys(budget: int, bus: float | None, kv: str, why: str) -> None:
    """Stable Diffusion 2.1 at 768 x 768: 208 MB of keys and values a step, 1.7 GB of weights, on 3 TB/s."""
    bandwidth = None if bus is None else Bandwidth(bus * 1e9, 3e12)
    plan = plan_keys(223 * 10**6, 1730 * 10**6, budget * 2**30, bandwidth)
    assert plan.kv == kv and re.search(why, plan.reason)


LEAST = "int8" if DEVICE == "cpu" else "active"


@pytest.mark.parametrize(
    ("budget", "kv", "provider"),
    [
        (None, "cached", "reference"),
        pytest.param(None, "cached", "triton", marks=pytest.mark.nightly),
        *((budget, kv, provider) for budget, kv in (("1MB", "int8"), (0, LEAST)) for provider in PROVIDERS),
    ],
)
def test_keys_by_plan(budget: str | int | None, kv: str, provider: str) -> None:
    """All that fits is kept exactly; else in 8 bits; ``inspect`` says why."""
    model = (models.one_level(block_out_channels=(32, 64)) if provider == "reference" else Small().eval()).to(DEVICE)
    arguments = models.arguments(models.one_level(), SIZE)
    call: dict[str, Any] = {name: arguments[name].to(DEVICE) for name in ("sample", "encoder_hidden_states")}
    cache = CacheConfig(**{"gpu" if DEVICE == "cuda" else "host": budget})
    unet, exact = (
        fisedit.compile(model, provider=provider, kv="auto", cache=cache, dense="eager"),
        compiled(model, provider),
    )
    if budget == 0:
        unet.tiers(call["sample"].device).__dict__["bandwidth"] = Bandwidth(1e3, 1e12) if DEVICE == "cuda" else None
        unet.tiers(call["sample"].device).pool.pin = False
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheSpaceWarning)
        base = recorded(unet, call)
        assert f"keys and values: {kv}, since keys and values take" in unet.inspect()
        if budget is None:
            assert same(edited(unet, call, base), edited(exact, call, recorded(exact, call)))
            with unet.record():  # one plan for calls of all sizes, which one recording may see
                unet(torch.cat([call["sample"]] * 2), 900, torch.cat([call["encoder_hidden_states"]] * 2))
            assert {program.kv for program in unet._live.programs.values()} == {"cached"}
            assert len(unet._live.programs) == 2 and unet.inspect().count("keys and values: cached") == 2
        elif budget:
            assert sizes(base)["keys"] < 0.5 * sizes(recorded(exact, call))["keys"]
