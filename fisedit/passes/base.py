"""What a graph pass is, and the one place that runs them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch.fx import GraphModule

from fisedit.passes import ir


@dataclass(frozen=True)
class Refusal:
    """A place that a pass looked at and left alone, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did to the graph: how many places it rewrote, and which it refused."""

    matched: int
    refused: tuple[Refusal, ...] = ()

    @property
    def modified(self) -> bool:
        return self.matched > 0


GraphPass = Callable[[GraphModule], PassResult]


@dataclass(frozen=True)
class PassRecord:
    """One line of ``inspect``: a pass, its result, its time, the size of the graph after it."""

    name: str
    result: PassResult
    seconds: float
    nodes: int


@dataclass
class PassLog:
    """The history of one graph through its passes."""

    graph: str
    records: list[PassRecord] = field(default_factory=list)

    @property
    def refusals(self) -> list[tuple[str, Refusal]]:
        return [(record.name, refusal) for record in self.records for refusal in record.result.refused]


class PassError(RuntimeError):
    """A pass failed or left an illegal graph: a bug of ours. Names the pass and those that ran before it."""


def pass_name(graph_pass: GraphPass) -> str:
    return graph_pass.func.__name__ if isinstance(graph_pass, partial) else graph_pass.__name__


def run_passes(gm: GraphModule, passes: Sequence[GraphPass], log: PassLog) -> None:
    """Run ``passes`` over ``gm`` in place, verifying the graph after each.

    With the environment variable ``FISEDIT_DUMP=folder`` the graph is written before and after every pass.
    """
    dump(gm, log, "captured" if not log.records else "start")
    for graph_pass in passes:
        name, start = pass_name(graph_pass), time.perf_counter()
        try:
            result = graph_pass(gm)
            gm.graph.lint()
            ir.verify(gm.graph)
        except Exception as error:
            before = ", ".join(record.name for record in log.records) or "none"
            raise PassError(f"pass {name!r} failed on the {log.graph} graph (passes before it: {before})") from error
        log.records.append(PassRecord(name, result, time.perf_counter() - start, len(gm.graph.nodes)))
        dump(gm, log, name)
    gm.recompile()


def dump(gm: GraphModule, log: PassLog, name: str) -> None:
    folder = os.environ.get("FISEDIT_DUMP")
    if not folder:
        return
    path = Path(folder) / log.graph
    path.mkdir(parents=True, exist_ok=True)
    file = path / f"{len(log.records):02d}_{name}.txt"
    file.write_text(ir.print_graph(gm.graph))
    with (Path(folder) / "index.txt").open("a") as index:
        matched = log.records[-1].result.matched if log.records else 0
        index.write(f"{log.graph}/{file.name}: {len(gm.graph.nodes)} nodes, {matched} places rewritten\n")
