"""How each recorded value is read: which tier it belongs on, and what of it an edit has to fetch."""

from __future__ import annotations

from torch.fx import Graph, Node

from fisedit.passes.fused import MULTIPLY
from fisedit.passes.ir import PRODUCTS, args, fisedit, is_op
from fisedit.runtime.cache.block import Use
from fisedit.runtime.geometry import ConvGeometry
from fisedit.runtime.plan import Table

STATISTICS = ("mean:", "rstd:")


def slot_uses(edit: Graph, detect: Graph) -> dict[str, Use]:
    """The use of every slot that an edit graph or a detect graph loads. What both load is the edit's."""
    uses: dict[str, Use] = {slot: Use("queries") for slot, _ in _reads(detect)}
    for slot in {slot for slot, _ in _reads(edit)}:
        uses[slot] = _use(slot, [table for read, table in _reads(edit) if read == slot])
    return uses


def _use(slot: str, tables: list[Table | None]) -> Use:
    if slot.startswith(STATISTICS):
        return Use("small")
    geometries = tuple(dict.fromkeys(table.of for table in tables if table and isinstance(table.of, ConvGeometry)))
    return Use("maps" if geometries and None not in tables else "keys", geometries)


def _reads(graph: Graph) -> list[tuple[str, Table | None]]:
    """Each read of a slot, with the table of a convolution that says which rows; ``None`` if all are read."""
    reads: list[tuple[str, Table | None]] = []
    for node in graph.nodes:
        if is_op(node, fisedit.cache_load.default):
            index = args(node)[1] if len(node.args) > 1 else None
            table = index.meta["table"] if isinstance(index, Node) else None
            reads.append((str(args(node)[0]), table if table is not None and table.kind == "halo" else None))
        elif is_op(node, fisedit.cache_view.default):
            reads += [(str(args(node)[0]), _sources(node, user)) for user in node.users]
    return reads


def _sources(view: Node, user: Node) -> Table | None:
    """The table by which ``user`` reads the recorded map ``view`` as the input of a convolution."""
    if is_op(user, *PRODUCTS):
        recorded = list(MULTIPLY).index("recorded")
    elif is_op(user, fisedit.gather_patches.default):
        recorded = 1
    else:
        return None
    if args(user)[recorded] is not view:
        return None
    blocks = user.kwargs.get("block_sources")  # which read all that the nine taps read, and more
    table = blocks if isinstance(blocks, Node) else args(user)[recorded + 1]
    return table.meta["table"]
