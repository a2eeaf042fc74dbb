"""``compile``: the whole pipeline on one page. capture -> passes -> lower -> executor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fisedit.capture import Call, Captured, capture
from fisedit.config import CompileConfig
from fisedit.module import CompiledUNet
from fisedit.passes import ir, pipeline
from fisedit.passes.base import GraphPass, PassLog, run_passes
from fisedit.passes.insert_cache_loads import loaded_slots
from fisedit.passes.lower import lower
from fisedit.passes.slots import Slot
from fisedit.runtime.executor import Executable


def compile(unet: nn.Module, config: CompileConfig | None = None, **options: Any) -> CompiledUNet:
    """Make a U-Net that can record a run and edit it sparsely; otherwise it is the same dense model.

    The result takes the place of ``unet`` in any Stable Diffusion code and shares its parameters. Nothing is traced
    now: the first call inside ``record()`` or ``edit()`` captures the graph for its shapes, dtype and device.

    Args:
        unet: any module ``unet(sample [B, C, H, W], timestep, ...)``, in eval mode.
        config: a :class:`CompileConfig`, or its fields as keyword ``options`` (``kv``, ``cost``, ``provider``).

    Raises:
        UnknownOptionError: an option has a value that it does not take.
        TypeError: ``unet`` is not a module, or an option does not exist.
    """
    if isinstance(unet, CompiledUNet):
        return unet
    if not isinstance(unet, nn.Module):
        raise TypeError(f"compile takes the U-Net module (pipe.unet), not {type(unet).__name__}")
    return CompiledUNet(unet, config or CompileConfig(**options), build_program)


@dataclass
class Program:
    """The graphs of one call signature, each built when first needed, with the log of the passes that made it."""

    captured: Captured
    config: CompileConfig
    logs: dict[str, PassLog] = field(default_factory=dict)
    graphs: dict[str, GraphModule] = field(default_factory=dict)
    executables: dict[str, Executable] = field(default_factory=dict)

    def executable(self, kind: str, store: bool = False) -> Executable:
        """``kind`` is ``"record"``, ``"detect"`` or ``"edit"``; ``store``: also keep what a later edit will load."""
        name = f"{kind}_store" if store else kind
        if name not in self.executables:
            passes = {
                "record": lambda: pipeline.record_passes(self.slots),
                "detect": lambda: pipeline.detect_passes(self.slots if store else ()),
                "edit": lambda: pipeline.edit_passes(self.config.kv, self.slots if store else ()),
            }[kind]()
            self.executables[name] = lower(self._run(name, passes), self.config.provider)
        return self.executables[name]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What a recording must keep: all that the edit and the detect graph load."""
        self.executable("edit")
        self.executable("detect")
        loaded = loaded_slots(self.graphs["edit"].graph) | loaded_slots(self.graphs["detect"].graph)
        return tuple(sorted(loaded))

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


def build_program(unet: nn.Module, call: Call, config: CompileConfig) -> Program:
    """Capture ``unet`` for one call signature and bring its graph into canonical form.

    Raises:
        UnsupportedCaptureError: the model cannot be traced.
    """
    program = Program(capture(unet, call), config)
    program.logs["canonical"] = PassLog("canonical")
    run_passes(program.captured.module, pipeline.canonical_passes(), program.logs["canonical"])
    return program
