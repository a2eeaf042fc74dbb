"""Kernels by op and provider: ``kernels/<op>/<provider>.py`` holds a function named as the op.

Every op has a ``reference`` in plain PyTorch for any device, which is also its eager implementation. ``triton`` has the
fused ops of a GPU; what it lacks is the reference's.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from fisedit.runtime import ops

PROVIDERS: dict[str, tuple[str, ...]] = {
    "reference": tuple(name for name in ops.SCHEMAS if name not in ops.STRUCTURAL),
    "triton": (
        "attend_rows", "fold_group_norms", "gather_patches", "gather_rows", "layer_norm_rows",
        "multiply_attend_rows", "multiply_norm_rows", "multiply_rows", "normalize_rows", "renew_affine",
        "scatter_rows",
    ),
}  # fmt: skip

TUNED = {
    ("attend_rows", "triton"): "fisedit.runtime.tuning.attend_rows",
    ("multiply_rows", "triton"): "fisedit.runtime.tuning.multiply_rows",
    ("multiply_norm_rows", "triton"): "fisedit.runtime.tuning.multiply_rows",
    ("multiply_attend_rows", "triton"): "fisedit.runtime.tuning.multiply_rows",
}
"""Where ops are that choose among kernels."""


@cache
def _load(op: str, provider: str) -> Callable[..., Any]:
    module = TUNED.get((op, provider), f"fisedit.runtime.kernels.{op}.{provider}")
    return getattr(importlib.import_module(module), op)


for _name in PROVIDERS["reference"]:
    ops.namespace.impl(_name, _load(_name, "reference"), "CompositeExplicitAutograd")


def choose_provider(provider: str, device: torch.device) -> str:
    """``"auto"`` is Triton on a GPU that has it, else the reference."""
    if provider != "auto":
        return provider
    return "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "reference"


def find(target: Any, provider: str) -> tuple[str, Callable[..., Any]] | None:
    """The kernel for a graph target, and whose it is; ``None`` where the target is not a ``fisedit`` op.

    Raises:
        KeyError: the op is structural and should be gone by now.
    """
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "fisedit":
        return None
    name = target._schema.name.removeprefix("fisedit::")
    if name in ops.STRUCTURAL:
        raise KeyError(name)
    whose = provider if name in PROVIDERS[provider] else "reference"
    return whose, _load(name, whose)
