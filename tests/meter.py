"""Measure what lives while a stage runs, by its storages alone: nothing here knows of lifetimes or views."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Made:
    """A storage that an op handed out, and is watched for when it is freed."""

    node: Node
    part: int
    nbytes: int
    storage: StorageWeakRef

    @property
    def buffer(self) -> Any:
        """The number that ``plan_memory`` gave it."""
        planned = self.node.meta["buffer"]
        return planned[self.part] if isinstance(planned, tuple) else planned


@dataclass
class Meter:
    """Lets every op of a stage's code tell what it returned, and looks what is alive right after it.

    So the very code runs that always runs, and drops what it drops. What an op needs only meanwhile is freed when it
    returns and is not seen: that is its workspace. Its arguments still live then, as they do while it runs. What ops
    are given that none of them made are inputs and weights, which are not counted. Circles of references are collected
    first: Triton's interpreter leaves some, which compiled kernels do not have.

    Attributes:
        kept: names of ops whose results are kept to the end, as a leak would.
        peak: the most bytes that lived at once.
        at_peak: what lived then.
        made: all that ops made.
        clashes: pairs of things that lived at once in one buffer.
    """

    kept: Iterable[str] = ()
    peak: int = 0
    at_peak: list[Made] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)
    clashes: list[tuple[str, str]] = field(default_factory=list)
    _alive: dict[int, Made] = field(default_factory=dict)
    _given: dict[int, Tensor] = field(default_factory=dict)
    _leaks: list[Any] = field(default_factory=list)

    @contextmanager
    def watching(self, module: GraphModule) -> Iterator[None]:
        """Calls of a stage's ``module`` inside are measured; the module stays changed."""
        for node in module.graph.nodes:
            if node.op == "call_function":
                node.target = self._watched(node, node.target)
        module.recompile()
        gc.collect()
        gc.freeze()  # what is older is not looked at in each collection
        try:
            yield
        finally:
            gc.unfreeze()

    def _watched(self, node: Node, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for value in pytree.tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._alive:
                    self._given[value.untyped_storage()._cdata] = value
            result = function(*args, **kwargs)
            self._look(node, result)
            return result

        call.__name__, call.__module__ = node.name, "watched"  # the name that generated code calls it by
        return call

    def _look(self, node: Node, result: Any) -> None:
        gc.collect()
        self._alive = {key: made for key, made in self._alive.items() if not made.storage.expired()}
        if node.name in self.kept:
            self._leaks.append(result)
        for part, value in enumerate(pytree.tree_leaves(result)):
            storage = value.untyped_storage()
            if storage._cdata in self._alive or storage._cdata in self._given:
                continue
            new = Made(node, part, storage.nbytes(), StorageWeakRef(storage))
            self.clashes += [(old.node.name, node.name) for old in self._alive.values() if old.buffer == new.buffer]
            self._alive[storage._cdata] = new
            self.made.append(new)
        live = sum(made.nbytes for made in self._alive.values())
        if live > self.peak:
            self.peak, self.at_peak = live, list(self._alive.values())


class Allocations(TorchDispatchMode):
    """The most bytes that lived at once of what ops inside made."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        for tensor in (leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out
