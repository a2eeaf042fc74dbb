"""How long each value of the step stage lives, and how much lives at once.

A *piece* is the memory that an op makes for one of its results. Views (reshapes, slices, parts of several results, ops
that hand back what they got) lie in a piece that was made before, and keep it. A piece lives from the op that makes it
to the last one that reads it, or a view of it; what the stage returns lives to the end. Inputs of the stage and weights
are not the stage's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from fisedit.passes.infer_shapes import Numbers, infer_shapes
from fisedit.passes.ir import fisedit, is_op

Piece = tuple[Node, int]
"""The op that makes it, and the number of the result."""
Span = tuple[int, int]
"""The first and the last place in the order of ops at which a piece lives."""
UNSEEN = (fisedit.table.default, fisedit.cache_load.default, fisedit.cache_view.default, fisedit.cache_store.default)
"""What ``lower`` makes inputs or outputs of."""


@dataclass(frozen=True)
class Memory:
    """The pieces of a step stage.

    Attributes:
        sizes: of all pieces, in bytes.
        shapes: shape and dtype of each result of each op, a piece or not.
        held: the pieces that the value of a node lies in; an op's own are among them.
    """

    sizes: Mapping[Piece, int]
    shapes: Mapping[tuple[Node, int], tuple[Any, ...]]
    held: Mapping[Node, frozenset[Piece]]

    def made(self, node: Node) -> list[Piece]:
        """The pieces that an op makes; none if it makes a view."""
        return sorted((piece for piece in self.held[node] if piece[0] is node), key=lambda piece: piece[1])

    def read(self, node: Node) -> set[Piece]:
        """The pieces that an op reads."""
        return {piece for source in node.all_input_nodes for piece in self.held.get(source, ())}


def is_step(node: Node) -> bool:
    """Whether a node is an op of the step stage."""
    return node.op == "call_function" and node.meta.get("stage", "step") == "step" and not is_op(node, *UNSEEN)


def order_of(graph: Graph) -> list[Node]:
    """The ops of the step stage in their order."""
    return [node for node in graph.nodes if is_step(node)]


def memory_of(graph: Graph, numbers: Numbers) -> Memory:
    """The pieces of an edit graph's step stage for given numbers of rows.

    Raises:
        UnknownShape: an op does not say what it gives.
    """
    values = infer_shapes(graph, numbers)
    pieces: dict[int, Piece | None] = {}  # by storage; None for inputs of the stage
    sizes: dict[Piece, int] = {}
    shapes: dict[tuple[Node, int], tuple[Any, ...]] = {}
    held: dict[Node, frozenset[Piece]] = {}
    for node in graph.nodes:
        lies_in: set[Piece] = set()
        for part, value in enumerate(pytree.tree_leaves(values[node])):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata not in pieces:
                pieces[storage._cdata] = (node, part) if is_step(node) else None
            if (piece := pieces[storage._cdata]) is not None:
                lies_in.add(piece)
                sizes[piece] = storage.nbytes()
            shapes[node, part] = (*value.shape, value.dtype)
        if is_step(node):
            held[node] = frozenset(lies_in)
    return Memory(sizes, shapes, held)


def spans(order: Sequence[Node], memory: Memory) -> dict[Piece, Span]:
    """From when to when each piece lives, if the ops run in this order."""
    first = {piece: place for place, node in enumerate(order) for piece in memory.made(node)}
    last = dict(first)
    for place, node in enumerate(order):
        for piece in memory.held[node] | memory.read(node):
            last[piece] = place
    for node in order:
        if any(user.op == "output" or is_op(user, fisedit.cache_store.default) for user in node.users):
            last.update(dict.fromkeys(memory.held[node], len(order)))
    return {piece: (start, last[piece]) for piece, start in first.items()}


def live_bytes(order: Sequence[Node], memory: Memory, lives: Mapping[Piece, Span]) -> list[int]:
    """How much lives while each op runs: what it reads, what it makes, and what is read later."""
    changes = [0] * (len(order) + 2)
    for piece, (start, end) in lives.items():
        changes[start] += memory.sizes[piece]
        changes[end + 1] -= memory.sizes[piece]
    return list(accumulate(changes[: len(order)]))
