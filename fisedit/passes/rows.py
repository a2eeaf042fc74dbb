"""How passes put an op on packed rows: wrap it as ``unpack(op(pack(inputs)))``.

Every pass that understands an op wraps it this way; ``eliminate_repacking`` then cancels ``pack(unpack(rows))``, and
what is left between an ``unpack`` and a ``pack`` is a dense island. So no pass needs to know its neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, Node

from fisedit.passes.ir import Rows, aten, fisedit, layout_of, tensor
from fisedit.passes.layout import Dim, Kind, Layout, LayoutError
from fisedit.runtime.plan import Table


def pack(graph: Graph, dense: Node, layout: Layout | None = None) -> Node:
    """The active rows ``[B, N, C]`` of ``dense``: one node per value, placed right after it."""
    layout = layout or layout_of(dense)
    assert layout is not None
    for user in dense.users:
        if user.target is fisedit.pack.default:
            return user
    with graph.inserting_after(dense):
        node = graph.call_function(fisedit.pack.default, (dense,))
    node.meta = {"rows": Rows.of(layout), "packs": layout}
    return node


def replace(graph: Graph, node: Node, rows: Node) -> None:
    """Put ``unpack(rows)`` in the place of dense ``node`` and erase it."""
    layout = layout_of(node)
    assert layout is not None
    keep: dict[str, Any] = {k: node.meta[k] for k in ("nn_module_stack", "origin", "val") if k in node.meta}
    rows.meta = {**keep, **rows.meta, "rows": Rows.of(layout)}
    unpack = graph.call_function(fisedit.unpack.default, (rows,))
    unpack.meta = {**keep, "layout": layout}
    node.replace_all_uses_with(unpack)
    graph.erase_node(node)


def call(graph: Graph, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None,
         rows: Rows | None = None) -> Node:  # fmt: skip
    """A call node, typed as rows where ``rows`` is given."""
    node = graph.call_function(target, tuple(args), kwargs or {})
    if rows is not None:
        node.meta["rows"] = rows
    return node


def table(graph: Graph, key: Table) -> Node:
    """The index table ``key`` (see ``runtime/plan.py``) of the current mask."""
    node = graph.call_function(fisedit.table.default, (str(key),))
    node.meta["table"] = key
    return node


def store(graph: Graph, value: Node, slot: str, kind: Rows | None = None) -> None:
    """Keep ``value`` in the cache slot ``slot``; ``kind`` is given where it holds rows."""
    node = graph.call_function(fisedit.cache_store.default, (value, slot))
    node.meta["table"] = Table("active", kind.level) if kind is not None else None
    if kind is not None:
        node.meta["stores"] = kind


def reshape(graph: Graph, node: Node, shape: Sequence[int]) -> Node:
    return graph.call_function(aten.reshape.default, (node, list(shape)))


def permute(graph: Graph, node: Node, order: Sequence[int]) -> Node:
    if list(order) == list(range(len(order))):
        return node
    return graph.call_function(aten.permute.default, (node, list(order)))


def _rows_order(layout: Layout) -> list[int]:
    """The order of atoms in rows form: batch, positions, channels."""
    rank = {Kind.BATCH: 0, Kind.Y: 1, Kind.X: 1, Kind.OTHER: 2}
    return sorted(range(len(layout.atoms)), key=lambda i: rank[layout.atoms[i].kind])


def dense_to_rows(graph: Graph, dense: Node, layout: Layout) -> Node:
    """All rows ``[B, R, C]`` of a dense value, as views where strides allow."""
    rows = reshape(graph, dense, [atom.size for atom in layout.atoms])
    rows = permute(graph, rows, _rows_order(layout))
    rows = reshape(graph, rows, [layout.batch, layout.level[0] * layout.level[1], layout.channels])
    rows.meta["converts"] = True
    return rows


def rows_to_dense(graph: Graph, rows: Node, layout: Layout) -> Node:
    """The dense value of all rows ``[B, R, C]``: the inverse of :func:`dense_to_rows`."""
    order = _rows_order(layout)
    dense = reshape(graph, rows, [layout.atoms[i].size for i in order])
    dense = permute(graph, dense, [order.index(i) for i in range(len(order))])
    return reshape(graph, dense, layout.shape)


def broadcast_to_rows(graph: Graph, value: Node, layout: Layout) -> Node:
    """A value without positions, shaped to broadcast over the rows ``[B, N, C]`` of ``layout``.

    Raises:
        LayoutError: it broadcasts over a part of a merged dimension.
    """
    sizes = [int(s) for s in tensor(value).shape]
    sizes = [1] * (len(layout.dims) - len(sizes)) + sizes
    atom_sizes: list[int] = []
    for dim, size in zip(layout.dims, sizes, strict=True):
        atom_sizes += _operand_atoms(dim, size)
    full = dict(zip(range(len(atom_sizes)), atom_sizes, strict=True))
    channels = [i for i, atom in enumerate(layout.atoms) if atom.kind is Kind.OTHER]
    present = [full[i] > 1 for i in channels]
    if all(size == 1 for size in sizes):
        return value if not sizes or tensor(value).dim() <= 3 else reshape(graph, value, [1, 1, 1])
    out = reshape(graph, value, atom_sizes)
    if any(present) and not all(p or layout.atoms[i].size == 1 for p, i in zip(present, channels, strict=True)):
        target = [layout.atoms[i].size if i in channels else full[i] for i in range(len(atom_sizes))]
        out = graph.call_function(aten.expand.default, (out, target))
        atom_sizes = target
    out = permute(graph, out, _rows_order(layout))
    batch = 1
    for i, atom in enumerate(layout.atoms):
        batch *= atom_sizes[i] if atom.kind is Kind.BATCH else 1
    return reshape(graph, out, [batch, 1, layout.channels if any(present) else 1])


def _operand_atoms(dim: Dim, size: int) -> list[int]:
    if size == 1:
        return [1] * len(dim)
    if any(atom.spatial for atom in dim):
        raise LayoutError("an operand with a value per position")
    return [atom.size for atom in dim]
