"""Shapes of all values of an edit graph under a mask: the graph run on tensors without data.

Views are views there too: two values with one storage lie in the same memory when the graph runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from fisedit.passes.ir import args, fisedit, is_op
from fisedit.passes.layout import Level
from fisedit.runtime.geometry import ConvGeometry
from fisedit.runtime.plan import Table
from fisedit.runtime.row_plan import LOCKS


class UnknownShape(ValueError):
    """An op cannot be run on tensors without data."""

    def __init__(self, node: Node, error: Exception) -> None:
        super().__init__(f"the shape of {node.name} is unknown: {error}")
        self.node = node


@dataclass(frozen=True)
class Numbers:
    """How many rows there are under a mask: N of each level; of halos, which only the mask knows, the most."""

    active: Mapping[Level, int]

    def rows(self, level: Level) -> int:
        return self.active[level]

    def halo(self, geometry: ConvGeometry) -> int:
        inactive = math.prod(geometry.source) - self.rows(geometry.source)
        return min(inactive, self.rows(geometry.target) * math.prod(geometry.block((1, 1))))

    def full(self, level: Level) -> bool:
        """Whether all positions are active: taken to be so where there are rows for all of them."""
        return self.rows(level) == math.prod(level)


@dataclass(frozen=True)
class SomeNumbers(Numbers):
    """Numbers that nothing else has, none of them full: what has the same shape with these has it under every mask."""

    active: Mapping[Level, int] = field(default_factory=dict)
    given: dict[Any, int] = field(default_factory=dict)
    unused: count[int] = field(default_factory=lambda: count(1_000_003))

    def rows(self, level: Level) -> int:
        return self._number(level)

    def halo(self, geometry: ConvGeometry) -> int:
        return self._number(geometry)

    def _number(self, of: Any) -> int:
        if of not in self.given:
            self.given[of] = next(self.unused)
        return self.given[of]

    def full(self, level: Level) -> bool:
        return False

    def few(self, rows: int) -> bool:
        return True


def infer_shapes(graph: Graph, numbers: Numbers) -> dict[Node, Any]:
    """What each node gives, as tensors on the meta device.

    Args:
        graph: an edit graph before it is cut into stages.
    Raises:
        UnknownShape: an op does not say what it would give.
    """
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            try:
                values[node] = _value(graph, node, values, numbers)
            except Exception as error:
                raise UnknownShape(node, error) from error
    return values


def _value(graph: Graph, node: Node, values: Mapping[Node, Any], numbers: Numbers) -> Any:
    if node.op == "placeholder":
        return _meta(node.meta.get("val"))
    if node.op == "get_attr":
        return _meta(reduce(getattr, str(node.target).split("."), graph.owning_module))
    if is_op(node, fisedit.table.default):
        return _table(node.meta["table"], numbers)
    if is_op(node, fisedit.cache_view.default):
        return _meta(node.meta["recorded"])
    if is_op(node, fisedit.cache_load.default):
        batch, *rows = node.meta["recorded"].shape
        index = args(node)[1] if len(node.args) > 1 else None
        if isinstance(index, Node):
            rows[0] = values[index].shape[1]
        return torch.empty(batch, *rows, dtype=node.meta["recorded"].dtype, device="meta")
    if node.op == "output" or is_op(node, fisedit.cache_store.default):
        return None
    given, named = pytree.tree_map(lambda value: _given(value, values), (node.args, node.kwargs))
    return _call(node, given, named, numbers)


def _given(value: Any, values: Mapping[Node, Any]) -> Any:
    if isinstance(value, Node):
        return values[value]
    return torch.device("meta") if isinstance(value, torch.device) else value


def _call(node: Node, given: Any, named: Any, numbers: Numbers) -> Any:
    """The result of an op; numbers and flags of a level decide whether some make new rows or hand back others."""
    if is_op(node, fisedit.renew_affine.default) and not given[3]:
        return given[2]
    if is_op(node, fisedit.normalize_rows.default) and given[5]:
        return given[0]
    assert callable(node.target)
    made = node.target(*given, **named)
    if is_op(node, fisedit.multiply_norm_rows.default):
        return (made[0], made[0], made[2]) if named.get("norm_moments") or named.get("norm_full") else made
    return made


def _meta(value: Any) -> Any:
    """A tensor without data of the same shape, strides and dtype; what is no tensor as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _table(key: Table, numbers: Numbers) -> Any:
    of = key.of
    if isinstance(of, ConvGeometry):
        rows, block = numbers.rows(of.target), of.block((1, 1))
        shapes = {"halo": (1, numbers.halo(of)), "neighbors": (1, rows, *block), "outputs": (1, rows)}
        sources = (1, rows, math.prod(of.kernel))
        return torch.empty(shapes.get(key.kind, sources), dtype=torch.int64, device="meta")
    if key.kind in ("full", "partial"):
        return numbers.full(of) == (key.kind == "full")
    shape = {"active": (1, numbers.rows(of)), "keys": (1, math.prod(of)), "locks": (LOCKS,)}.get(key.kind, (1,))
    return torch.empty(shape, dtype=torch.int64, device="meta")
