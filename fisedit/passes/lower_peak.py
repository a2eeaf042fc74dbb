"""Move ops of the step stage to where less lives at once.

What lives idle while most is alive either need not be there yet, or need not be there any more:

- an op is *put off* to just before its first reader, if what it reads lives that long anyway;
- the last reader of a value is *moved up*, to right behind the reader before it, if it gives less than it frees.

Both are done only as long as the peak falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch.fx import Graph, Node

from fisedit.passes.fused import hoist
from fisedit.passes.hoist_step_invariant import RANDOM
from fisedit.passes.ir import PRODUCTS, fisedit, is_op
from fisedit.passes.lifetimes import Memory, Piece, Span, live_bytes, order_of, spans

STAY = (*PRODUCTS, fisedit.attend_rows.default)
"""In the order of the model: a profile reads like it."""


def lower_peak(graph: Graph, memory: Memory) -> int:
    """Move ops of ``graph``; the number of moves."""
    state, moves = Order(order_of(graph), memory), list[Move]()
    lowest, kept = state.peak, 0
    while (found := _improve(state)) is not None:
        move, state = found
        moves.append(move)
        if state.peak < lowest:
            lowest, kept = state.peak, len(moves)
    for move in moves[:kept]:
        if move.up:
            hoist(graph, move.nodes, move.before)  # with their tables and weights
        else:
            for node in move.nodes:
                move.before.prepend(node)
    return kept


@dataclass(frozen=True)
class Move:
    """Ops that are put before another, in their order."""

    nodes: list[Node]
    before: Node
    up: bool


@dataclass(frozen=True)
class Order:
    """An order of the step stage's ops, and what lives when."""

    nodes: list[Node]
    memory: Memory

    @cached_property
    def place(self) -> dict[Node, int]:
        return {node: place for place, node in enumerate(self.nodes)}

    @cached_property
    def lives(self) -> dict[Piece, Span]:
        return spans(self.nodes, self.memory)

    @cached_property
    def live(self) -> list[int]:
        return live_bytes(self.nodes, self.memory, self.lives)

    @property
    def peak(self) -> int:
        return max(self.live, default=0)

    def after(self, move: Move) -> Order:
        rest = [node for node in self.nodes if node not in move.nodes]
        place = rest.index(move.before)
        return Order([*rest[:place], *move.nodes, *rest[place:]], self.memory)

    def is_view(self, node: Node, pieces: set[Piece]) -> bool:
        """Whether a node is nothing but another view of any of ``pieces``."""
        return bool(self.memory.held[node] & pieces) and not self.memory.made(node)

    def readers(self, pieces: set[Piece]) -> list[int]:
        """The places of the ops that read any of ``pieces``, views of them aside."""
        return [p for p, n in enumerate(self.nodes) if pieces & self.memory.read(n) and not self.is_view(n, pieces)]


def _improve(order: Order) -> tuple[Move, Order] | None:
    """A move after which less lives in sum, and at no moment more than at the peak before."""
    if not order.nodes:
        return None
    peak = order.live.index(order.peak)
    read = order.memory.read(order.nodes[peak])
    idle = [piece for piece, (start, end) in order.lives.items() if start < peak < end and piece not in read]
    for piece in sorted(idle, key=lambda piece: (-order.memory.sizes[piece], order.lives[piece])):
        for find in (_put_off, _move_up):
            move = find(order, piece, peak)
            if move is None:
                continue
            moved = order.after(move)
            if moved.peak <= order.peak and sum(moved.live) < sum(order.live):
                return move, moved
    return None


def _put_off(order: Order, piece: Piece, peak: int) -> Move | None:
    """The op that makes a piece, behind the peak."""
    node, memory = piece[0], order.memory
    pieces = set(memory.made(node))
    readers = order.readers(pieces)
    if not readers or readers[0] <= peak or not _movable(node):
        return None
    if any(order.lives[read][1] < readers[0] for read in memory.read(node)):
        return None
    between = order.nodes[order.place[node] + 1 : readers[0]]
    if any(other.is_impure() for other in between):
        return None
    views = [other for other in between if order.is_view(other, pieces)]
    return Move([node, *views], order.nodes[readers[0]], up=False)


def _move_up(order: Order, piece: Piece, peak: int) -> Move | None:
    """The last reader of a piece, before the peak."""
    readers = order.readers({piece})
    last = order.lives[piece][1]
    if not readers or readers[-1] != last or (len(readers) > 1 and readers[-2] >= peak):
        return None
    reader = order.nodes[last]
    views, sources = _views_before(order, reader)
    start = max([order.place[source] for source in sources] + readers[:-1])
    between = order.nodes[start + 1 : last]
    if start >= peak or not _movable(reader) or any(other.is_impure() for other in between):
        return None
    nodes = [*(other for other in between if other in views), reader]
    return Move(nodes, next(other for other in between if other not in views), up=True)


def _views_before(order: Order, node: Node) -> tuple[set[Node], set[Node]]:
    """The views that an op reads, and the ops that made what it reads."""
    views, sources, stack = set[Node](), set[Node](), [*node.all_input_nodes]
    while stack:
        source = stack.pop()
        if source not in order.place or source in views | sources:
            continue
        if order.memory.made(source) or not order.memory.held[source]:
            sources.add(source)
        else:
            views.add(source)
            stack += source.all_input_nodes
    return views, sources


def _movable(node: Node) -> bool:
    return not is_op(node, *STAY, *RANDOM) and not node.is_impure()
