"""Compile many kernels at once. Most of Triton's compiler holds Python's lock, so that threads take turns: where many
kernels are slow, each thread has a process beside it that compiles into Triton's cache on the disk."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from queue import SimpleQueue
from typing import Any, TypeVar

from fisedit.runtime.progress import Progress

T = TypeVar("T")
Job = dict[str, Any]
"""A call of ``triton.compile``, its kernel by module and name."""
MOST = 16
"""Threads: a container may have fewer processors than it sees."""
SLOW = 0.1
"""Seconds: a kernel that took longer did not lie in the cache."""
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import serve; serve()"


class Compilers(ThreadPoolExecutor):
    """Threads that run what Triton submits to them in an ``AsyncCompileMode``; done when the block ends.

    Args:
        progress: is told of each kernel.
        many: so many kernels must have been slow for each thread before processes are started, which takes some
            seconds. How many wait says little: who submits them wants Python's lock, too.
    """

    def __init__(self, threads: int | None = None, many: int = 2, progress: Progress | None = None) -> None:
        self.threads = threads or min(MOST, os.cpu_count() or 1)
        super().__init__(self.threads)
        self.many, self.slow, self.helpers, self.progress = many, 0, list[Helper](), progress
        self._free, self._lock = SimpleQueue[Helper](), threading.Lock()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future = super().submit(self._compile, fn, *args, **kwargs)
        if (progress := self.progress) is not None:
            progress.expect()
            future.add_done_callback(lambda _: progress.done())
        return future

    def _compile(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        job = job_of(fn)
        if self.helpers and job is not None:
            helper = self._free.get()
            helper.compile(job)
            self._free.put(helper)
        start = time.monotonic()
        made = fn(*args, **kwargs)  # after a helper, it lies in the cache
        if job is not None and time.monotonic() - start > SLOW:
            self._count_slow()
        return made

    def _count_slow(self) -> None:
        with self._lock:
            self.slow += 1
            if not self.helpers and self.slow >= self.many * self.threads:
                self.helpers = [Helper() for _ in range(self.threads)]
                for helper in self.helpers:
                    self._free.put(helper)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        for helper in self.helpers:
            helper.close()


class Helper:
    """A process that compiles."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", START.format(module=__name__), json.dumps(sys.path)]
        self.process: subprocess.Popen[bytes] | None = None
        self.ready, self.compiled = False, 0
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError:  # an interpreter that is no program of its own
            return

    def compile(self, job: Job) -> None:
        """Have a kernel compiled; what the process cannot do is left to the caller."""
        if self.process is None or self.process.stdin is None:
            return
        try:
            self.ready = self.ready or self._answer() is None
            pickle.dump(job, self.process.stdin)
            self.process.stdin.flush()
            self.compiled += self._answer() is None
        except (OSError, EOFError, pickle.PickleError, TypeError, AttributeError):
            self.close()

    def _answer(self) -> str | None:
        assert self.process is not None and self.process.stdout is not None
        answer: str | None = pickle.load(self.process.stdout)
        return answer

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def job_of(fn: Callable[..., Any]) -> Job | None:
    """The call that Triton submitted as a closure; ``None`` if this Triton does it otherwise."""
    try:
        given = inspect.getclosurevars(fn).nonlocals
        src, target, options, env = (given[name] for name in ("src", "target", "options", "env_vars"))
        return {
            "kernel": (src.fn.__module__, src.fn.__name__), "signature": src.signature, "constants": src.constants,
            "attrs": src.attrs, "target": target, "options": options.__dict__, "env": env,
        }  # fmt: skip
    except (TypeError, ValueError, KeyError, AttributeError):
        return None


def serve() -> None:
    """Compile what comes on the standard input until it ends; answer each with ``None``, or with what went wrong."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever is printed is no answer
    import triton
    from triton.compiler import ASTSource

    pickle.dump(None, answers)
    answers.flush()
    while True:
        try:
            job: Job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer = None
        try:
            module, name = job["kernel"]
            kernel, form = getattr(import_module(module), name), ASTSource
            if kernel.is_gluon():
                form = import_module("triton.experimental.gluon._runtime").GluonASTSource
            source = form(kernel, job["signature"], job["constants"], job["attrs"])
            triton.compile(source, target=job["target"], options=job["options"], _env_vars=job["env"])
        except Exception as error:
            answer = repr(error)
        pickle.dump(answer, answers)
        answers.flush()
