"""Capture a U-Net's forward pass as a functional ATen graph, whoever wrote it."""

from __future__ import annotations

import enum
import inspect
import logging
import math
import re
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from fisedit.errors import InvalidTimestepError, UnsupportedCaptureError
from fisedit.fingerprint import advise

SAMPLE_NAMES = ("sample", "x", "latents", "hidden_states")
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "times", "time_steps", "sigma", "noise_labels", "noise_level")
TEXT_NAMES = ("encoder_hidden_states", "context")
"""What arguments are called where it matters; under other names they are told by their shapes."""
VALUES = (
    type(None), bool, int, float, complex, str, bytes, enum.Enum, uuid.UUID, np.generic,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""Types of constants that cannot change: what an argument of a call may hold besides tensors."""


@dataclass(frozen=True)
class Signature:
    """What a captured graph is specialized to: everything about a call but the values of its tensors."""

    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype, str], ...]
    constants: tuple[tuple[str, Any], ...]
    timestep: torch.dtype | None = None  # as the model gets it; no difference between a recording and its edit

    def differences(self, other: Signature, batches: tuple[int, int] = (1, 1)) -> dict[str, tuple[Any, Any]]:
        """What differs between two calls of the given numbers of samples: name -> (this one's, the other's)."""
        if self.tensors == other.tensors and self.constants == other.constants:
            return {}
        mine, theirs = self._named(), other._named()
        names = [*mine, *(name for name in theirs if name not in mine)]
        pairs = {n: (mine.get(n), theirs.get(n)) for n in names if mine.get(n) != theirs.get(n)}
        return {n: pair for n, pair in pairs.items() if not (n.endswith(" shape") and _same_samples(*pair, *batches))}

    def _named(self) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for name, shape, dtype, device in self.tensors:
            named |= {f"{name} shape": shape, f"{name} dtype": str(dtype), f"{name} device": device}
        return named | {name: value for name, value in self.constants if value is not None}


def _same_samples(mine: Any, theirs: Any, batch: int, other: int) -> bool:
    """Whether two shapes differ in their number of samples alone."""
    if not mine or not theirs:
        return False
    return mine[1:] == theirs[1:] and mine[0] * other == theirs[0] * batch


@dataclass
class Call:
    """One call of the U-Net, its arguments taken apart into named tensors and constants."""

    tensors: dict[str, Tensor]
    constants: dict[str, Any]
    spec: pytree.TreeSpec
    order: tuple[str, ...]
    sample: str
    timestep: str
    timestep_value: float
    text: str | None
    timestep_dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    model: nn.Module | None = None  # what is traced for this call, where that is not the compiled model itself

    @property
    def batch(self) -> int:
        """The number of samples."""
        return len(self.tensors[self.sample])

    @cached_property
    def signature(self) -> Signature:
        tensors = tuple((n, tuple(t.shape), t.dtype, str(t.device)) for n, t in self.tensors.items())
        constants = tuple((name, _hashable(value)) for name, value in self.constants.items())
        autocast = ("autocast", self.autocast and str(self.autocast))
        return Signature(tensors, (*constants, autocast), self.timestep_dtype)

    @property
    def device(self) -> torch.device:
        return self.tensors[self.sample].device

    @property
    def device_type(self) -> str:
        return self.device.type

    def in_autocast(self) -> torch.autocast:
        """A context with the autocast state that the call was made in."""
        return torch.autocast(self.device_type, self.autocast, enabled=self.autocast is not None)

    def arguments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments of the forward, with ``tensors`` in the places of this call's.

        The timestep gets the dtype back that it was given in: some models look it up in a table.
        """
        if (timestep := tensors[self.timestep]).dtype != self.timestep_dtype:
            tensors = {**tensors, self.timestep: timestep.to(self.timestep_dtype)}
        leaves = [tensors[name] if name in tensors else self.constants[name] for name in self.order]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass
class Captured:
    """A functional graph of a forward pass: tensors in by name, tensor leaves out, and how they make the result."""

    module: GraphModule
    signature: Signature
    names: tuple[str, ...]
    out_spec: pytree.TreeSpec
    out_leaves: list[Any]

    def result(self, tensors: list[Tensor]) -> Any:
        """The forward's return value (tuple, dataclass or tensor) from its tensor leaves."""
        remaining = iter(tensors)
        leaves = [next(remaining) if leaf is _TENSOR else leaf for leaf in self.out_leaves]
        return pytree.tree_unflatten(leaves, self.out_spec)


_TENSOR = object()


def bind_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Name a call's arguments; the timestep becomes a float32 tensor ``[B]`` (samplers pass int64, float32, numbers).

    Raises:
        TypeError: the arguments do not fit the model's forward, as Python says it.
        InvalidTimestepError: the samples have different timesteps, or one is NaN.
        UnsupportedCaptureError: the model has no Python forward, an argument holds a function or another object, or
            which is the sample or the timestep cannot be told.
    """
    try:
        bound = _forward_signature(model).bind(*args, **kwargs)
    except ValueError as error:
        reason, advice = "it is TorchScript, whose Python is gone", "Compile the model that it was made from."
        raise UnsupportedCaptureError(model=type(model).__name__, reason=reason, advice=advice) from error
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        arguments |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    sample, timestep = _find_roles(model, bound, arguments)
    value = timestep_value(arguments[timestep])
    timestep_dtype = torch.as_tensor(arguments[timestep]).dtype
    # Filled in, not moved: a copy to a GPU waits for what the GPU is doing.
    like = arguments[sample]
    arguments[timestep] = torch.full((len(like),), value, dtype=torch.float32, device=like.device)
    leaves, spec = pytree.tree_flatten(arguments)
    order = _leaf_names(spec)
    named = dict(zip(order, leaves, strict=True))
    tensors = {name: leaf for name, leaf in named.items() if isinstance(leaf, Tensor)}
    constants = {name: leaf for name, leaf in named.items() if not isinstance(leaf, Tensor)}
    _check_constants(model, constants)
    text = next((n for n in TEXT_NAMES if n in tensors), None)
    text = text or next((n for n, t in tensors.items() if t.dim() == 3), None)
    autocast = _autocast_dtype(like.device.type)
    return Call(tensors, constants, spec, order, sample, timestep, value, text, timestep_dtype, autocast)


_signatures: WeakKeyDictionary[Any, inspect.Signature] = WeakKeyDictionary()


def _forward_signature(model: nn.Module) -> inspect.Signature:
    """The signature of a model's forward, kept by function, so that it is not worked out in every call."""
    forward: Any = model.forward
    if not isinstance(forward, MethodType) or not inspect.isfunction(forward.__func__):
        return inspect.signature(forward)
    if forward.__func__ not in _signatures:
        _signatures[forward.__func__] = inspect.signature(forward)
    return _signatures[forward.__func__]


def with_timestep_tensor(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, the timestep a tensor on the sample's device, made there without waiting for it.

    A compiled model would be compiled again for each new number. What is no call of a U-Net stays as it is.
    """
    try:
        bound = _forward_signature(model).bind(*args, **kwargs)
        sample, timestep = _find_roles(model, bound, bound.arguments)
    except (TypeError, ValueError, UnsupportedCaptureError):
        return args, kwargs  # the model itself says what is wrong
    given, device = bound.arguments[timestep], bound.arguments[sample].device
    if isinstance(given, Tensor) and given.device == device:
        return args, kwargs
    value = given if isinstance(given, Tensor) else torch.as_tensor(given, dtype=_number_dtype(given))
    if value.numel() == 1:
        bound.arguments[timestep] = torch.full(value.shape, value.item(), dtype=value.dtype, device=device)
    else:
        bound.arguments[timestep] = value.to(device)
    return bound.args, bound.kwargs


def _number_dtype(value: Any) -> torch.dtype | None:
    return torch.float64 if isinstance(value, float) else None


def _find_roles(model: nn.Module, bound: inspect.BoundArguments, arguments: dict[str, Any]) -> tuple[str, str]:
    """Which arguments are the sample and the timestep: by their names, else by their shapes.

    Raises:
        UnsupportedCaptureError: one of them cannot be told.
    """
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    rest = [name for name in bound.arguments if kinds[name] is inspect.Parameter.VAR_POSITIONAL]
    maps = [n for n, value in arguments.items() if isinstance(value, Tensor) and value.dim() == 4]
    sample = next((n for n in (*SAMPLE_NAMES, *maps) if n in maps), None)
    batch = len(arguments[sample]) if sample is not None else 0
    named = [n for n in TIMESTEP_NAMES if n in arguments]
    timestep = next((n for n in (*named, *arguments) if _is_timestep(arguments[n], batch)), None)
    if rest:
        reason = f"its forward takes arguments without names (*{rest[0]})"
    elif sample is None:
        reason = f"none of its arguments ({', '.join(arguments)}) is a map [B, C, H, W]"
    elif timestep is None:
        reason = f"none of its arguments ({', '.join(arguments)}) is a timestep: a number, or one for each sample"
    else:
        return sample, timestep
    advice = "Give its forward named parameters, such as (sample, timestep, encoder_hidden_states) or (x, t, context)."
    raise UnsupportedCaptureError(model=type(model).__name__, reason=reason, advice=advice)


def _is_timestep(value: Any, batch: int) -> bool:
    if isinstance(value, (bool, str)) or not isinstance(
        value, (Tensor, int, float, np.generic, np.ndarray, list, tuple)
    ):
        return False
    try:
        given = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return given.numel() in (1, batch) and given.dtype != torch.bool and max(given.shape, default=1) == given.numel()


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def timestep_value(timestep: Any) -> float:
    """The one value of a timestep: a number, an array or a tensor of equal elements.

    Raises:
        InvalidTimestepError: it has several values, or is NaN.
    """
    values = sorted(set(_elements(torch.as_tensor(timestep))))
    if len(values) != 1 or math.isnan(values[0]):
        raise InvalidTimestepError(given=values)
    return float(values[0])


_schedules: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
LONGEST_SCHEDULE = 10_000
WAITING = ("cuda", "xpu", "mps")
"""Devices that work while Python goes on, so that reading a value waits for them."""


def _elements(timestep: Tensor) -> list[Any]:
    """The elements, or one where all are the same place in memory.

    Reading a tensor waits for the GPU that it is on. Samplers iterate over one tensor, whose views the timesteps are:
    that is read whole, once, as long as nothing is written to it.
    """
    whole = timestep._base
    repeated = all(stride == 0 or size == 1 for stride, size in zip(timestep.stride(), timestep.shape, strict=True))
    if whole is None or timestep.device.type not in WAITING or not repeated or timestep.dtype != whole.dtype:
        return timestep.flatten().tolist()
    if whole.is_inference() or whole.dim() != 1 or not whole.is_contiguous() or len(whole) > LONGEST_SCHEDULE:
        return timestep.flatten().tolist()
    read = _schedules.get(whole)
    if read is None or read[0] != whole._version:
        _schedules[whole] = read = whole._version, whole.tolist()
    place = timestep.storage_offset() - whole.storage_offset()
    return [read[1][place]]


@lru_cache(64)
def _leaf_names(spec: pytree.TreeSpec) -> tuple[str, ...]:
    """A name for each place in the arguments; two places never share one."""
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
    names: list[str] = []
    for path, _ in paths:
        name = re.sub(r"\W+", "_", pytree.keystr(path)).strip("_") or "input"
        while name in names:
            name += "_"
        names.append(name)
    return tuple(names)


def _check_constants(model: nn.Module, constants: dict[str, Any]) -> None:
    """Raise for a constant whose state a graph would freeze, unseen: functions, generators, arrays, other objects."""
    for name, value in constants.items():
        if not isinstance(value, VALUES):
            reason = f"the argument {name} is a {type(value).__name__}, which may change without being seen"
            advice = (
                "Pass tensors, numbers and strings; keep functions that are hooked into the model out of its calls."
            )
            raise UnsupportedCaptureError(model=type(model).__name__, reason=reason, advice=advice)


def _hashable(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


class _Functional(nn.Module):
    """The model as a function of tensors alone; tells ``on_structure`` the structure of what it returned."""

    def __init__(self, model: nn.Module, call: Call, on_structure: Callable[[list[Any]], None]) -> None:
        super().__init__()
        self.model = model
        self.call = call
        self.on_structure = on_structure  # a callback, since export restores attributes after tracing

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = self.model(**self.call.arguments(dict(zip(self.call.tensors, tensors, strict=True))))
        leaves, spec = pytree.tree_flatten(out)
        self.on_structure([spec, [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]])
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def capture(model: nn.Module, call: Call) -> Captured:
    """Trace ``model`` for calls of this signature with ``torch.export`` (non-strict), parameters shared, not copied.

    The graph holds the ATen ops as the model calls them (convolution, group_norm, attention whole). A graph that writes
    in place is functionalized; none of the model classes' names matters.

    Raises:
        UnsupportedCaptureError: the model cannot be traced, or is in training mode with active dropout.
    """
    structure: list[Any] = []
    functional = _Functional(model, call, structure.extend)
    tensors = tuple(tensor.detach() for tensor in call.tensors.values())
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(functional, tensors, strict=False)
            if call.autocast is not None or any(_is_compound(node) for node in exported.graph.nodes):
                exported = exported.run_decompositions({})  # in place writes and autocast become ops
            module = exported.module(check_guards=False)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else 'no message'}"
        advice = advise(model, UnsupportedCaptureError.advice)
        raise UnsupportedCaptureError(model=type(model).__name__, reason=reason, advice=advice) from error
    _name_inputs(module, call)
    return Captured(module, call.signature, tuple(call.tensors), *structure)


def _is_compound(node: torch.fx.Node) -> bool:
    """Whether a node writes in place, or holds a graph of its own (autocast inside the forward)."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _name_inputs(module: GraphModule, call: Call) -> None:
    """Give the placeholders the names of the arguments, and say which are the timestep and the text."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, call.tensors, strict=True):
        node.target = name
        node.name = name
        if name in (call.timestep, call.text):
            node.meta["role"] = "timestep" if name == call.timestep else "text"
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (path.removeprefix("model").removeprefix("."), kind) for key, (path, kind) in stack.items()
            }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what tracing says about itself; nothing of it is about the user's model."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
