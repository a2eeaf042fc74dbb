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
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast, get_args

import platformdirs
import torch
from torch import Tensor

from fisedit.errors import UnknownOptionError

Candidate = Hashable
"""A way to compute a layer, told by its text (``str``)."""
Measure = Callable[[Candidate, int], float]
"""``(candidate, rows) -> µs``; ``math.inf`` for a candidate that cannot run, or is not worth timing."""
Calibrate = Literal["lazy", "off"]

HOPEFUL = 3
"""Candidates that are measured between two numbers of rows: as many of the fastest of either."""
SCHEMA = 3
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
    _unsaved: bool = False
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

    def best(
        self,
        kind: str,
        key: tuple[Any, ...],
        rows: int,
        candidates: Sequence[Candidate],
        measure: Measure | None,
        default: Candidate | None = None,
    ) -> Candidate:
        """The fastest of ``candidates`` for a layer of ``rows`` rows.

        Args:
            kind, key: the layer's shape: strings, numbers, tuples, and what else says by its text what it is.
            rows: taken to a grid of factors of the square root of 2, and so given to ``measure``.
            measure: called for the candidates that were not measured yet, unless all are known at a point next to
                that of ``rows``; ``None`` if nothing can be measured now.
            default: the answer where nothing is known or can be measured; by default the first candidate.
        """
        with self._lock:
            names = [str(candidate) for candidate in candidates]
            known = self.times_near(kind, key, rows, names)
            if not known and measure is not None:
                self.fill(kind, key, {rows: candidates}, measure)
                known = self.times(kind, key, rows)
            if known:
                chosen = min(candidates, key=lambda candidate: known[str(candidate)])
            else:
                chosen = candidates[0] if default is None else default
            if self._collected is not None:
                costs = {name: known[name] for name in names} if known else {}
                self._collected.append(Choice(kind, key, rows, str(chosen), costs))
            return chosen

    def fill(
        self, kind: str, key: tuple[Any, ...], wanted: Mapping[int, Sequence[Candidate]], measure: Measure
    ) -> None:
        """Measure what is not known yet of the candidates for each number of rows; nothing if measuring is off.

        Every other number is measured in full. For those between, candidates that are not among the fastest on either
        side are noted as infinitely slow.
        """
        if self.calibrate == "off":
            return
        with self._lock:
            ordered = sorted(wanted)
            for rows in ordered[::2]:
                for candidate in wanted[rows]:
                    self._measure(kind, key, rows, candidate, measure)
            for before, rows, after in zip(ordered[::2], ordered[1::2], [*ordered[2::2], ordered[-1]], strict=False):
                near = {_family(name) for n in (before, after) for name in self._fastest(kind, key, n)}
                for candidate in wanted[rows]:
                    hopeful = not near or _family(str(candidate)) in near
                    self._measure(kind, key, rows, candidate, measure if hopeful else lambda *_: math.inf)

    def _measure(self, kind: str, key: tuple[Any, ...], rows: int, candidate: Candidate, measure: Measure) -> None:
        if self.time(kind, key, rows, candidate) is None:
            self.put(kind, key, rows, candidate, measure(candidate, grid(rows)))

    def _fastest(self, kind: str, key: tuple[Any, ...], rows: int) -> list[str]:
        times = self.times(kind, key, rows)
        return sorted(times, key=times.__getitem__)[:HOPEFUL]

    def times_near(self, kind: str, key: tuple[Any, ...], rows: int, names: Sequence[str] = ()) -> Mapping[str, float]:
        """The times at the grid point of ``rows``, or at one next to it, where all of ``names`` are known; or none."""
        place = _grid_step(rows)
        for step in (place, place - 1, place + 1):
            times = self.times(kind, key, max(1, round(2 ** (step / 2))))
            if times and all(name in times for name in names):
                return times
        return {}

    @contextmanager
    def collect(self) -> Iterator[list[Choice]]:
        """The choices that ``best`` makes within the block, in their order, for ``explain``."""
        with self._lock:
            before, self._collected = self._collected, []
            try:
                yield self._collected
            finally:
                self._collected = before

    def settle(self, kind: str, key: tuple[Any, ...], rows: int, chosen: Candidate) -> None:
        """Remember a choice until something is measured: a model's layers ask for it again and again."""
        self._settled[kind, key, grid(rows)] = chosen

    def settled(self, kind: str, key: tuple[Any, ...], rows: int) -> Candidate | None:
        """The remembered choice; none while choices are collected, which are made anew."""
        return self._settled.get((kind, key, grid(rows))) if self._collected is None else None

    def put(self, kind: str, key: tuple[Any, ...], rows: int, candidate: Candidate, microseconds: float) -> None:
        """Note a measurement."""
        with self._lock:
            self.table.setdefault(_point(kind, key, grid(rows)), {})[str(candidate)] = microseconds
            self._settled.clear()
            self._unsaved = True

    def times(self, kind: str, key: tuple[Any, ...], rows: int) -> Mapping[str, float]:
        """µs of each measured candidate, by its text, at the grid point of ``rows``."""
        return self.table.get(_point(kind, key, grid(rows)), {})

    def time(self, kind: str, key: tuple[Any, ...], rows: int, candidate: Candidate) -> float | None:
        """µs of one candidate at the grid point of ``rows``; ``None`` if it was not measured."""
        return self.times(kind, key, rows).get(str(candidate))

    def predict(self, kind: str, key: tuple[Any, ...], rows: int) -> float | None:
        """µs of the fastest known candidate, linear between grid points; ``None`` if none of this shape is known.

        Fewer rows than at the smallest known point take its time; more than at the largest take their share more.
        """
        fastest = {n: min(times.values()) for n in points() if (times := self.times(kind, key, n))}
        known = [(n, time) for n, time in fastest.items() if math.isfinite(time)]
        below, above = [point for point in known if point[0] <= rows], [point for point in known if point[0] >= rows]
        if not below:
            return above[0][1] if above else None
        low, time = below[-1]
        if not above:
            return time * rows / low
        high, later = above[0]
        return time if high == low else time + (rows - low) / (high - low) * (later - time)

    def save(self) -> None:
        """Write the table, with what another process has written meanwhile; a folder that cannot be written is let be.

        The file is replaced in one step: a reader sees the old one or the new one.
        """
        with self._lock:
            if self.path is None or not self._unsaved:
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
            self._unsaved = False


def _family(candidate: str) -> str:
    """A candidate but for how often its work is split, which changes with the number of rows."""
    return candidate.partition(" /")[0]


def grid(rows: int) -> int:
    """The grid point next to a number of rows: 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, ..."""
    return round(2 ** (_grid_step(rows) / 2))


def _grid_step(rows: int) -> int:
    return round(2 * math.log2(max(rows, 1)))


def points(largest: int = 1 << 20) -> list[int]:
    """All grid points up to ``largest``, ascending."""
    return sorted(
        {grid(round(2 ** (step / 2))) for step in range(2 * largest.bit_length()) if 2 ** (step / 2) <= largest}
    )


def time_on_gpu(*functions: Callable[[], object], calls: int = 20, replays: int = 5) -> float:
    """µs of one call, as a CUDA graph runs it: without launch overhead.

    Args:
        functions: the same call, over different copies of what it reads (:func:`copies_beyond_l2`), which take turns.
        calls: at least so many are captured in a graph. replays: the median of so many replays is taken.
    """
    for function in functions[:2]:
        function()  # compiles, and lets libraries choose
    calls = max(1, round(calls / len(functions))) * len(functions)
    graph = _capture([functions[call % len(functions)] for call in range(calls)])
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
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


def _point(kind: str, key: tuple[Any, ...], rows: int) -> str:
    return f"{kind} {json.dumps(key, default=str)} {rows}"


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
