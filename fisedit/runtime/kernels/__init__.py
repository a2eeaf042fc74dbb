"""Kernels by op and provider: ``kernels/<op>/<provider>.py`` holds a function named as the op.

Every op has a ``reference`` in plain PyTorch for any device, which is also its eager implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fisedit.runtime import ops
from fisedit.runtime.kernels.controlled_attention.reference import controlled_attention
from fisedit.runtime.kernels.gather_rows.reference import gather_rows
from fisedit.runtime.kernels.group_norm_rows.reference import group_norm_rows
from fisedit.runtime.kernels.group_norm_stats.reference import group_norm_stats
from fisedit.runtime.kernels.row_attention.reference import row_attention
from fisedit.runtime.kernels.scatter_rows.reference import scatter_rows
from fisedit.runtime.kernels.sparse_conv.reference import sparse_conv

PROVIDERS: dict[str, dict[str, Callable[..., Any]]] = {
    "reference": {
        "controlled_attention": controlled_attention,
        "gather_rows": gather_rows,
        "group_norm_rows": group_norm_rows,
        "group_norm_stats": group_norm_stats,
        "row_attention": row_attention,
        "scatter_rows": scatter_rows,
        "sparse_conv": sparse_conv,
    },
}

for _name, _kernel in PROVIDERS["reference"].items():
    ops.library.impl(_name, _kernel, "CompositeExplicitAutograd")


def find(target: Any, provider: str) -> Callable[..., Any] | None:
    """The kernel of ``provider`` for a graph target; ``None`` where the target is not a ``fisedit`` op.

    Raises:
        KeyError: the provider has no kernel for this op, or the op is structural and should be gone by now.
    """
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "fisedit":
        return None
    return PROVIDERS[provider][target._schema.name.removeprefix("fisedit::")]
