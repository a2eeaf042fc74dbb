"""Run lowered graphs: feed each stage its inputs, keep what later stages need, hand out results and stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from fisedit.runtime.packed_weights import Made, pack_weights
from fisedit.runtime.plan import Table


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
    """A slot that a graph writes; ``rows`` names the active rows of its level, ``None`` for values without rows."""

    slot: str
    rows: Table | None


@dataclass
class Stage:
    """A part of a graph that is run at one rhythm: once per model, per edit, per timestep, or per call.

    ``views`` are the slots that its kernels read in place. ``module`` returns ``results`` user outputs, then the
    ``values`` of later stages, then the ``stores``.
    """

    name: str
    module: GraphModule
    inputs: tuple[Input, ...]
    results: int
    values: tuple[str, ...]
    stores: tuple[Store, ...]
    views: tuple[str, ...] = ()

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
    """What one edit keeps between calls: the results of the stages that do not run in every call."""

    values: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, tuple[tuple[Tensor, int], ...]] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)  # what kernels under way may still read by its address
    bytes_loaded: int = 0


@dataclass
class Executable:
    """A lowered graph: its stages in the order they run.

    ``addressed``: its kernels take the addresses of what they read in place, not the tensors. ``constants``: what is
    made of the weights alone, once; ``packed``: what other graphs made of them.
    """

    stages: list[Stage]
    addressed: bool = False
    constants: dict[str, Any] = field(default_factory=dict)
    packed: Made = field(default_factory=Made)
    _packed: list[int] = field(default_factory=list)

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        plan: Plan | None = None,
        source: SlotSource | None = None,
        memo: Memo | None = None,
    ) -> tuple[list[Tensor], dict[Store, Tensor]]:
        """Run all stages that are due.

        Args:
            inputs: the model's tensor inputs by name, and the controls of a detect graph.
            plan: the mask's tables, for an edit graph.
            source: the recorded step that ``load`` and ``views`` inputs come from.
            memo: kept between the calls of one edit; stages before ``step`` run only when their inputs changed.
        Returns:
            The user outputs, and the stored values.
        """
        memo = memo or Memo()
        self.prepare(inputs, memo)
        outputs: tuple[Any, ...] = ()
        with torch.no_grad():
            for stage in self.stages:
                if stage.name == "step" or (stage.name == "timestep" and _is_due(stage, inputs, memo)):
                    outputs = stage.module(*[self.fetch(w, stage, inputs, plan, source, memo) for w in stage.inputs])
                    memo.values.update(zip(stage.values, outputs[stage.results :], strict=False))
        step = self.stages[-1]
        stored = outputs[step.results + len(step.values) :]
        return list(outputs[: step.results]), dict(zip(step.stores, stored, strict=True))

    def prepare(self, inputs: Mapping[str, Tensor], memo: Memo) -> bool:
        """Run the stages before the timestep's, where weights or text changed; whether any ran."""
        ran = False
        for stage in self.stages:
            if stage.name == "weights":
                addresses = [weight.data_ptr() for weight in stage.weights]
                if addresses != self._packed:  # at first, and after the weights were moved
                    self.constants = dict(zip(stage.values, pack_weights(stage.module, self.packed), strict=True))
                    self._packed, ran = addresses, True
                    memo.inputs.clear()
                if any(memo.values.get(name) is not value for name, value in self.constants.items()):
                    memo.values.update(self.constants)
            elif stage.name == "edit" and _is_due(stage, inputs, memo):
                with torch.no_grad():
                    outputs = stage.module(*[self.fetch(w, stage, inputs, None, None, memo) for w in stage.inputs])
                memo.values.update(zip(stage.values, outputs, strict=True))
                ran = True
        return ran

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


def _is_due(stage: Stage, inputs: Mapping[str, Tensor], memo: Memo) -> bool:
    """Whether a stage's own inputs are other tensors than last time, or may have been written to since."""
    tensors = [inputs[i.name] for i in stage.inputs if i.kind == "user"]
    if any(tensor.is_inference() for tensor in tensors):
        return True  # made in inference mode, which does not count writes
    used = tuple((tensor, tensor._version) for tensor in tensors)
    seen = memo.inputs.get(stage.name)
    if seen is not None and all(a is b and v == w for (a, v), (b, w) in zip(used, seen, strict=True)):
        return False
    memo.inputs[stage.name] = used
    if stage.name == "edit":
        memo.inputs.pop("timestep", None)  # it may read this stage's values
    return True
