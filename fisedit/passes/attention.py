"""Recognize ``scaled_dot_product_attention`` over positions, whatever the layout of its heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fisedit.passes.ir import bound_arguments, layout_of, tensor
from fisedit.passes.layout import Kind, Layout, LayoutError


@dataclass(frozen=True)
class Attention:
    """Attention whose queries are positions. ``over_positions``: keys and values are too (self-attention)."""

    query: Node
    key: Node
    value: Node
    mask: Node | None
    heads: int
    scale: float | None
    over_positions: bool


def match_attention(node: Node) -> Attention:
    """Read an ``aten.scaled_dot_product_attention`` node.

    Raises:
        LayoutError: masked self-attention, causal or dropout attention, or heads in an unknown place.
    """
    bound = bound_arguments(node)
    query, key, value, mask = (bound[name] for name in ("query", "key", "value", "attn_mask"))
    if bound["is_causal"] or bound["dropout_p"] or bound.get("enable_gqa"):
        raise LayoutError("causal, dropout or grouped-query attention")
    layout = layout_of(query)
    if layout is None:
        raise LayoutError("positions are not the queries")
    key_layout, value_layout = layout_of(key), layout_of(value)
    if (key_layout is None) != (value_layout is None):
        raise LayoutError("only one of key and value has positions")
    over_positions = key_layout is not None
    if key_layout is not None and (mask is not None or not layout.same_rows(key_layout)):
        raise LayoutError("masked self-attention" if mask is not None else "keys of another level")
    if mask is not None and not _mask_ignores_queries(mask, tensor(query).dim()):
        raise LayoutError("an attention mask that differs between queries")
    return Attention(query, key, value, mask, _heads(layout), bound["scale"], over_positions)


def _heads(layout: Layout) -> int:
    """Heads of a query ``[B, h, N, d]``, ``[B*h, N, d]`` or ``[B, N, d]``."""
    *lead, positions, width = layout.dims
    kinds = [atom.kind for dim in lead for atom in dim]
    if not all(atom.spatial for atom in positions) or any(atom.kind is not Kind.OTHER for atom in width):
        raise LayoutError(f"queries laid out as {layout}")
    if kinds != sorted(kinds, key=lambda kind: kind is Kind.OTHER) or Kind.Y in kinds:
        raise LayoutError(f"heads before the batch in {layout}")
    return math.prod(atom.size for dim in lead for atom in dim if atom.kind is Kind.OTHER)


def _mask_ignores_queries(mask: Any, rank: int) -> bool:
    shape = tensor(mask).shape
    return layout_of(mask) is None and (len(shape) < 2 or int(shape[-2]) == 1) and len(shape) <= rank
