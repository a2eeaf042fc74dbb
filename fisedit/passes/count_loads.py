"""Count the bytes of recorded values that one call of a fused edit graph reads where they lie."""

from __future__ import annotations

from torch.fx import Graph, Node

from fisedit.passes.fused import MULTIPLY
from fisedit.passes.ir import PRODUCTS, args, fisedit, is_op, rows_of, tensor
from fisedit.passes.layout import Level
from fisedit.runtime.plan import MaskPlan, Table


def count_loads(graph: Graph, plan: MaskPlan) -> int:
    """Bytes of halo rows, and of the keys and values of inactive positions, each counted once.

    Args:
        plan: the mask's tables; convolutions cut into rows.
    """
    return sum(_count(node, plan) for node in graph.nodes if node.op == "call_function")


def levels(graph: Graph) -> list[Level]:
    """The levels that have packed rows, largest first."""
    found = {rows.level for node in graph.nodes if (rows := rows_of(node)) is not None}
    return sorted(found, reverse=True)


def _count(node: Node, plan: MaskPlan) -> int:
    rows = rows_of(node)
    if is_op(node, fisedit.attend_rows.default):
        recorded = args(node)[3]
        assert rows is not None
        inactive = rows.level[0] * rows.level[1] - plan.rows(rows.level)
        read = isinstance(recorded, Node) and is_op(recorded, fisedit.cache_view.default)
        return 2 * rows.batch * inactive * rows.channels * tensor(node).element_size() if read else 0
    if not is_op(node, *PRODUCTS, fisedit.gather_patches.default):
        return 0
    first = list(MULTIPLY).index("recorded") if is_op(node, *PRODUCTS) else 1
    source, recorded, sources = args(node)[0], args(node)[first], args(node)[first + 1]
    if not isinstance(recorded, Node) or not is_op(recorded, fisedit.cache_view.default):
        return 0
    kind = rows_of(source)
    assert kind is not None
    halo = plan.table(Table("halo", sources.meta["table"].of))
    assert halo is not None
    return kind.batch * halo.shape[1] * kind.channels * _item_size(source)


def _item_size(node: Node) -> int:
    return tensor(node).element_size() if "val" in node.meta else 2
