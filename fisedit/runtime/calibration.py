"""Timings of this machine's GPU: which candidate is fastest for a layer's shape, measured once and kept.

A table belongs to one GPU and one set of versions, and lies as JSON in the user's cache folder.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol, cast, get_args

import platformdirs
import torch
from torch import Tensor

from fisedit.errors import UnknownOptionError

Candidate = Hashable
"""A way to compute a layer, told by its text (``str``)."""
Measure = Callable[[Candidate, int], float]
"""``(candidate, rows) -> µs``; ``math.inf`` for a candidate that cannot run."""
Calibrate = Literal["lazy", "off"]


class Shape(Hashable, Protocol):
    """A kind of layer, all but its number of rows.

    Attributes:
        kind, key: what its timings are kept by: strings, numbers, tuples, and what else says by its text what it is.
    """

    @property
    def kind(self) -> str: ...

    @property
    def key(self) -> tuple[Any, ...]: ...

    def ways(self, rows: int) -> Sequence[Candidate]:
        """The candidates that are worth measuring for a number of rows of each sample."""
        ...


SCHEMA = 11
"""Of the file. Raise it when kernels change so much that older timings mislead."""
VARIABLE = "FISEDIT_CALIBRATE"


@dataclass(frozen=True)
class Machine:
    """What timings hold for."""

    device: str
    pytorch: str
    triton: str
    fisedit: str
    schema: int = SCHEMA

    @staticmethod
    def of(device: torch.device | str) -> Machine:
        device = torch.device(device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return Machine(name, str(torch.__version__), _version("triton"), _version("fisedit"))

    @property
    def file_name(self) -> str:
        words = (
            self.device,
            f"torch{self.pytorch}",
            f"triton{self.triton}",
            f"fisedit{self.fisedit}",
            f"{self.schema}",
        )
        return re.sub(r"[^A-Za-z0-9.+]+", "-", "-".join(words)) + ".json"


@dataclass(frozen=True)
class Choice:
    """What was chosen for a layer, and what each candidate costs, by its text; nothing where nothing was measured."""

    kind: str
    key: tuple[Any, ...]
    rows: int
    chosen: str
    costs: Mapping[str, float]


@dataclass
class Timings:
    """Measured µs by kind of layer, its key, its number of rows, and candidate. Threads may share it.

    Args:
        machine: what the timings hold for.
        path: the file they are kept in; ``None`` keeps them in memory.
        calibrate: ``"lazy"`` measures what is not known, ``"off"`` never measures.
    """

    machine: Machine
    path: Path | None = None
    calibrate: Calibrate = "lazy"
    table: dict[str, dict[str, float]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _settled: dict[tuple[str, tuple[Any, ...], int], Candidate] = field(default_factory=dict, repr=False)
    _known: set[tuple[Shape, tuple[int, ...]]] = field(default_factory=set, repr=False)
    _unsaved: bool = False
    _written: float = -math.inf  # when, by a clock in seconds
    _collected: list[Choice] | None = None

    @staticmethod
    def load(device: torch.device | str, folder: Path | None = None, calibrate: Calibrate | None = None) -> Timings:
        """The timings that are kept for a device; none if there is no file, or no readable one of this machine.

        Args:
            folder: default is the user's cache folder.
            calibrate: default is the environment variable ``FISEDIT_CALIBRATE``, else ``"lazy"``.
        Raises:
            UnknownOptionError: ``calibrate`` or the variable is neither.
        """
        chosen = calibrate or os.environ.get(VARIABLE, "lazy")
        if chosen not in get_args(Calibrate):
            raise UnknownOptionError(option=VARIABLE, given=chosen, allowed=get_args(Calibrate))
        machine = Machine.of(device)
        path = (folder or Path(platformdirs.user_cache_dir("fisedit")) / "timings") / machine.file_name
        return Timings(machine, path, cast(Calibrate, chosen), _read(path, machine))

    def unknown(self, shape: Shape, rows: Sequence[int]) -> dict[int, list[Candidate]]:
        """The candidates that were not measured yet, by numbers of rows; nothing if measuring is off."""
        asked = (shape, tuple(rows))
        if self.calibrate == "off" or asked in self._known:
            return {}
        known = {n: self.times(shape, n) for n in rows}
        ways = {n: [way for way in shape.ways(n) if str(way) not in times] for n, times in known.items()}
        unknown = {n: each for n, each in ways.items() if each}
        if not unknown:
            self._known.add(asked)
        return unknown

    def fill(self, shape: Shape, rows: Sequence[int], measure: Measure) -> None:
        """Measure what is not known yet of the candidates for each number of rows; nothing if measuring is off."""
        with self._lock:
            for number, ways in self.unknown(shape, rows).items():
                for way in ways:
                    self.put(shape, number, way, measure(way, number))

    def expect(self, shape: Shape, rows: int) -> dict[Candidate, float]:
        """µs for a number of rows, of each candidate that was measured and can run."""
        times = self.times(shape, rows)
        ways = shape.ways(rows) if times else ()
        return {way: time for way in ways if math.isfinite(time := times.get(str(way), math.inf))}

    @contextmanager
    def collect(self) -> Iterator[list[Choice]]:
        """The choices that are noted within the block, in their order, for ``explain``."""
        with self._lock:
            before, self._collected = self._collected, []
            try:
                yield self._collected
            finally:
                self._collected = before

    def settle(self, shape: Shape, rows: int, chosen: Candidate) -> None:
        """Remember a choice until something is measured: a model's layers ask for it again and again."""
        self._settled[shape.kind, shape.key, rows] = chosen
        if self._collected is not None:
            costs = {str(way): time for way, time in self.expect(shape, rows).items()}
            self._collected.append(Choice(shape.kind, shape.key, rows, str(chosen), costs))

    def settled(self, shape: Shape, rows: int) -> Candidate | None:
        """The remembered choice; none while choices are collected, which are made anew."""
        return self._settled.get((shape.kind, shape.key, rows)) if self._collected is None else None

    def put(self, shape: Shape, rows: int, candidate: Candidate, microseconds: float) -> None:
        """Note a measurement."""
        with self._lock:
            self.table.setdefault(_point(shape, rows), {})[str(candidate)] = microseconds
            self._settled.clear()
            self._unsaved = True

    def times(self, shape: Shape, rows: int) -> Mapping[str, float]:
        """µs of each measured candidate, by its text; infinite for one that cannot run."""
        return self.table.get(_point(shape, rows), {})

    def time(self, shape: Shape, rows: int, candidate: Candidate) -> float | None:
        """µs of one candidate; ``None`` if it was not measured."""
        return self.times(shape, rows).get(str(candidate))

    def save(self, every: float = 0.0) -> None:
        """Write the table, with what another process has written meanwhile; a folder that cannot be written is let be.

        The file is replaced in one step: a reader sees the old one or the new one.

        Args:
            every: seconds that have to be over since it was last written; else a later call writes it.
        """
        with self._lock:
            if self.path is None or not self._unsaved or time.monotonic() - self._written < every:
                return
            merged = _read(self.path, self.machine)
            for point, times in self.table.items():
                merged.setdefault(point, {}).update(times)
            self.table = merged
            text = json.dumps({"machine": vars(self.machine), "microseconds": merged}, indent=1)
            try:
                _replace(self.path, text)
            except OSError:
                self.path = None  # read-only home: measured again by the next process
            self._unsaved, self._written = False, time.monotonic()


def time_on_gpu(*functions: Callable[[], object], calls: int = 20, replays: int = 5) -> float:
    """µs of one call, as a CUDA graph runs it: between events that are part of the graph, since the process may pause
    before it launches one.

    Args:
        functions: the same call, over different copies of what it reads (:func:`copies_beyond_l2`), which take turns.
        calls: at least so many are captured in a graph. replays: the median of so many replays is taken.
    """
    for function in functions[:2]:
        function()  # compiles, and lets libraries choose
    calls = max(1, round(calls / len(functions))) * len(functions)
    start, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
    graph = _capture([start.record, *(functions[call % len(functions)] for call in range(calls)), end.record])
    graph.replay()
    times = []
    for _ in range(replays):
        graph.replay()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return median(times)


_captured: dict[int, tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]] = {}
"""Of each device the last timed graph, which keeps the memory pool that the next one takes over, and its stream: on
another one, a library would take memory for its workspace again."""


def _capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """The calls as a graph. ``torch.cuda.graph`` would also give all unused memory back, hundreds of times in a row."""
    device, graph = torch.cuda.current_device(), torch.cuda.CUDAGraph()
    pool, stream = None, torch.cuda.Stream()
    if device in _captured:
        last, stream = _captured[device]
        pool = last.pool()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    _captured[device] = graph, stream
    return graph


def copies_beyond_l2(*tensors: Tensor, most: int = 64) -> list[tuple[Tensor, ...]]:
    """``tensors`` and copies of them, so many that reading them in turns misses the L2 cache, as in a whole model.

    At most ``most``: what is small stays in the cache, where its reading costs little either way.
    """
    device, size = tensors[0].device, sum(t.numel() * t.element_size() for t in tensors)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    number = min(most, max(1, math.ceil(2 * cache / max(size, 1))))
    return [tensors, *(tuple(tensor.clone() for tensor in tensors) for _ in range(number - 1))]


def _point(shape: Shape, rows: int) -> str:
    return f"{_name(shape.kind, shape.key)} {rows}"


@cache
def _name(kind: str, key: tuple[Any, ...]) -> str:
    return f"{kind} {json.dumps(key, default=str)}"


def _read(path: Path, machine: Machine) -> dict[str, dict[str, float]]:
    """The table of a file; empty if it is missing, damaged or another machine's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or found.get("machine") != vars(machine):
        return {}
    table = found.get("microseconds")
    return cast(dict[str, dict[str, float]], table) if _is_table(table) else {}


def _is_table(table: Any) -> bool:
    return isinstance(table, dict) and all(
        isinstance(times, dict) and all(isinstance(time, (int, float)) for time in times.values())
        for times in table.values()
    )


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
