"""The graph's types: what each node's metadata says, how a graph is verified, and how it prints.

The IR is a ``torch.fx`` graph of ATen ops plus the ops of namespace ``fisedit``. Every node says in ``node.meta``:

- ``layout``  (:class:`~fisedit.passes.layout.Layout`): a dense value with one row per position of a level;
- ``rows``    (:class:`Rows`): a packed value ``[B, N, C]``, the active rows of a level;
- ``origin``  (str): the node of the captured graph that it computes (names cache slots, and provenance);
- ``island``  (str): why this op stays dense (shown by ``inspect``);
- ``table`` (:class:`~fisedit.runtime.plan.Table`): what a ``fisedit::table`` node refers to;
- ``recorded`` (tensor without data): shape and dtype of the slot that a ``cache_load`` or ``cache_view`` reads;
- ``stage``   (str): at which rhythm it runs (``hoist_step_invariant``); ``buffer``: where it lies (``plan_memory``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fisedit.passes.layout import Layout, Level
from fisedit.runtime import ops as _schemas  # noqa: F401  (defines torch.ops.fisedit)

aten = torch.ops.aten
fisedit = torch.ops.fisedit
PRODUCTS = (fisedit.multiply_rows.default, fisedit.multiply_norm_rows.default, fisedit.multiply_attend_rows.default)
"""Products of rows: their arguments but for the keywords are the same."""


@dataclass(frozen=True)
class Rows:
    """The type of a packed value ``[batch, N(level), channels]``."""

    level: Level
    batch: int
    channels: int

    @staticmethod
    def of(layout: Layout) -> Rows:
        return Rows(layout.level, layout.batch, layout.channels)

    def __str__(self) -> str:
        return f"rows[{self.batch}, N({self.level[0]}x{self.level[1]}), {self.channels}]"


class IllegalGraph(AssertionError):
    """A graph broke a rule of the IR; raised by :func:`verify`, a bug of ours."""


def layout_of(value: Any) -> Layout | None:
    return value.meta.get("layout") if isinstance(value, Node) else None


def rows_of(value: Any) -> Rows | None:
    return value.meta.get("rows") if isinstance(value, Node) else None


def tensor(node: Node) -> torch.Tensor:
    """The fake tensor of a captured node (shape and dtype only)."""
    return node.meta["val"]


def args(node: Node) -> tuple[Any, ...]:
    """``node.args``, typed as what passes know them to be."""
    return node.args


def is_op(value: Any, *targets: Any) -> bool:
    return isinstance(value, Node) and value.op == "call_function" and value.target in targets


def bound_arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen call by schema name, defaults filled in."""
    bound = {}
    target: Any = node.target
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[i]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound


def copy_graph(graph: Graph) -> Graph:
    """A copy whose nodes remember, as ``origin``, the node they came from."""
    copy = Graph()
    mapping: dict[Node, Node] = {}
    for node in graph.nodes:
        new = copy.node_copy(node, lambda n: mapping[n])
        new.meta.setdefault("origin", node.name)
        mapping[node] = new
    return copy


def verify(graph: Graph) -> None:
    """Check that every op gets the kind of value it takes.

    Raises:
        IllegalGraph: rows and dense values mixed, or rows of two levels combined.
    """
    for node in graph.nodes:
        if node.op != "call_function" or "rows" not in node.meta and not _is_sparse(node):
            continue
        types = {rows_of(arg) for arg in node.all_input_nodes} - {None}
        if len({t.level for t in types if t}) > 1 and not _changes_level(node):
            raise IllegalGraph(f"{node.format_node()}: combines rows of several levels {sorted(map(str, types))}")
        for arg in node.all_input_nodes:
            if layout_of(arg) is not None and rows_of(arg) is None and not _takes_dense(node):
                raise IllegalGraph(f"{node.format_node()}: takes dense {arg.name} where rows are expected")


def _is_sparse(node: Node) -> bool:
    return str(node.target).startswith("fisedit.")


def _takes_dense(node: Node) -> bool:
    return is_op(node, fisedit.pack.default, fisedit.halo.default, fisedit.recorded.default,
                 fisedit.cache_store.default) or node.meta.get("converts", False)  # fmt: skip


def _changes_level(node: Node) -> bool:
    return is_op(node, fisedit.sparse_conv.default, fisedit.gather_rows.default, fisedit.gather_patches.default,
                 *PRODUCTS)  # fmt: skip


def print_graph(graph: Graph) -> str:
    """The graph as readable text, one op a line, with types and the module each op came from."""
    lines = []
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "output":
            lines.append(f"return {_show(node.args[0])}")
            continue
        head = f"%{node.name}: {_type(node)} = "
        if node.op == "placeholder":
            lines.append(head + "input")
            continue
        arguments = [_show(a) for a in node.args] + [f"{k}={_show(v)}" for k, v in node.kwargs.items()]
        target = str(node.target).removesuffix(".default") if node.op == "call_function" else str(node.target)
        lines.append(head + f"{target}({', '.join(arguments)}){_provenance(node)}")
    return "\n".join(lines) + "\n"


def _type(node: Node) -> str:
    if (rows := rows_of(node)) is not None:
        return str(rows)
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        kind = "map" if layout_of(node) is not None else "tensor"
        return f"{kind}{list(value.shape)}"
    return "tensor"


def _show(value: Any) -> str:
    if isinstance(value, Node):
        return ("@" + str(value.target).removeprefix("model.")) if value.op == "get_attr" else "%" + value.name
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_show, value)) + "]"
    return repr(value)


def _provenance(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    notes = [path] if path else []
    if "island" in node.meta:
        notes.append(f"dense island: {node.meta['island']}")
    if "provider" in node.meta:
        notes.append(f"provider {node.meta['provider']}")
    if "buffer" in node.meta:
        notes.append(f"buffer {node.meta['buffer']}")
    return f"  # {', '.join(notes)}" if notes else ""


def module_path(node: Node) -> str:
    """The dotted path of the ``nn.Module`` whose code made ``node``, or ``""``."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""
