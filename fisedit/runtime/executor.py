"""Run lowered graphs: feed each stage its inputs, keep what later stages need, hand out results and stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from fisedit.runtime.plan import MaskPlan, Table


@dataclass(frozen=True)
class Input:
    """Where an input of a stage comes from.

    ``user``: an input of the model by name; ``table``: an index table of the mask; ``load``: a cache slot, whole or
    the rows of a table; ``value``: a result of an earlier stage.
    """

    kind: Literal["user", "table", "load", "value"]
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
    def value(name: str) -> Input:
        return Input("value", name)


@dataclass(frozen=True)
class Store:
    """A slot that a graph writes; ``rows`` names the active rows of its level, ``None`` for values without rows."""

    slot: str
    rows: Table | None


@dataclass
class Stage:
    """A part of a graph that is run at one rhythm: once per edit, per timestep, or per call.

    ``module`` returns ``results`` user outputs, then the ``values`` of later stages, then the ``stores``.
    """

    name: str
    module: GraphModule
    inputs: tuple[Input, ...]
    results: int
    values: tuple[str, ...]
    stores: tuple[Store, ...]


class SlotSource(Protocol):
    """What can be asked for recorded values: a step of a recording."""

    def load(self, slot: str, index: Tensor | None = None) -> Tensor: ...


@dataclass
class Memo:
    """What one edit keeps between calls: the results of the stages that do not run in every call."""

    values: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, tuple[tuple[Tensor, int], ...]] = field(default_factory=dict)
    bytes_loaded: int = 0


@dataclass
class Executable:
    """A lowered graph: its stages in the order they run."""

    stages: list[Stage]

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        plan: MaskPlan | None = None,
        source: SlotSource | None = None,
        memo: Memo | None = None,
    ) -> tuple[list[Tensor], dict[Store, Tensor]]:
        """Run all stages that are due.

        Args:
            inputs: the model's tensor inputs by name, and the controls of a detect graph.
            plan: the mask's tables, for an edit graph.
            source: the recorded step that ``load`` inputs come from.
            memo: kept between the calls of one edit; stages before ``step`` run only when their inputs changed.
        Returns:
            The user outputs, and the stored values.
        """
        memo = memo or Memo()

        def fetch(wanted: Input) -> Any:
            if wanted.kind == "user":
                return inputs[wanted.name]
            if wanted.kind == "value":
                return memo.values[wanted.name]
            assert plan is not None or wanted.key is None
            table = plan.table(wanted.key) if plan is not None and wanted.key is not None else None
            if wanted.kind == "table":
                return table
            assert source is not None
            loaded = source.load(wanted.name, table)
            memo.bytes_loaded += loaded.numel() * loaded.element_size()
            return loaded

        outputs: tuple[Any, ...] = ()
        with torch.no_grad():
            for stage in self.stages:
                if stage.name == "step" or _is_due(stage, inputs, memo):
                    outputs = stage.module(*[fetch(wanted) for wanted in stage.inputs])
                    memo.values.update(zip(stage.values, outputs[stage.results :], strict=False))
        step = self.stages[-1]
        stored = outputs[step.results + len(step.values) :]
        return list(outputs[: step.results]), dict(zip(step.stores, stored, strict=True))


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
