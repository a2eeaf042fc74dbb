from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def multiply_attend_rows(*product: Any, key: Tensor, value: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """A product of rows whose results attend to a text.

    Args:
        product: the arguments of ``multiply_rows``, by position.
        key, value, heads, scale: of the text, ``[B, L, h*d]``, as ``attend_rows`` takes them; made before any kernel
            of the same graph runs.
    Returns:
        ``[B, N', h*d]``.
    """
    ops = torch.ops.fisedit
    names = [argument.name for argument in ops.multiply_rows.default._schema.arguments]
    count, locks = (product[names.index(name)] for name in ("count", "locks"))
    queries = ops.multiply_rows(*product)
    return ops.attend_rows(queries, key, value, None, None, None, count, None, locks, heads, scale)
