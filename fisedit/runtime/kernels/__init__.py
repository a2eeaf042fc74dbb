"""Kernels by op and provider: ``kernels/<op>/<provider>.py`` holds a function named as the op.

Every op has a ``reference`` in plain PyTorch for any device, which is also its eager implementation. ``triton`` has the
fused ops of a GPU; what it lacks is the reference's.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from functools import cache
from shutil import which
from subprocess import SubprocessError
from typing import Any

import torch

from fisedit.errors import UnavailableProviderError
from fisedit.runtime import ops
from fisedit.warnings import NotFusedWarning, warn

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
NOT_INSTALLED = "Triton is not installed (pip install triton)"
NEEDED = "Triton needs a C compiler and Python's headers (on Debian the packages gcc and python3-dev)"


@cache
def _load(op: str, provider: str) -> Callable[..., Any]:
    module = TUNED.get((op, provider), f"fisedit.runtime.kernels.{op}.{provider}")
    return getattr(importlib.import_module(module), op)


for _name in PROVIDERS["reference"]:
    ops.namespace.impl(_name, _load(_name, "reference"), "CompositeExplicitAutograd")


def choose_provider(provider: str, device: torch.device) -> str:
    """``"auto"`` is Triton on a GPU where it can launch kernels, else the reference.

    Raises:
        UnavailableProviderError: Triton was asked for, and cannot.
    """
    if device.type != "cuda" or provider == "reference":
        return "reference" if provider == "auto" else provider
    reason = why_not_triton()
    if reason is not None and provider == "triton":
        raise UnavailableProviderError(provider=provider, reason=reason)
    return "triton" if reason is None else _fall_back(reason)


def check_launches(provider: str, device: torch.device) -> None:
    """Refuse a call on a device for which kernels were asked for that it cannot run, before anything is recorded.

    Raises:
        UnavailableProviderError: Triton was asked for, the device is no GPU, and kernels are not interpreted.
    """
    if provider != "triton" or device.type == "cuda":
        return
    if importlib.util.find_spec("triton") is None:
        raise UnavailableProviderError(provider=provider, reason=NOT_INSTALLED)
    import triton

    if not triton.knobs.runtime.interpret:
        reason = (
            f"they are for GPUs of NVIDIA, and the call is on the device {device.type!r} "
            "(TRITON_INTERPRET=1 in the environment that Python starts in has them interpreted, slowly)"
        )
        raise UnavailableProviderError(provider=provider, reason=reason)


@cache
def _fall_back(reason: str) -> str:
    """The provider instead of Triton, with one warning."""
    warn(
        f"Edits run by plain PyTorch, much slower than by our kernels, which cannot run here: {reason}.",
        NotFusedWarning,
    )
    return "reference"


@cache
def why_not_triton() -> str | None:
    """Why our kernels cannot be launched on this machine's GPU; ``None`` if they can.

    What launches them is C. Triton compiles it when it is needed first, up to 3.6 for each kind of arguments, and keeps
    it.
    """
    if torch.version.hip is not None:
        return "they are written for GPUs of NVIDIA, and were never run on others"
    if importlib.util.find_spec("triton") is None:
        return NOT_INSTALLED
    import triton
    from triton.runtime import driver

    if re.match(r"3\.[0-6]\.", triton.__version__) and not (os.environ.get("CC") or any(map(which, ("gcc", "clang")))):
        return f"there is no C compiler; {NEEDED}"
    try:
        _ = driver.active.utils
    except (RuntimeError, OSError, ImportError, SubprocessError) as error:
        told = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(". ")
        return f"Triton's driver failed ({told}); {NEEDED}"
    return None


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
