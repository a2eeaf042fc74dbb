"""Replay the calls of an edit as one CUDA graph: hundreds of small kernels cost one launch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisedit.runtime.executor import Executable, Input, Memo, SlotSource, Stage, Store
from fisedit.runtime.kernels.launch import rehearse
from fisedit.runtime.plan import Table
from fisedit.runtime.row_plan import Buckets, LevelMasks, RowPlan

KEPT = 12
"""Captured graphs of one model that wait for masks of their sizes."""


class Replay:
    """The timestep and step stages of an edit graph for rows of fixed bucket sizes: captured at its first call.

    What changes between calls is copied into buffers of the graph's own: the sample, the timestep, the addresses of
    the recorded values, few small loads. Results are copies. It belongs to one session at a time.
    """

    def __init__(self, executable: Executable, buckets: Buckets, batch: int, device: torch.device) -> None:
        self.executable, self.buckets, self.batch = executable, buckets, batch
        self.stages = [stage for stage in executable.stages if stage.name in ("timestep", "step")]
        self.plan = RowPlan(table_keys(executable), buckets, batch, device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._buffers: dict[Any, Tensor] = {}
        self._seen: dict[Any, tuple[Tensor, int]] = {}
        self._made = {name for stage in self.stages for name in stage.values}  # handed on within the graph
        self._changing = {
            id(stage): [i for i in stage.inputs if i.kind != "table" and i.name not in self._made or i.kind == "views"]
            for stage in self.stages
        }
        self._memo: Memo | None = None
        self._results: tuple[list[Tensor], dict[Store, Tensor]] = ([], {})
        used = {id(weight): weight for stage in self.stages for weight in stage.weights}
        self._weights = list(used.values())
        self._frozen: list[int] = []

    def run(
        self, inputs: Mapping[str, Tensor], source: SlotSource, memo: Memo
    ) -> tuple[list[Tensor], dict[Store, Tensor]]:
        """One call, as :meth:`Executable.run`."""
        ran = self.executable.prepare(inputs, memo)
        self._fill(inputs, source, memo, values=ran or memo is not self._memo)
        self._memo = memo
        if self.plan.device.type != "cuda":
            with torch.no_grad():
                return self._call()
        frozen = [weight.data_ptr() for weight in self._weights]
        if self.graph is None or frozen != self._frozen:
            self._capture()
            self._frozen = frozen
        assert self.graph is not None
        self.graph.replay()
        outputs, stored = self._results
        return [output.clone() for output in outputs], {store: value.clone() for store, value in stored.items()}

    def end_session(self) -> None:
        """Hold nothing of the session any more but what lies in the buffers."""
        self._memo = None

    def _fill(self, inputs: Mapping[str, Tensor], source: SlotSource, memo: Memo, values: bool) -> None:
        """Bring the buffers up to date; what is the same as in the last call is not copied again.

        Args:
            values: whether results of the stages before may have changed.
        """
        changed: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for stage in self.stages:
            for wanted in self._changing[id(stage)]:
                if wanted.kind == "value" and not values:
                    continue
                key = (id(stage), wanted) if wanted.kind == "views" else wanted
                value = self.executable.fetch(wanted, stage, inputs, self.plan, source, memo)
                if not isinstance(value, Tensor):
                    continue
                version = -1 if value.is_inference() else value._version
                seen = self._seen.get(key)
                if seen is not None and seen[0] is value and seen[1] == version >= 0:
                    continue
                self._seen[key] = (value, version)
                if wanted.name in self.executable.constants and wanted.kind == "value":
                    self._buffers[key] = value  # read where it is
                    self.graph = None
                    continue
                buffer = self._buffers.get(key)
                if buffer is None or buffer.shape != value.shape:
                    self._buffers[key] = value.clone(memory_format=torch.preserve_format)
                    self.graph = None
                else:
                    pair = changed.setdefault(value.dtype, ([], []))
                    pair[0].append(buffer)
                    pair[1].append(value)
        for buffers, given in changed.values():
            torch._foreach_copy_(buffers, given)

    def _call(self) -> tuple[list[Tensor], dict[Store, Tensor]]:
        values: dict[str, Any] = {}
        outputs: tuple[Any, ...] = ()
        for stage in self.stages:
            arguments = [self._argument(stage, wanted, values) for wanted in stage.inputs]
            outputs = stage.module(*arguments)
            values.update(zip(stage.values, outputs[stage.results :], strict=False))
        step = self.stages[-1]
        stored = outputs[step.results + len(step.values) :]
        return list(outputs[: step.results]), dict(zip(step.stores, stored, strict=True))

    def _argument(self, stage: Stage, wanted: Input, values: dict[str, Any]) -> Any:
        if wanted.kind == "table":
            assert wanted.key is not None
            return self.plan.table(wanted.key)
        if wanted.kind == "value" and wanted.name in values:
            return values[wanted.name]
        return self._buffers[(id(stage), wanted) if wanted.kind == "views" else wanted]

    def _capture(self) -> None:
        with torch.no_grad():
            with rehearse() as rehearsal:
                self._call()
            if rehearsal.news:
                with rehearse(decide=True):
                    self._call()
            self._call()  # libraries load their kernels
            self.graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self._results = self._call()


def table_keys(executable: Executable) -> set[Table]:
    """All index tables that an executable reads."""
    return {wanted.key for stage in executable.stages for wanted in stage.inputs if wanted.key is not None}


class Replays:
    """The captured graphs of one executable: lent to sessions, kept for the next mask of their sizes."""

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        keys = table_keys(executable)
        self.levels = sorted({level for key in keys for level in key.levels}, reverse=True)
        self._idle: OrderedDict[tuple[Buckets, int], list[Replay]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, masks: Tensor, batch: int, device: torch.device) -> Replay:
        """A graph for masks bool ``[B, H, W]``, its tables filled; give it back with :meth:`give_back`."""
        projected = LevelMasks(masks, self.levels)
        key = (projected.buckets, batch)
        with self._lock:
            idle = self._idle.get(key)
            replay = idle.pop() if idle else None
        replay = replay or Replay(self.executable, projected.buckets, batch, device)
        replay.plan.write(projected)
        return replay

    def give_back(self, replay: Replay) -> None:
        replay.end_session()
        with self._lock:
            key = (replay.buckets, replay.batch)
            self._idle.setdefault(key, []).append(replay)
            self._idle.move_to_end(key)
            while sum(map(len, self._idle.values())) > KEPT:
                oldest = next(iter(self._idle))
                self._idle[oldest].pop()
                if not self._idle[oldest]:
                    del self._idle[oldest]
