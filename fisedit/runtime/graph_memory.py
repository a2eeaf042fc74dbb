"""GPU memory that captured graphs share: they replay one after the other, so that only one's values live at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import torch

T = TypeVar("T")


class GraphMemory:
    """The pool of some graphs. What outlives a replay, its results, is held by tensors; all else that a graph computes
    lies where other graphs have theirs, and the memory of a dropped graph is the next one's.

    Attributes:
        bytes: that the pool has, in blocks of the allocator.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._pool: Any = None
        self._capturing: torch.cuda.Stream | None = None  # one, for which a library's workspace is made once
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._stream: torch.cuda.Stream | None = None
        self._lock = threading.Lock()

    def capture(self, call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """A graph of what ``call`` launches, which may not wait for the GPU, and what it returned.

        Raises:
            torch.OutOfMemoryError: the GPU has too little memory for its values.
        """
        torch.cuda.synchronize()
        try:
            return self._capture(call)
        except torch.OutOfMemoryError:  # unused memory of other pools cannot be given back during a capture
            torch.cuda.empty_cache()
            return self._capture(call)

    def _capture(self, call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        if not self._graphs:  # a pool that its last graph has left is not to be taken again
            self._pool, self.bytes = torch.cuda.graph_pool_handle(), 0
            torch.cuda.empty_cache()
        self._capturing = self._capturing or torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._capturing):
            graph.capture_begin(self._pool, "thread_local")
            reserved = torch.cuda.memory_reserved()
            try:
                made = call()
            finally:
                graph.capture_end()
        self.bytes += torch.cuda.memory_reserved() - reserved
        self._graphs.add(graph)
        return graph, made

    @contextmanager
    def turn(self) -> Iterator[None]:
        """For a graph to replay and its results to be read: behind what other streams have of another one."""
        with self._lock:
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            yield
