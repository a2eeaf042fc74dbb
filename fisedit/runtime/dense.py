"""Dense graphs on a GPU: Inductor compiles them, and a CUDA graph replays what it compiled.

Two things run dense. The lowered stages of the record and detect graphs stand for every call of their signature, so
that a stage is captured as one CUDA graph with buffers of its own (:class:`CompiledStage`). Outside sessions the
model may change at any time, which Dynamo's guards see: there it is ``torch.compile(mode="reduce-overhead")``
(:class:`CompiledModel`). What Inductor cannot compile runs as it is, with one warning.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisedit.runtime.cuda_graph import CAPTURING, capture_stream
from fisedit.runtime.executor import Executable, Keep, Stage
from fisedit.runtime.timing import wait_for
from fisedit.warnings import NotCompiledWarning, warn

logger = logging.getLogger("fisedit")

DEVICES = ("cuda",)
"""Where dense graphs are compiled. A CPU runs them as they are."""
STAGE_OPTIONS: dict[str, Any] = {"fullgraph": True, "dynamic": False}
MODEL_OPTIONS: dict[str, Any] = {"mode": "reduce-overhead", "dynamic": False}
"""How ``torch.compile`` is called."""
WARMUPS = 2
"""Runs before a capture: libraries choose their kernels and allocate in them."""
VALUES = (type(None), bool, int, float, str)

_compiling = threading.RLock()  # Dynamo and Inductor are global


@dataclass
class Compilation:
    """Whether a graph is compiled yet: how long that took, or why it runs as it is."""

    name: str
    seconds: float | None = None
    failure: str | None = None

    @property
    def used(self) -> bool:
        """Whether a call came by that was to be compiled."""
        return self.seconds is not None or self.failure is not None

    def __str__(self) -> str:
        if self.failure is not None:
            return f"{self.name}: not compiled, {self.failure}"
        return f"{self.name}: " + ("not called yet" if self.seconds is None else f"{self.seconds:.1f} s")

    @contextmanager
    def timed(self, given: Iterable[Any]) -> Iterator[None]:
        """Note how long the block takes, on the GPU of what a call is given; the first one compiles."""
        logger.info("compiling the %s graph for this GPU; compile(unet, dense='eager') never does", self.name)
        start = time.perf_counter()
        yield
        wait_for(given)
        self.seconds = (self.seconds or 0.0) + time.perf_counter() - start
        logger.info("compiled the %s graph in %.1f s", self.name, self.seconds)

    def give_up(self, error: Exception) -> None:
        cause = getattr(error, "inner_exception", error)  # Dynamo's errors wrap what a backend raised
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else "no message"
        self.failure = f"{type(cause).__name__}: {reason}"
        warn(
            f"The {self.name} graph could not be compiled ({self.failure}); it runs uncompiled, slower. "
            "compile(unet, dense='eager') never compiles it.",
            NotCompiledWarning,
        )


@dataclass
class _Captured:
    """A function as a CUDA graph: static inputs, static outputs, and the addresses that were frozen into it.

    ``graph`` is ``None`` on other devices, where the function itself runs.
    """

    graph: torch.cuda.CUDAGraph | None
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]
    addresses: list[int]


class CompiledStage:
    """A dense stage of a graph, compiled at its first call; as it is where that fails.

    Its results are in memory of their own. Any thread may call it.
    """

    def __init__(self, stage: Stage, compilation: Compilation) -> None:
        self.eager = stage.module
        self.compilation = compilation
        self._stage = stage
        self._compiled: Callable[..., tuple[Tensor, ...]] = torch.compile(stage.module, **STAGE_OPTIONS)
        self._captured: _Captured | None = None
        self._weights = [*stage.module.parameters(), *stage.module.buffers()]
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None

    def __call__(self, inputs: Sequence[Tensor], keep: Keep | None) -> list[Tensor]:
        """Run the stage, a :data:`~fisedit.runtime.executor.Runner`.

        Args:
            inputs: its inputs, of the shapes and dtypes of the first call.
            keep: is given what it stores: buffers that the next call overwrites.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self.compilation.failure is None:
                try:
                    return self._run_compiled(inputs, keep)
                except torch.OutOfMemoryError:
                    raise  # recorded values may make room, and it is tried again
                except Exception as error:
                    outputs = self.eager(*inputs)  # raises what the caller has to know
                    self.compilation.give_up(error)
                    return self._stage.split(outputs, keep)
        return self._stage.split(self.eager(*inputs), keep)

    def _run_compiled(self, inputs: Sequence[Tensor], keep: Keep | None) -> list[Tensor]:
        captured = self._captured
        if captured is None:
            with _compiling, self.compilation.timed(inputs):
                captured = self._captured = self._capture(inputs)
        if captured.addresses != self._addresses():  # the weights were moved
            captured = self._captured = self._capture(inputs)
        if captured.graph is None:
            return self._own(self._compiled(*inputs), keep)
        stream = torch.cuda.current_stream(inputs[0].device)
        if self._done is None:
            self._done = torch.cuda.Event()
        else:
            stream.wait_event(self._done)  # another stream may still read the static buffers
        _copy_all(captured.inputs, inputs)
        captured.graph.replay()
        outputs = self._own(captured.outputs, keep)
        self._done.record(stream)
        return outputs

    def _own(self, outputs: Sequence[Tensor], keep: Keep | None) -> list[Tensor]:
        """Copies of outputs, which the next replay overwrites; ``keep`` makes those of what is stored."""
        return [value.clone() for value in self._stage.split(outputs, keep)]

    def _addresses(self) -> list[int]:
        return [weight.data_ptr() for weight in self._weights]

    def _capture(self, inputs: Sequence[Tensor]) -> _Captured:
        static = [value.clone(memory_format=torch.preserve_format) for value in inputs]
        outputs = self._compiled(*static)  # the first time it is compiled here
        if not static[0].is_cuda:
            return _Captured(None, static, outputs, self._addresses())
        with torch.cuda.device(static[0].device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    self._compiled(*static)
            torch.cuda.current_stream().wait_stream(stream)
            graph, capturing = torch.cuda.CUDAGraph(), capture_stream(torch.cuda.current_device())
            with CAPTURING, torch.cuda.graph(graph, stream=capturing, capture_error_mode="thread_local"):
                outputs = self._compiled(*static)
        return _Captured(graph, static, outputs, self._addresses())


def _copy_all(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    groups: dict[torch.dtype, list[int]] = defaultdict(list)
    for number, value in enumerate(values):
        groups[value.dtype].append(number)
    for numbers in groups.values():
        torch._foreach_copy_([to[n] for n in numbers], [values[n] for n in numbers])


def compiled(executable: Executable, compilation: Compilation) -> Executable:
    """An executable whose last stage is compiled."""
    *before, step = executable.stages
    return Executable([*before, replace(step, runner=CompiledStage(step, compilation))])


@dataclass
class CompiledModel:
    """The model outside sessions: compiled by Inductor at its first call on a GPU.

    Dynamo guards what the forward reads, so that a changed model is compiled anew. Results are copies: the next call
    cannot reach them. CUDA graphs belong to a thread here; calls of other threads run the model as it is.
    """

    model: nn.Module
    compilation: Compilation = field(default_factory=lambda: Compilation("dense"))
    _compiled: Callable[..., Any] | None = None
    _owner: threading.local = field(default_factory=threading.local)

    def takes(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether this call is one to compile for: on a GPU, without gradients, weights staying where they are."""
        if not any(isinstance(v, Tensor) and v.device.type in DEVICES for v in (*args, *kwargs.values())):
            return False
        if self.model.training or "_hf_hook" in vars(self.model) or self._trains():
            return False
        mine = self._compiled is None or hasattr(self._owner, "thread")
        return mine and self.compilation.failure is None

    def _trains(self) -> bool:
        return torch.is_grad_enabled() and any(weight.requires_grad for weight in self.model.parameters())

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            if self._compiled is None:
                return self._compile(args, kwargs)
            return _owned(self._compiled(*args, **kwargs))
        except Exception as error:
            result = self.model(*args, **kwargs)  # raises what the caller has to know
            self.compilation.give_up(error)
            return result

    def _compile(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with _compiling:
            if self._compiled is not None:  # another thread was first
                return self.model(*args, **kwargs)
            with self.compilation.timed((*args, *kwargs.values())):
                compiled = torch.compile(self.model, **MODEL_OPTIONS)
                result = _owned(compiled(*args, **kwargs))
            self._compiled, self._owner.thread = compiled, threading.get_ident()
            return result


def _owned(result: Any) -> Any:
    """A result with copies of its tensors.

    Raises:
        TypeError: it holds an object that may hide tensors.
    """
    leaves, spec = pytree.tree_flatten(result)
    if hidden := next((leaf for leaf in leaves if not isinstance(leaf, (Tensor, *VALUES))), None):
        raise TypeError(f"the model returns a {type(hidden).__name__}, whose tensors cannot be copied")
    return pytree.tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
