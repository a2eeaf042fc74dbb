"""Kernels are compiled by processes where many wait; whatever these cannot do is done by the thread itself."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.compiler import CompiledKernel
from triton.runtime._async_compile import FutureKernel, active_mode
from triton.runtime.errors import OutOfResources

from fisedit.runtime.kernels import compilers
from fisedit.runtime.kernels.compilers import Compilers, Helper, job_of
from fisedit.runtime.kernels.launch import launch, rehearse

BENCH = Path(__file__).parent.parent / "bench"
SCRIPT = """
from unittest import mock
import kernel_code
from fisedit.runtime.kernels.compilers import Compilers
from fisedit.runtime.kernels.multiply_rows import specialized, triton as kernel
from triton import AsyncCompileMode
from triton.runtime import driver

def launch(kernel, grid, *args, **kwargs):
    kernel.run(*args, grid=tuple(grid), warmup=True, **kwargs)

given = kernel_code.products(64, 320)["linear"]
with mock.patch.object(driver, "_active", kernel_code.Absent()), mock.patch.object(kernel, "launch", launch):
    for _ in range(2):
        with Compilers(threads=1, many=1) as compilers, AsyncCompileMode(compilers) as mode:
            for stages, special in ((2, False), (3, False), (4, True), (5, True)):
                kernel.multiply_rows(**given, config=kernel.Config(64, 64, 64, 4, stages, 1, special))
        made = [future.result().metadata.shared // 2**14 for future in mode.raw_futures]
        print(made, [helper.compiled for helper in compilers.helpers])
        kernel._multiply.device_caches.clear()
        specialized.multiply_specialized.device_caches.clear()
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="needs Triton's assembler")
def test_a_process_compiles_for_a_thread(tmp_path: Path) -> None:
    """The first kernel is slow and others wait: a process has the others ready, those of Gluon, too. Then all lie in
    Triton's cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(BENCH), *sys.path])}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[2, 3, 4, 5] [3]", "[2, 3, 4, 5] []"]  # stages of 16 KB


def closure(result: int) -> Callable[[], int]:
    """Like the one that Triton submits, of a call that no process can make."""
    src, target, options, env_vars = int, "sm_0", int, {}

    def compile() -> int:
        return result if (src, target, options, env_vars) else 0

    return compile


@pytest.mark.parametrize("program", ["/bin/false", "/no/such/program", "python"])
def test_a_process_that_fails_is_not_missed(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "job_of", lambda fn: {"kernel": ("fisedit", "nothing")})
    monkeypatch.setattr(compilers, "SLOW", -1.0)
    if program != "python":
        monkeypatch.setattr(sys, "executable", program)
    with Compilers(threads=1, many=1) as pool:
        futures = [pool.submit(closure(number)) for number in range(4)]
    assert [future.result() for future in futures] == [0, 1, 2, 3]
    (helper,) = pool.helpers
    assert helper.compiled == 0 and helper.process is None


def test_few_kernels_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "SLOW", -1.0)
    with Compilers(threads=2, many=3) as pool:
        assert pool.submit(closure(5)).result() == 5
    assert pool.helpers == []


def test_an_error_of_the_compiler_is_the_callers() -> None:
    def broken() -> None:
        raise ValueError("no such instruction")

    with Compilers(threads=1) as pool, pytest.raises(ValueError, match="no such instruction"):
        pool.submit(broken).result()


def test_what_is_no_call_of_triton_is_no_job() -> None:
    assert job_of(print) is None and job_of(lambda: None) is None
    helper = Helper()
    helper.close()
    helper.compile({})  # nothing to ask any more
    assert helper.compiled == 0


def test_a_rehearsal_loads_what_is_compiled() -> None:
    """For a graph that is captured next; what does not fit is left to who runs it."""
    loaded: list[int] = []

    class Kernel(CompiledKernel):
        def __init__(self, shared: int) -> None:
            self.shared = shared

        @property
        def run(self) -> None:
            loaded.append(self.shared)
            if self.shared > 227:
                raise OutOfResources(self.shared, 227, "shared memory")

    def compile(shared: int, *, grid: tuple[int, ...], warmup: bool) -> Kernel | None:
        assert warmup and grid == (1,)
        return Kernel(shared) if shared else None

    source = SimpleNamespace(run=compile)
    with Compilers() as threads, rehearse(threads) as rehearsal:
        for shared in (0, 100, 300):  # the first is not compiled yet
            launch(source, (1,), shared)
    assert loaded == [100, 300] and not rehearsal.news


def test_what_a_rehearsal_compiles_is_loaded_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """By threads of its device, also what another mask will choose."""
    loaded, devices = set[int](), list[int]()
    monkeypatch.delattr(FutureKernel, "__getattr__", raising=False)  # Triton 3.6 has none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)

    class Kernel:
        def __init__(self, number: int) -> None:
            self.number = number

        @property
        def run(self) -> None:
            loaded.add(self.number)

    def compile(number: int, *, grid: tuple[int, ...], warmup: bool) -> object:
        mode = active_mode.get()
        assert mode is not None and not loaded
        return mode.submit(number, lambda: Kernel(number), lambda kernel: None)

    source = SimpleNamespace(run=compile)
    with Compilers() as threads, rehearse(threads) as rehearsal:
        for number in range(5):
            launch(source, (1,), number)
    assert loaded == set(range(5)) and rehearsal.news and set(devices) == {3}
