"""What a U-Net is at one moment: whatever its forward pass reads, so that no graph outlives a change of the model."""

from __future__ import annotations

import argparse
import enum
import functools
import operator
import sys
import types
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES = 16
"""How many elements of a tensor are looked at, for writes that PyTorch does not count (through ``.data``)."""

_PLAIN = frozenset({
    type(None), bool, int, str, bytes, complex, torch.dtype, torch.device, torch.layout, torch.Size, torch.memory_format
})  # fmt: skip
# What modules keep on an instance that says nothing about what forward computes, or that is looked at otherwise. An
# offload hook moves weights; they are the same wherever they are.
_IGNORED = frozenset({
    "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "_is_full_backward_hook",
    "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_compiled_call_impl",
    "forward", "_old_forward", "_hf_hook",
})  # fmt: skip
_REGISTRIES = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_LABELS = frozenset({"_class_name", "_diffusers_version", "_name_or_path"})  # written into a config when it is saved
_BAGS = (types.SimpleNamespace, argparse.Namespace)
_ABSENT = object()


@dataclass(frozen=True)
class Fingerprint:
    """What a forward pass reads: settings by module, tensors by name. Equal if nothing was changed between the two."""

    modules: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, tuple[Any, ...]]

    def changes(self, other: Fingerprint) -> list[str]:
        """The attributes that differ, as dotted names."""
        found = []
        for name in dict.fromkeys((*self.modules, *other.modules)):
            keys = _differing(self.modules.get(name, {}), other.modules.get(name, {}))
            found += [f"{name}.{key}".removeprefix(".") for key in keys]
        return list(dict.fromkeys(found + _differing(self.tensors, other.tensors)))


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [k for k in dict.fromkeys((*mine, *theirs)) if mine.get(k, _ABSENT) != theirs.get(k, _ABSENT)]


def describe_changes(changes: list[str], shown: int = 3) -> str:
    """Names of what changed as a phrase: the first few, and how many more."""
    more = f" and {len(changes) - shown} more" if len(changes) > shown else ""
    return ", ".join(changes[:shown]) + more


@dataclass(eq=False)
class ModelState:
    """A model as it was found unchanged, shared by the recordings made of it. The first call may add to what is seen
    (caches that are filled once): then ``fingerprint`` is that after it. ``weights``: their hash, once somebody asked
    for it (:func:`fisedit.identity.hash_weights`)."""

    fingerprint: Fingerprint
    weights: str | None = None

    def changes(self, other: ModelState) -> str:
        """What differs, as a phrase; empty if nothing does."""
        return "" if self is other else describe_changes(self.fingerprint.changes(other.fingerprint))


@dataclass
class _Seen:
    """What the last reading saw of a module: while the same objects are in it, only the mutable ones are read again.

    Args:
        held: the dictionary of its attributes and its registries, with what was in each; those with nothing: ``empty``.
    """

    module: nn.Module
    kind: type
    held: list[tuple[dict[str, Any], list[str], list[Any]]]
    empty: list[dict[str, Any]]
    facts: dict[str, Any]
    children: list[tuple[str, nn.Module]] = field(default_factory=list)
    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    mutable: list[tuple[str, Any]] = field(default_factory=list)

    def holds(self) -> bool:
        """Whether the same objects are still in it."""
        if type(self.module) is not self.kind or vars(self.module) is not self.held[0][0] or any(self.empty):
            return False
        return all(
            list(current) == keys and all(map(operator.is_, values, current.values()))
            for current, keys, values in self.held
        )


@dataclass
class _Registered:
    """The modules of a model that are registered, in the order in which they are met, their names and their tensors."""

    seen: list[tuple[str, _Seen]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)  # by identity
    tensors: dict[str, Tensor] = field(default_factory=dict)
    tensor_names: dict[int, str] = field(default_factory=dict)

    def holds(self, model: nn.Module) -> bool:
        """Whether nothing of it was replaced."""
        return bool(self.seen) and self.seen[0][1].module is model and all(seen.holds() for _, seen in self.seen)

    def add(self, name: str, module: nn.Module, known: Mapping[int, _Seen]) -> list[tuple[str, _Seen]]:
        """Add a module and all that are registered in it, each under the first name that it is met by.

        Args:
            known: of modules by identity; one that holds is not looked at again.
        Returns: what was added.
        """
        first, waiting = len(self.seen), deque([(name, module)])
        self.names[id(module)] = name
        while waiting:
            name, module = waiting.popleft()
            seen = known.get(id(module))
            if seen is None or not seen.holds():
                seen = _first_look(module)
            self.seen.append((name, seen))
            prefix = f"{name}." if name else ""
            for key, child in seen.children:
                if id(child) not in self.names:
                    self.names[id(child)] = prefix + key
                    waiting.append((prefix + key, child))
            for key, tensor in seen.tensors:
                self.add_tensor(prefix + key, tensor)
        return self.seen[first:]

    def add_tensor(self, name: str, tensor: Tensor) -> str:
        known = self.tensor_names.setdefault(id(tensor), name)
        self.tensors[known] = tensor
        return known


class Fingerprinter:
    """Looks at everything that a model's forward pass reads.

    That is, for each module: its class; its parameters and buffers (which tensor it is, its dtype and shape, PyTorch's
    count of writes to it, and ``SAMPLES`` of its elements); its attributes, through dicts, lists, tuples, sets and
    objects; its forward hooks and a ``forward`` of the instance's own, with the variables that they close over; and
    any module found that way. Where weights are (device, memory format, offload hooks) makes no difference, nor do
    the last bits of a float setting, which LoRA scales and unscales in every call.

    A write through ``.data`` is noticed if it changes one of the elements looked at: one to a whole tensor is, one to
    a few of its elements may not be. Global variables are not looked at.
    """

    def __init__(self) -> None:
        self._registered = _Registered()

    def read(self, model: nn.Module) -> Fingerprint:
        if not self._registered.holds(model):
            registered, before = _Registered(), self._registered.seen
            registered.add("", model, {id(seen.module): seen for _, seen in before})
            self._registered = registered
        return _Reading(self._registered).read()


class _Reading:
    """What is in the mutable attributes of registered modules, and of modules that are met there."""

    def __init__(self, registered: _Registered) -> None:
        self.waiting = deque(registered.seen)
        self.found = _Registered([], dict(registered.names), dict(registered.tensors), dict(registered.tensor_names))
        self.described: dict[int, Any] = {}

    def read(self) -> Fingerprint:
        modules: dict[str, Mapping[str, Any]] = {}
        while self.waiting:
            name, seen = self.waiting.popleft()
            described = {key: self.describe(f"{name}.{key}".removeprefix("."), v) for key, v in seen.mutable}
            modules[name] = seen.facts | described if described else seen.facts
        return Fingerprint(modules, _tensor_facts(self.found.tensors))

    def meet(self, name: str, module: nn.Module) -> str:
        if id(module) not in self.found.names:
            self.waiting += self.found.add(name, module, {})
        return self.found.names[id(module)]

    def describe(self, name: str, value: Any) -> Any:
        """``value`` as something to compare: plain values themselves, the rest by what is in it."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is float:
            return _rounded(value)
        if isinstance(value, Tensor):
            return "tensor", self.found.add_tensor(name, value)
        if isinstance(value, nn.Module):
            return "module", self.meet(name, value)
        if isinstance(value, np.generic):
            return self.describe(name, value.item())
        if isinstance(value, (type, types.BuiltinFunctionType, enum.Enum)):
            return id(value)
        if id(value) not in self.described:
            self.described[id(value)] = "circle"  # what is met again inside itself
            self.described[id(value)] = self._inside(name, value)
        return self.described[id(value)]

    def _inside(self, name: str, value: Any) -> Any:
        if isinstance(value, (dict, types.MappingProxyType)):
            described = ((k, self.describe(f"{name}.{k}", v)) for k, v in value.items() if k not in _LABELS)
            return {k if type(k) in _PLAIN else id(k): v for k, v in described}
        if isinstance(value, (list, tuple, deque)):
            return [self.describe(f"{name}.{i}", item) for i, item in enumerate(value)]
        if isinstance(value, (set, frozenset)):
            return {item if type(item) in _PLAIN else id(item) for item in value}
        if isinstance(value, types.MethodType):
            return self.describe(name, value.__func__), self.describe(name, value.__self__)
        if isinstance(value, types.FunctionType):
            carried = [*_closure(value), value.__defaults__, value.__kwdefaults__]
            return [id(value.__code__), *(self.describe(name, part) for part in carried)]
        if isinstance(value, functools.partial):
            return [self.describe(name, part) for part in (value.func, value.args, value.keywords)]
        if isinstance(value, np.ndarray):
            return value.shape, value.tobytes() if value.nbytes < 2**16 else id(value)
        attributes = {} if _is_library(type(value)) else getattr(value, "__dict__", {})
        return id(type(value)), {key: self.describe(f"{name}.{key}", item) for key, item in attributes.items()}


def _registry(module: nn.Module, name: str) -> dict[str, Any]:
    registry = vars(module).get(name)
    return registry if isinstance(registry, dict) else {}  # TorchScript has none; it is refused at the first call


def _first_look(module: nn.Module) -> _Seen:
    state = vars(module)
    registries = [registry for name in _REGISTRIES if isinstance(registry := state.get(name), dict)]
    held = [(current, list(current), list(current.values())) for current in (state, *registries) if current]
    seen = _Seen(module, type(module), held, [registry for registry in registries if not registry],
                 {"class": id(type(module))})  # fmt: skip
    seen.children = [(key, child) for key, child in _registry(module, "_modules").items() if child is not None]
    for name in ("_parameters", "_buffers"):
        seen.tensors += [(key, tensor) for key, tensor in _registry(module, name).items() if tensor is not None]
    for key, value in state.items():
        if key in _IGNORED or (key in ("_forward_hooks", "_forward_pre_hooks") and not value):
            continue
        if type(value) in _PLAIN or (type(value) is tuple and all(type(item) in _PLAIN for item in value)):
            seen.facts[key] = value
        elif type(value) is float:
            seen.facts[key] = _rounded(value)
        else:
            seen.mutable.append((key, value))
    if (forward := own_forward(module)) is not None:
        seen.mutable.append(("forward", forward))
    # Names alone: what is in them is looked at as modules and tensors of their own.
    seen.facts |= {f"{key}": "module" for key, _ in seen.children} | {f"{key}": "tensor" for key, _ in seen.tensors}
    return seen


def own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The ``forward`` set on the instance in place of its class's, without accelerate's hook around it, if any."""
    state = vars(module)
    forward = state.get("_old_forward" if "_hf_hook" in state else "forward")
    of_class = isinstance(forward, types.MethodType) and forward.__func__ is getattr(type(module), "forward", None)
    return None if of_class else forward


def advise(model: nn.Module, otherwise: str) -> str:
    """What to undo of a model that cannot be captured: what was put in the place of its modules' forward, if it was."""
    replaced = [name or "the U-Net" for name, module in model.named_modules() if own_forward(module) is not None]
    if not replaced:
        return otherwise
    return f"Undo what replaced forward on {describe_changes(replaced)} (a patch, or hooks that load or cast weights)."


def _rounded(value: float) -> float:
    return float(f"{value:.12g}")


def _closure(function: types.FunctionType) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            cells.append(None)
    return cells


def _is_library(kind: type) -> bool:
    """Whether objects of a class are not looked into: PyTorch's and the standard library's (loggers, locks)."""
    root = kind.__module__.partition(".")[0]
    return root == "torch" or (root in sys.stdlib_module_names and kind not in _BAGS)


def _tensor_facts(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    samples = _samples(tensors)
    facts: dict[str, tuple[Any, ...]] = {}
    for name, tensor in tensors.items():
        facts[name] = tensor.dtype, tensor.shape
        if not tensor.is_meta:  # weights that are offloaded to elsewhere are other tensors after each call
            version = 0 if tensor.is_inference() else tensor._version
            facts[name] += id(tensor), version, samples.get(name)
    return facts


def _samples(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The bytes of some elements of each tensor, on a diagonal so that the memory format makes no difference."""
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = defaultdict(dict)
    taken: dict[str, bytes] = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta:
                stride = _diagonal(tensor.shape, tensor.stride())
                if stride is not None:
                    groups[tensor.device, tensor.dtype][name] = tensor.as_strided((SAMPLES,), (stride,))
        for group in groups.values():
            data = torch.cat(list(group.values())).view(torch.uint8).cpu().numpy().tobytes()
            length = len(data) // len(group)
            taken |= {name: data[i * length : (i + 1) * length] for i, name in enumerate(group)}
    return taken


@functools.lru_cache(4096)
def _diagonal(shape: torch.Size, strides: tuple[int, ...]) -> int | None:
    """The stride of ``SAMPLES`` elements from the first of a tensor to near its last; ``None`` if it has none."""
    if 0 in shape:
        return None
    return sum(stride * ((size - 1) // (SAMPLES - 1)) for size, stride in zip(shape, strides, strict=True))
