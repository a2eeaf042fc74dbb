"""Replay the calls of an edit as one CUDA graph: hundreds of small kernels cost one launch."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from fisedit.runtime.executor import Executable, Input, Keep, Memo, SlotSource
from fisedit.runtime.kernels.compilers import Compilers
from fisedit.runtime.kernels.launch import rehearse
from fisedit.runtime.plan import Table
from fisedit.runtime.progress import Progress
from fisedit.runtime.row_plan import Buckets, Halos, LevelMasks, RowPlan
from fisedit.runtime.timetable import Row, counted, same

logger = logging.getLogger("fisedit")
CAPTURING = threading.Lock()
"""Held while a CUDA graph is captured: PyTorch allows one capture at a time in a process."""
KEPT, KEPT_SHARE = 12, 0.25
"""Captured graphs of one executable that wait for masks of their sizes, and how much of a GPU's memory those of all
models hold: what runs beside, a pipeline's decoder above all, needs some, too."""


@cache
def capture_stream(device: int) -> torch.cuda.Stream:
    """The stream that graphs of a GPU are captured on. PyTorch's default one is of the GPU that was captured on first;
    one for all captures of a GPU, as libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


@cache
def gpu_memory(device: torch.device) -> float:
    """Bytes of a GPU's memory; endless elsewhere, where no graph holds any."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf


class Replay:
    """The step stage of an edit graph for rows of fixed bucket sizes: captured at its first call.

    What changes between calls is copied into buffers of the graph's own: the sample, the row of the timestep, the
    addresses of the recorded values, few small loads. Results are copies. It belongs to one session at a time.
    """

    def __init__(self, executable: Executable, buckets: Buckets, batch: int, device: torch.device) -> None:
        self.executable, self.buckets, self.batch, self.step = executable, buckets, batch, executable.step
        self.plan = RowPlan(table_keys(executable), buckets, batch, device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_bytes = 0  # of GPU memory that the captured graph has for its values, in blocks of the allocator
        self.used = 0  # a number that grows with each use
        self._buffers: dict[Input, Tensor] = {}
        self._seen: dict[Input, tuple[Tensor, int]] = {}
        self._row: Row | None = None  # the buffer of what depends on the timestep alone
        timestep = executable.before.get("timestep")
        self._of_timestep = [Input.value(name) for name in timestep.values] if timestep is not None else []
        self._values: list[Input] = []  # results of the edit stage
        self._each_call = [wanted for wanted in self.step.inputs if wanted.kind not in ("value", "table")]
        self._memo: Memo | None = None
        self._constants: Mapping[str, Any] | None = None  # another object after weights were moved
        self._results: Sequence[Tensor] = ()

    def run(
        self, inputs: Mapping[str, Tensor], source: SlotSource, memo: Memo, keep: Keep | None = None
    ) -> list[Tensor]:
        """One call, as :meth:`Executable.run`."""
        with torch.inference_mode(False), torch.no_grad():  # else its buffers could only be written in that mode
            ran = self.executable.prepare(inputs, memo)
            if self._constants is not self.executable.constants:
                self._take_constants(self.executable.constants)
            values, self._memo = ran or memo is not self._memo, None
            self._fill(inputs, source, memo, values)
            self._memo = memo
            if self.plan.device.type != "cuda":
                return self.step.split(self._call(), keep)[: self.step.results]
            if self.graph is None:
                self._capture()
            assert self.graph is not None
            self.graph.replay()
            outputs = self.step.split(self._results, keep)[: self.step.results]
            return [output.clone() for output in outputs]

    def end_session(self) -> None:
        """Hold nothing of the session any more but what lies in the buffers."""
        self._memo = None
        self._seen.clear()

    def _forget_graph(self) -> None:
        self.graph, self.graph_bytes, self._results = None, 0, ()

    def _take_constants(self, constants: Mapping[str, Any]) -> None:
        """What is made of the weights is read where it lies."""
        self._constants = constants
        self._forget_graph()
        values = [wanted for wanted in self.step.inputs if wanted.kind == "value" and wanted not in self._of_timestep]
        self._values = [wanted for wanted in values if wanted.name not in constants]
        self._buffers |= {wanted: constants[wanted.name] for wanted in values if wanted.name in constants}

    def _fill(self, inputs: Mapping[str, Tensor], source: SlotSource, memo: Memo, values: bool) -> None:
        """Bring the buffers up to date; what is the same as in the last call is not copied again.

        Args:
            values: whether results of the stages before may have changed.
        """
        copies, news = Copies(), {}
        row = self.executable.timestep_row(inputs, memo)
        for wanted in (*self._each_call, *self._values) if values else self._each_call:
            value = self.executable.fetch(wanted, self.step, inputs, self.plan, source, memo)
            if not isinstance(value, Tensor):
                continue
            seen = counted(value)
            if wanted in self._seen and same([seen], [self._seen[wanted]]):
                continue
            news[wanted] = seen
            buffer = self._buffers.get(wanted)
            if buffer is None or buffer.shape != value.shape:
                self._buffers[wanted] = value.clone(memory_format=torch.preserve_format)
                self._forget_graph()
            else:
                copies.add(buffer, value)
        self._fill_row(row, copies)
        copies.make()
        self._seen |= news  # not before: what fails halfway is copied when it is tried again

    def _fill_row(self, row: Row | None, copies: Copies) -> None:
        if row is None:
            return
        if self._row is None:
            self._row = Row(row.packing, row.data.clone())
            self._buffers |= zip(self._of_timestep, self._row.packing.unpack(self._row.data), strict=True)
        else:
            assert row.packing == self._row.packing
            copies.add(self._row.data, row.data)

    def _call(self) -> Sequence[Tensor]:
        return self.step.module(*[self._argument(wanted) for wanted in self.step.inputs])

    def _argument(self, wanted: Input) -> Any:
        if wanted.kind == "table":
            assert wanted.key is not None
            return self.plan.table(wanted.key)
        return self._buffers[wanted]

    def _compile(self) -> bool:
        """Have all kernels compiled that a call needs, and all ways timed that are not known yet. Whether nothing was
        left to do: then all kernels are loaded, and a graph can be captured."""
        start = time.monotonic()
        with Progress() as progress, Compilers(progress=progress) as compilers:
            with rehearse(compilers, progress=progress) as rehearsal:
                self._call()
            compiled = time.monotonic()
            if rehearsal.news:
                with rehearse(compilers, decide=True, progress=progress):
                    self._call()
        if rehearsal.news:
            seconds = compiled - start, time.monotonic() - compiled
            logger.info("compiled kernels in %.1f s, timed and compiled those that were chosen in %.1f s", *seconds)
        return not (rehearsal.news or rehearsal.skipped)

    def _capture(self) -> None:
        with CAPTURING:
            start = time.monotonic()
            if not self._compile():
                self._call()
            rehearsed = time.monotonic()
            graph, stream = torch.cuda.CUDAGraph(), capture_stream(torch.cuda.current_device())
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                reserved = torch.cuda.memory_reserved(self.plan.device)
                self._results = self._call()
                made = torch.cuda.memory_reserved(self.plan.device) - reserved
        self.graph = graph  # not before: a capture that fails leaves nothing to replay
        self.graph_bytes = max(made, 0)  # another thread may have given memory back
        milliseconds = (rehearsed - start) * 1e3, (time.monotonic() - rehearsed) * 1e3
        logger.debug("rehearsed a call for %s in %.0f ms, captured it in %.0f ms", self.buckets, *milliseconds)


class Copies:
    """Copies between tensors, in few launches."""

    def __init__(self) -> None:
        self._by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}

    def add(self, to: Tensor, value: Tensor) -> None:
        pair = self._by_dtype.setdefault(value.dtype, ([], []))
        pair[0].append(to)
        pair[1].append(value)

    def make(self) -> None:
        for buffers, values in self._by_dtype.values():
            if len(values) == 1:  # a copy of memory: quicker for one large tensor than the kernel for many
                buffers[0].copy_(values[0])
            else:
                torch._foreach_copy_(buffers, values)


def table_keys(executable: Executable) -> set[Table]:
    """All index tables that an executable reads."""
    return {wanted.key for stage in executable.stages for wanted in stage.inputs if wanted.key is not None}


class Replays:
    """The captured graphs of one executable: lent to sessions, kept for the next mask of their sizes.

    A session may end anywhere, also where garbage is collected while the lock is held: to give a graph back waits for
    nothing.
    """

    _all: ClassVar[WeakSet[Replays]] = WeakSet()
    _lock: ClassVar[threading.Lock] = threading.Lock()  # of what waits, of all of them
    _clock: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        keys = table_keys(executable)
        self.levels = sorted({level for key in keys for level in key.levels}, reverse=True)
        views = dict.fromkeys(slot for stage in executable.stages for slot in stage.views)
        loads = dict.fromkeys(w.name for stage in executable.stages for w in stage.inputs if w.kind == "load")
        self.reads = tuple(views), tuple(loads)  # slots read where they lie, and those that are loaded
        self._returned: deque[Replay] = deque()
        self._idle: list[Replay] = []
        with self._lock:
            self._all.add(self)

    def take(self, projected: LevelMasks, batch: int, device: torch.device, halos: Halos | None = None) -> Replay:
        """A graph for masks at ``levels``, its tables filled; give it back with :meth:`give_back`.

        Args:
            halos: where recorded rows lie that are fetched; ``None``: recorded maps are read whole, in their place.
        """
        wanted = (projected.buckets, batch)
        with self._lock:
            fitting = [idle for idle in self._waiting() if (idle.buckets, idle.batch) == wanted]
            replay = fitting[-1] if fitting else None
            if replay is not None:
                self._idle.remove(replay)
        with torch.inference_mode(False), torch.no_grad():
            replay = replay or Replay(self.executable, projected.buckets, batch, device)
            replay.plan.write(projected, halos)
        return replay

    def run(
        self, replay: Replay, inputs: Mapping[str, Tensor], source: SlotSource, memo: Memo, keep: Keep | None = None
    ) -> list[Tensor]:
        """One call of a graph that was taken; where the GPU's memory runs out, all graphs go that wait for other masks
        there, and it is run again.

        Raises:
            torch.OutOfMemoryError: none waited, or that was not enough.
        """
        try:
            return replay.run(inputs, source, memo, keep)
        except torch.OutOfMemoryError:
            with self._lock:
                if not self._drop_oldest(replay.plan.device, most=-math.inf, keep=0):
                    raise
        torch.cuda.empty_cache()
        return replay.run(inputs, source, memo, keep)

    def give_back(self, replay: Replay) -> None:
        replay.end_session()
        replay.used = next(self._clock)
        self._returned.append(replay)
        if self._lock.acquire(blocking=False):  # else the next one looks
            try:
                del self._waiting()[:-KEPT]
                device = replay.plan.device
                self._drop_oldest(device, most=KEPT_SHARE * gpu_memory(device), keep=1)
            finally:
                self._lock.release()

    def _waiting(self) -> list[Replay]:
        """What waits here, the one used longest ago first."""
        while self._returned:
            self._idle.append(self._returned.popleft())
        return self._idle

    def _drop_oldest(self, device: torch.device, most: float, keep: int) -> bool:
        """Let graphs of all models go that wait on a GPU, those used longest ago, until the others hold ``most`` bytes
        or so many are left to ``keep``. Whether one went."""
        waiting = [(idle, owner) for owner in self._all for idle in owner._waiting() if idle.plan.device == device]
        waiting.sort(key=lambda pair: pair[0].used)
        held, gone = sum(idle.graph_bytes for idle, _ in waiting), 0
        while held > most and gone < len(waiting) - keep:
            idle, owner = waiting[gone]
            owner._idle.remove(idle)
            held, gone = held - idle.graph_bytes, gone + 1
        return gone > 0
