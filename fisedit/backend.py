"""``torch.compile(unet, backend="fisedit")``: record and edit a model that Dynamo traces.

Dynamo hands over the graph of a forward pass with its weights as inputs. Outside sessions it runs as it is (or by the
backend named in ``options={"dense": "inductor"}``). Inside ``fisedit.record(unet)`` and ``fisedit.edit(unet, base)``
it goes the way of any other module: :class:`Frame` makes it one.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend, register_backend
from torch._dynamo.eval_frame import OptimizedModule
from torch.fx import GraphModule, Node

from fisedit.api import compile
from fisedit.capture import TIMESTEP_NAMES, bind_call
from fisedit.edit import Edit
from fisedit.errors import UnknownOptionError, UnsupportedCaptureError
from fisedit.module import CompiledUNet, active_session, run_call
from fisedit.recording import Recording

_handles: weakref.WeakKeyDictionary[OptimizedModule, CompiledUNet] = weakref.WeakKeyDictionary()


@register_backend
def fisedit(graph: GraphModule, inputs: Sequence[Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """The Dynamo backend, known to it by this name once the package is imported.

    Raises:
        UnknownOptionError: an option other than ``dense``.
    """
    options = dict(options or {})
    dense = lookup_backend(options.pop("dense", "eager"))(graph, list(inputs))
    if options:
        raise UnknownOptionError(option="options", given=options, allowed="{'dense': the backend outside sessions}")
    frames: list[Frame] = []

    def run(*args: Any) -> Any:
        unet = next((unet for unet in list(_handles.values()) if _is_of(args, unet)), None)
        session = active_session(unet) if unet is not None else None
        if unet is None or session is None:
            return dense(*args)
        if not frames or not frames[0].holds(args):  # modules of the same code share a graph
            frames[:] = [Frame(graph, args, unet)]
        call = bind_call(frames[0], (), frames[0].named(args))
        return run_call(session, replace(call, model=frames[0]))

    return run


def _is_of(args: Sequence[Any], unet: CompiledUNet) -> bool:
    weight = next((value for value in args if isinstance(value, nn.Parameter)), None)
    return weight is not None and any(parameter is weight for parameter in unet.parameters())


class Frame(nn.Module):
    """A graph of Dynamo as a module: its weights are parameters and buffers again, its other inputs keywords.

    Raises:
        UnsupportedCaptureError: the timestep is no input of the graph.
    """

    def __init__(self, graph: GraphModule, args: Sequence[Any], unet: CompiledUNet) -> None:
        super().__init__()
        self.graph_module = [graph]  # in a list: its own copies of weights are none of this module's
        self.names: dict[int, str] = {}
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        for place, (node, value) in enumerate(zip(placeholders, args, strict=True)):
            if isinstance(value, nn.Parameter):
                self.register_parameter(f"weight_{place}", value)
            elif isinstance(value, Tensor) and re.match("[lL]_self_", str(node.target)):
                self.register_buffer(f"weight_{place}", value)
            else:
                self.names[place] = _input_name(node, unet)
        self.weights = {
            place: getattr(self, f"weight_{place}") for place in range(len(args)) if place not in self.names
        }
        timestep = next((place for place, name in self.names.items() if name in TIMESTEP_NAMES), None)
        if timestep is None:
            raise UnsupportedCaptureError(
                model="The graph of torch.compile",
                reason=f"it has no timestep among its inputs ({', '.join(self.names.values())})",
                advice="Call the model with the timestep as a tensor, by the name timestep, timesteps or t, and "
                "compile it with fullgraph=True: a graph that is broken in two cannot be edited.",
            )
        self.timestep, self.example = self.names[timestep], args[timestep]

    def holds(self, args: Sequence[Any]) -> bool:
        return all(args[place] is weight for place, weight in self.weights.items())

    def named(self, args: Sequence[Any]) -> dict[str, Any]:
        """A call's inputs by name, maps first."""
        named = {name: args[place] for place, name in self.names.items()}
        return dict(sorted(named.items(), key=lambda item: not isinstance(item[1], Tensor) or item[1].dim() != 4))

    def forward(self, **inputs: Any) -> Any:
        value = inputs[self.timestep]  # float32 [B], as bind_call makes it
        if isinstance(self.example, Tensor):
            value = value[: self.example.numel()].reshape(self.example.shape).to(self.example.dtype)
        given = {place: value if name == self.timestep else inputs[name] for place, name in self.names.items()}
        return self.graph_module[0](*(value for _, value in sorted({**self.weights, **given}.items())))


def _input_name(node: Node, unet: CompiledUNet) -> str:
    """The name of the forward's argument behind an input: ``L_sample_``, or ``L_args_0_`` of a decorated forward."""
    name = re.sub(r"^[lL]_(kwargs_)?|_$", "", str(node.target))
    position = re.fullmatch(r"args_(\d+)", name)
    if position is None:
        return name
    names = list(inspect.signature(unet.forward).parameters)
    return names[int(position[1])] if int(position[1]) < len(names) else name


def handle(model: nn.Module) -> CompiledUNet:
    """What records and edits ``model``.

    Raises:
        UnknownOptionError: it is compiled neither by ``fisedit.compile`` nor by ``torch.compile``.
    """
    if isinstance(model, CompiledUNet):
        return model
    if not isinstance(model, OptimizedModule):
        allowed = "a module that fisedit.compile or torch.compile(..., backend='fisedit') returned"
        raise UnknownOptionError(option="model", given=type(model).__name__, allowed=allowed)
    if model not in _handles:
        _handles[model] = compile(model._orig_mod)
    return _handles[model]


def record(model: nn.Module) -> AbstractContextManager[Recording]:
    """``model.record()``, also for ``torch.compile(..., backend="fisedit")``; see :meth:`CompiledUNet.record`."""
    return handle(model).record()


def edit(model: nn.Module, base: Any, mask: Any = None, **options: Any) -> AbstractContextManager[Edit]:
    """``model.edit(base, mask)``, also for ``torch.compile(..., backend="fisedit")``.

    See :meth:`CompiledUNet.edit` for the options.
    """
    return handle(model).edit(base, mask, **options)


def load_recording(model: nn.Module, folder: Path | str, *, verify: bool = True) -> Recording:
    """``model.load_recording(folder)``, also for ``torch.compile(..., backend="fisedit")``.

    See :meth:`CompiledUNet.load_recording`.
    """
    return handle(model).load_recording(folder, verify=verify)
