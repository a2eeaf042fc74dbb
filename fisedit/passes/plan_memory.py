"""Order the ops of the step stage so that less lives at once, and number the buffers that their results lie in.

Runs last. The runtime needs no buffers of ours: the code of a stage drops each value after its last use, and a captured
CUDA graph's memory is taken again by what comes later. So the order decides how much a call takes; buffers say, for
reading and for predicting, who takes over whose place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.infer_shapes import Numbers, SomeNumbers, UnknownShape
from fisedit.passes.ir import fisedit, is_op, rows_of
from fisedit.passes.layout import Level
from fisedit.passes.lifetimes import Memory, Piece, Span, live_bytes, memory_of, order_of, spans
from fisedit.passes.lower_peak import lower_peak


def plan_memory(gm: GraphModule) -> PassResult:
    """``matched`` counts the values that take over the buffer of a dead one.

    ``meta["buffer"]`` of an op is the number of its result's buffer, shared by values of one shape whatever the mask,
    whose lives do not overlap; a tuple for an op with several results, ``None`` for those that are views.
    """
    graph = gm.graph
    graph.eliminate_dead_code()
    try:
        every, some = (memory_of(graph, numbers) for numbers in (all_rows(graph), SomeNumbers()))
    except UnknownShape as error:
        return PassResult(0, (Refusal(error.node.name, str(error)),))
    memory = _of_both(every, some)
    lower_peak(graph, memory)
    order = order_of(graph)
    buffers = _share(spans(order, memory), memory.shapes)
    for node in order:
        node.meta.pop("buffer", None)
        if made := memory.made(node):
            numbers = {part: buffers[node, part] for _, part in made}
            parts = max(numbers) + 1
            node.meta["buffer"] = numbers[0] if parts == 1 else tuple(numbers.get(part) for part in range(parts))
    return PassResult(len(buffers) - len(set(buffers.values())))


def predict_peak(graph: Graph, rows: Mapping[Level, int], workspaces: Mapping[Node, int] | None = None) -> int:
    """Bytes of the values that live at once, at most, while the step stage runs with so many rows of each level.

    Counted are values between ops, and what ops need while they run as far as ``workspaces`` says: not the stage's
    inputs, and no rounding of an allocator. Where only the mask knows a number (halos), it is the largest possible; a
    level of which there are all rows is taken to be active everywhere.

    Raises:
        UnknownShape: an op does not say what it gives.
    """
    return _peak(graph, memory_of(graph, Numbers(rows)), workspaces or {})


def _peak(graph: Graph, memory: Memory, workspaces: Mapping[Node, int]) -> int:
    order = order_of(graph)
    live = live_bytes(order, memory, spans(order, memory))
    return max((size + workspaces.get(node, 0) for node, size in zip(order, live, strict=True)), default=0)


def planned_bytes(graph: Graph, rows: Mapping[Level, int]) -> int:
    """Bytes of all buffers of a planned graph, each as large as its largest value; see :func:`predict_peak`."""
    memory, sizes = memory_of(graph, Numbers(rows)), dict[object, int]()
    for piece, size in memory.sizes.items():
        number = buffer_of(piece)
        buffer = piece if number is None else number
        sizes[buffer] = max(size, sizes.get(buffer, 0))
    return sum(sizes.values())


def memory_line(graph: Graph) -> str:
    """What a call takes with all rows active, the most that any does, for ``inspect``."""
    try:
        memory = memory_of(graph, all_rows(graph))
    except UnknownShape as error:
        return f"memory of a call: not planned ({error})"
    values, buffers = len(memory.sizes), len({buffer_of(piece) for piece in memory.sizes})
    peak = f"{_peak(graph, memory, {}) / 2**20:.2f} MiB"
    return f"memory of a call with all rows active: {values} values in {buffers} buffers, at most {peak} at once"


def buffer_of(piece: Piece) -> int | None:
    """The buffer that a planned graph has for a piece."""
    node, part = piece
    numbers = node.meta.get("buffer")
    numbers = numbers if isinstance(numbers, tuple) else (numbers,)
    return numbers[part] if part < len(numbers) else None


def all_rows(graph: Graph) -> Numbers:
    """All positions of every level."""
    levels = {rows.level for node in graph.nodes if (rows := rows_of(node)) is not None}
    tables = [node.meta["table"] for node in graph.nodes if is_op(node, fisedit.table.default)]
    levels |= {level for table in tables for level in table.levels}
    return Numbers({level: level[0] * level[1] for level in levels})


def _of_both(every: Memory, some: Memory) -> Memory:
    """What is made and held whether levels are wholly active or not; sizes of all rows, shapes under any mask."""
    sizes = {piece: every.sizes.get(piece, 0) for piece in {**every.sizes, **some.sizes}}
    return Memory(sizes, some.shapes, {node: held | some.held[node] for node, held in every.held.items()})


def _share(lives: Mapping[Piece, Span], kinds: Mapping[Piece, Any]) -> dict[Piece, int]:
    """A buffer for each piece: the lowest of its kind whose last piece is dead, or a new one."""
    buffers: dict[Piece, int] = {}
    ends: dict[Any, dict[int, int]] = {}  # of each kind, the end of the last piece in each buffer
    for piece, (start, end) in sorted(lives.items(), key=lambda item: item[1][0]):
        mine = ends.setdefault(kinds[piece], {})
        free = [number for number, last in mine.items() if last < start]
        buffers[piece] = min(free) if free else sum(map(len, ends.values()))
        mine[buffers[piece]] = end
    return buffers
