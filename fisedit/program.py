"""The graphs of one call signature: which passes make them, and what they look like."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit.capture import Captured
from fisedit.config import CompileConfig
from fisedit.passes import ir, pipeline
from fisedit.passes.base import GraphPass, PassLog, run_passes
from fisedit.passes.insert_cache_loads import loaded_slots
from fisedit.passes.lower import lower
from fisedit.passes.plan_memory import memory_line
from fisedit.passes.slot_uses import slot_uses
from fisedit.passes.slots import Slot
from fisedit.runtime import dense
from fisedit.runtime.cache.block import Use
from fisedit.runtime.cache.keys import STEPS, KeysPlan, plan_keys
from fisedit.runtime.cache.tiers import Tiers
from fisedit.runtime.cuda_graph import Replays
from fisedit.runtime.executor import Executable
from fisedit.runtime.kernels import choose_provider
from fisedit.runtime.packed_weights import Made


@dataclass
class Program:
    """The graphs of one call signature, each built when first needed, with the log of the passes that made it."""

    captured: Captured
    config: CompileConfig
    logs: dict[str, PassLog] = field(default_factory=dict)
    graphs: dict[str, GraphModule] = field(default_factory=dict)
    executables: dict[str, Executable] = field(default_factory=dict)
    compilations: list[dense.Compilation] = field(default_factory=list)
    packed: Made = field(default_factory=Made)
    keys_plan: KeysPlan | None = None
    _replays: dict[bool, Replays] = field(default_factory=dict)
    _wanted: dict[str, list[str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def executable(self, kind: str, store: bool = False) -> Executable:
        """``kind`` is ``"record"``, ``"detect"`` or ``"edit"``; ``store``: also keep what a later edit will load."""
        name = f"{kind}_store" if store else kind
        if name not in self.executables:
            slots = self.slots if store or kind == "record" else ()
            quantize = self.quantized if slots else frozenset[str]()
            passes = {
                "record": lambda: pipeline.record_passes(slots, self._compiles, quantize),
                "detect": lambda: pipeline.detect_passes(slots, self._compiles, quantize),
                "edit": lambda: pipeline.edit_passes(self.kv, slots, self.fused, quantize),
            }[kind]()
            self.executables[name] = lower(self._run(name, passes), self.provider if kind == "edit" else "reference")
            self.executables[name].packed = self.packed
            if kind != "edit":
                self._compile(name)
        return self.executables[name]

    @property
    def provider(self) -> str:
        """Whose kernels run the edit graph."""
        device = self.captured.signature.tensors[0][3]
        return choose_provider(self.config.provider, torch.device(device))

    @property
    def fused(self) -> bool:
        """Whether the edit graph is of fused ops over rows of fixed sizes, for a GPU."""
        return self.provider == "triton"

    @cached_property
    def digest(self) -> str:
        """What tells the captured graph, after whose nodes recorded values are named, from others."""
        return _digest(self.captured.module.graph)

    def replays(self, store: bool = False) -> Replays:
        """The captured CUDA graphs of the fused edit graph."""
        executable = self.executable("edit", store)
        with self._lock:
            if store not in self._replays:
                self._replays[store] = Replays(executable)
            return self._replays[store]

    @property
    def _compiles(self) -> bool:
        """Whether dense graphs are compiled: on a GPU, unless the user does not want it."""
        devices = {device.partition(":")[0] for _, _, _, device in self.captured.signature.tensors}
        return self.config.dense == "inductor" and devices <= set(dense.DEVICES)

    def _compile(self, name: str) -> None:
        """Let a dense graph be compiled at its first call, where such graphs are."""
        if self._compiles:
            self.compilations.append(dense.Compilation(name))
            self.executables[name] = dense.compiled(self.executables[name], self.compilations[-1])

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What a recording must keep: all that the edit and the detect graph load."""
        self.executable("edit")
        self.executable("detect")
        loaded = loaded_slots(self.graphs["edit"].graph) | loaded_slots(self.graphs["detect"].graph)
        return tuple(sorted(loaded))

    @cached_property
    def uses(self) -> dict[str, Use]:
        """How each slot of a recording is read."""
        self.executable("edit")
        self.executable("detect")
        return slot_uses(self.graphs["edit"].graph, self.graphs["detect"].graph)

    def wanted(self, kind: str) -> list[str]:
        """The slots that an edit or a detect graph cannot do without, apart from statistics."""
        if kind not in self._wanted:
            self.executable(kind)
            loaded = {slot.key for slot in loaded_slots(self.graphs[kind].graph)}
            self._wanted[kind] = sorted(slot for slot in loaded if self.uses[slot].kind != "small")
        return self._wanted[kind]

    def plan_keys(self, tiers: Tiers, known: KeysPlan | None) -> KeysPlan | None:
        """Choose how keys and values are kept, where the user leaves it to us; before anything is recorded.

        Args:
            known: what was chosen for other signatures of the model: one recording may be edited in calls of several.
        """
        if self.config.kv != "auto":
            return None
        self.executable("edit")
        plan = self.keys_plan = known or self._plan_keys(tiers)
        self.config = replace(self.config, kv=plan.kv)
        if plan.kv == "active":  # another graph, and other slots
            for made in (self.graphs, self.executables, self.logs):
                made.pop("edit")
            self.__dict__.pop("uses", None)
            self._wanted.clear()
        return plan

    def _plan_keys(self, tiers: Tiers) -> KeysPlan:
        sizes = {
            str(ir.args(node)[0]): node.meta["recorded"].nbytes
            for node in self.graphs["edit"].graph.nodes
            if ir.is_op(node, ir.fisedit.cache_load.default, ir.fisedit.cache_view.default)
        }
        keys = sum(size for slot, size in sizes.items() if self.uses[slot].kind == "keys")
        weights = sum(weight.nbytes for weight in self.captured.module.parameters())
        first, last = self.config.cache.steps or (1, None)
        steps = (last or max(STEPS, first)) - first + 1
        return plan_keys(keys, weights, tiers.limit(tiers.order[0]), tiers.bandwidth, steps)

    @property
    def kv(self) -> str:
        """The keys and values of self-attention that an edit sees."""
        return "active" if self.config.kv == "active" else "cached"

    @property
    def quantized(self) -> frozenset[str]:
        """The slots that are stored in 8 bits."""
        kinds = {"maps", "keys", "queries"} if self.config.cache.storage == "int8" else set()
        kinds |= {"keys"} if self.config.kv == "int8" else set()
        return frozenset(slot for slot, use in self.uses.items() if use.kind in kinds)

    def _run(self, name: str, passes: list[GraphPass]) -> GraphModule:
        canonical = self.captured.module
        self.graphs[name] = GraphModule(canonical, ir.copy_graph(canonical.graph))
        self.logs[name] = PassLog(name)
        run_passes(self.graphs[name], passes, self.logs[name])
        return self.graphs[name]

    def inspect(self, kind: str = "edit") -> str:
        """The graph ``kind`` as text, the passes that made it, and every place that a pass refused."""
        self.executable(kind)
        lines = [ir.print_graph(self.graphs[kind].graph), "passes:"]
        for log in (self.logs["canonical"], self.logs[kind]):
            for record in log.records:
                lines.append(f"  {log.graph}/{record.name}: {record.result.matched} places, {record.nodes} nodes after")
            lines += [f"    left alone by {name}: {r.node} ({r.reason})" for name, r in log.refusals]
        if states := [str(compilation) for compilation in self.compilations if compilation.used]:
            lines.append("compiled by Inductor: " + "; ".join(states))
        if kind == "edit":
            lines.append(memory_line(self.graphs[kind].graph))
        if self.keys_plan is not None:
            lines.append(f"keys and values: {self.keys_plan.kv}, since {self.keys_plan.reason}")
        islands = self.islands
        lines.append("dense islands: " + ("; ".join(islands) if islands else "none"))
        return "\n".join(lines)

    @property
    def islands(self) -> list[str]:
        """Ops that stay dense: ``node (op, module): why``."""
        return [
            f"{node.name} ({node.target}, {ir.module_path(node) or 'top level'}): {node.meta['island']}"
            for node in self.graphs["edit"].graph.nodes
            if "island" in node.meta
        ]


def _digest(graph: Graph) -> str:
    """The SHA-256 of a graph's nodes: names, ops, wiring and constants, but for whole numbers, which are those of one
    size and batch, and devices."""
    lines = (f"{node.name} {node.op} {node.target} {_plain(node.args)} {_plain(node.kwargs)}" for node in graph.nodes)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return f"{value:.12g}"
    if value is None or isinstance(value, (bool, str, torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    return "*"
