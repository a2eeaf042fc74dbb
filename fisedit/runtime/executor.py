"""Run lowered graphs: feed each stage its inputs, keep what later stages need, hand out results and stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from fisedit.runtime.packed_weights import Made, pack_weights
from fisedit.runtime.plan import Table
from fisedit.runtime.timetable import Row, Rows, Timetable, counted, run_stage, same


@dataclass(frozen=True)
class Input:
    """Where an input of a stage comes from.

    ``user``: an input of the model by name; ``table``: an index table of the mask; ``load``: a cache slot, whole or
    the rows of a table; ``views``: all slots that are read where they lie; ``value``: a result of an earlier stage.
    """

    kind: Literal["user", "table", "load", "views", "value"]
    name: str = ""
    key: Table | None = None

    @staticmethod
    def user(name: str) -> Input:
        return Input("user", name)

    @staticmethod
    def table(key: Table) -> Input:
        return Input("table", key=key)

    @staticmethod
    def load(slot: str, rows: Table | None) -> Input:
        return Input("load", slot, rows)

    @staticmethod
    def views() -> Input:
        return Input("views")

    @staticmethod
    def value(name: str) -> Input:
        return Input("value", name)


@dataclass(frozen=True)
class Store:
    """A slot that a graph writes.

    ``rows`` names the active rows of its level, ``None`` for values without rows; ``dtype`` is that of the value which
    quantized rows stand for, ``None`` if they are not quantized.
    """

    slot: str
    rows: Table | None
    dtype: torch.dtype | None = None


Keep = Callable[[dict[Store, Tensor]], None]
"""Takes what a graph stores, before anything can overwrite it."""
Runner = Callable[[Sequence[Any], Keep | None], list[Tensor]]
"""Runs a stage: its inputs, and what takes its stores; returns the user outputs and the values of later stages."""


@dataclass
class Stage:
    """A part of a graph that is run at one rhythm: once per model, per edit, per timestep, or per call.

    ``views`` are the slots that its kernels read in place. ``module`` returns ``results`` user outputs, then the
    ``values`` of later stages, then the ``stores``. ``runner``: what runs it in the module's place.
    """

    name: str
    module: GraphModule
    inputs: tuple[Input, ...]
    results: int
    values: tuple[str, ...]
    stores: tuple[Store, ...]
    views: tuple[str, ...] = ()
    runner: Runner | None = None

    def run(self, arguments: Sequence[Any], keep: Keep | None) -> list[Tensor]:
        """The user outputs and the values of later stages; ``keep`` is given what it stores."""
        if self.runner is not None:
            return self.runner(arguments, keep)
        return self.split(self.module(*arguments), keep)

    def split(self, outputs: Sequence[Tensor], keep: Keep | None) -> list[Tensor]:
        """Give the stores among the outputs of the module to ``keep``; returns the others."""
        others = self.results + len(self.values)
        if keep is not None and self.stores:
            keep(dict(zip(self.stores, outputs[others:], strict=True)))
        return list(outputs[:others])

    @cached_property
    def weights(self) -> list[Tensor]:
        """The parameters and buffers of the model that it reads."""
        return [*self.module.parameters(), *self.module.buffers()]


class SlotSource(Protocol):
    """What can be asked for recorded values: a step of a recording."""

    def load(self, slot: str, index: Tensor | None = None) -> Tensor: ...

    def addresses(self, slots: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]: ...


class Plan(Protocol):
    """The index tables of a mask."""

    def table(self, key: Table) -> Any: ...


@dataclass
class Memo:
    """What one edit keeps between calls: the results of the stages that do not run in every call.

    Attributes:
        inputs: what the edit stage was last run for.
        constants: those of the graph that the rest belongs to.
        alive: what kernels under way may still read by its address.
        timetable: of the run that is edited; ``None`` if it is not known which timesteps will come.
    """

    values: dict[str, Any] = field(default_factory=dict)
    inputs: list[tuple[Tensor, int]] | None = None
    constants: Mapping[str, Any] | None = None
    alive: list[Tensor] = field(default_factory=list)
    timetable: Timetable | None = None
    bytes_loaded: int = 0


@dataclass
class Executable:
    """A lowered graph: its stages in the order they run.

    ``addressed``: its kernels take the addresses of what they read in place, not the tensors. ``constants``: what is
    made of the weights alone; another object after the weights were moved. ``packed``: what other graphs made of them.
    ``timestep``: the model's input that it is.
    """

    stages: list[Stage]
    addressed: bool = False
    constants: dict[str, Any] = field(default_factory=dict)
    packed: Made = field(default_factory=Made)
    timestep: str = ""
    _rows: Rows = field(default_factory=dict)
    _addresses: list[int] = field(default_factory=list)  # of the weights

    @property
    def step(self) -> Stage:
        """The stage that runs in every call."""
        return self.stages[-1]

    @cached_property
    def before(self) -> dict[str, Stage]:
        """The other stages by name."""
        return {stage.name: stage for stage in self.stages[:-1]}

    @cached_property
    def _weights(self) -> list[Tensor]:
        return list({id(weight): weight for stage in self.stages for weight in stage.weights}.values())

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        plan: Plan | None = None,
        source: SlotSource | None = None,
        memo: Memo | None = None,
        keep: Keep | None = None,
    ) -> list[Tensor]:
        """Run all stages that are due; returns the user outputs.

        Args:
            inputs: the model's tensor inputs by name, and the controls of a detect graph.
            plan: the mask's tables, for an edit graph.
            source: the recorded step that ``load`` and ``views`` inputs come from.
            memo: kept between the calls of one edit; stages before ``step`` run only when their inputs changed.
            keep: is given what the graph stores, which may be overwritten once it returns.
        """
        memo, step = memo or Memo(), self.step
        if self.before:
            self.prepare(inputs, memo)
        if row := self.timestep_row(inputs, memo):
            memo.values.update(zip(self.before["timestep"].values, row.packing.unpack(row.data), strict=True))
        with torch.no_grad():
            outputs = step.run([self.fetch(w, step, inputs, plan, source, memo) for w in step.inputs], keep)
        return outputs[: step.results]

    def prepare(self, inputs: Mapping[str, Tensor], memo: Memo) -> bool:
        """Run the stages before the timestep's, where weights or text changed; whether any ran."""
        self._notice_moves()
        ran = memo.constants is not self.constants
        if ran:
            self._begin(memo)
        stage = self.before.get("edit")
        used = [counted(inputs[i.name]) for i in stage.inputs if i.kind == "user"] if stage is not None else []
        if stage is not None and (memo.inputs is None or not same(used, memo.inputs)):
            with torch.no_grad():
                outputs = stage.module(*[self.fetch(w, stage, inputs, None, None, memo) for w in stage.inputs])
            memo.values.update(zip(stage.values, outputs, strict=True))
            memo.inputs, ran = used, True
        return ran

    def _begin(self, memo: Memo) -> None:
        """Start anew with a memo of another graph, or of weights that were moved."""
        memo.constants, memo.values, memo.inputs = self.constants, dict(self.constants), None
        if memo.timetable is not None:
            # What depends on timestep and weights alone also holds for other edits.
            memo.timetable.begin({} if self._timestep_reads else self._rows)

    def _notice_moves(self) -> None:
        """Make the constants, at first and after weights were moved (``.to``, offloading).

        A moved weight stays the same object and PyTorch does not count it as a write: only its address tells.
        """
        addresses = list(map(Tensor.data_ptr, self._weights))
        if self._addresses != addresses:
            stage = self.before.get("weights")
            packed = pack_weights(stage.module, self.packed) if stage is not None else ()
            self.constants = dict(zip(stage.values if stage is not None else (), packed, strict=True))
            self._addresses, self._rows = addresses, {}

    def timestep_row(self, inputs: Mapping[str, Tensor], memo: Memo) -> Row | None:
        """What the timestep stage makes for this call; ``None`` for a graph without one."""
        stage, timetable = self.before.get("timestep"), memo.timetable
        if stage is None:
            return None
        given = inputs[self.timestep]  # [B]

        def compute(timesteps: Tensor) -> list[Row]:
            arguments = [self.fetch(wanted, stage, inputs, None, None, memo) for wanted in stage.inputs]
            with torch.no_grad():
                return run_stage(stage.module, arguments, stage.inputs.index(Input.user(self.timestep)), timesteps)

        if timetable is None:
            return compute(given[None])[0]
        others = [counted(self.fetch(wanted, stage, inputs, None, None, memo)) for wanted in self._timestep_reads]
        return timetable.row(given, others, compute)

    @cached_property
    def _timestep_reads(self) -> list[Input]:
        """What the timestep stage reads that may change within an edit, besides the timestep."""
        if "timestep" not in self.before:
            return []
        constants = self.before["weights"].values if "weights" in self.before else ()
        lasting = {Input.user(self.timestep), *map(Input.value, constants)}
        return [wanted for wanted in self.before["timestep"].inputs if wanted not in lasting]

    def fetch(
        self,
        wanted: Input,
        stage: Stage,
        inputs: Mapping[str, Tensor],
        plan: Plan | None,
        source: SlotSource | None,
        memo: Memo,
    ) -> Any:
        """The value of one input of a stage."""
        if wanted.kind == "user":
            return inputs[wanted.name]
        if wanted.kind == "value":
            return memo.values[wanted.name]
        table = None
        if wanted.key is not None:
            assert plan is not None
            table = plan.table(wanted.key)
        if wanted.kind == "table":
            return table
        assert source is not None
        if wanted.kind == "views":
            if not self.addressed:
                return [source.load(slot) for slot in stage.views]
            addresses, memo.alive = source.addresses(stage.views)
            return addresses
        loaded = source.load(wanted.name, table)
        memo.bytes_loaded += loaded.numel() * loaded.element_size()
        return loaded
