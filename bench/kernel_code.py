"""What the compiler makes of each kernel: instructions, registers, spilled bytes. It needs no GPU.

    python bench/kernel_code.py                          each kernel at the shapes of SD2's U-Net, as the rules choose
    python bench/kernel_code.py --tiles                  products and self-attentions in the tiles that may be timed
    python bench/kernel_code.py --tiles --only 128x128   those whose line matches a regular expression

Instructions are those of a warp: before the main loop, in one of its rounds (0: there is no loop with products), and
after it, all branches counted. Waits are those of a round for products on their way: with too few registers, the
compiler waits for each. Compiled for an H100 (sm_90); needs Triton's own ``ptxas`` and ``cuobjdump``, on Linux.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import triton
import typer
from kernel_cases import LEVELS, Cases, load_kernels
from masks import blob
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fisedit.environment import describe_environment, environment_line
from fisedit.runtime.kernels.attend_rows.config import Config
from fisedit.runtime.kernels.attend_rows.triton import attend_rows
from fisedit.runtime.kernels.multiply_rows.attend import multiply_attend
from fisedit.runtime.kernels.multiply_rows.triton import multiply_rows
from fisedit.runtime.tuning.attend_rows import Attention
from fisedit.runtime.tuning.product import MULTIPROCESSORS, SPECIALIZED, TILES, TURNS

H100, SHARED_MEMORY = GPUTarget("cuda", 90, 32), 227 * 1024
"""And the bytes that a program has there."""
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)\s*(.*?);", re.MULTILINE)


class Absent:
    """Stands for the driver of a GPU that is not there: kernels are compiled for it, and never run."""

    def get_current_target(self) -> GPUTarget:
        return H100

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Code:
    """A compiled kernel; ``waits``: how often a round of its loop waits for products; ``spilled``: bytes of a thread
    that registers did not hold."""

    name: str
    before: int
    loop: int
    after: int
    waits: int
    registers: int
    spilled: int
    shared: int

    @staticmethod
    def of(compiled: Any) -> Code:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(compiled.asm["cubin"])
            sass = _dump("-sass", path)
            used = re.findall(r"REG:(\d+) STACK:(\d+)", _dump("--dump-resource-usage", path))[0]
        return Code(compiled.metadata.name, *_parts(sass), int(used[0]), int(used[1]), compiled.metadata.shared)


def _dump(option: str, path: Path) -> str:
    return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout


def _parts(sass: str) -> tuple[int, int, int, int]:
    """Instructions before the innermost loop that multiplies matrices, in it, and after it; those in it that wait for
    products."""
    lines = [(int(place, 16), op, rest) for place, op, rest in LINE.findall(sass)]
    best: list[int] | None = None
    for place, op, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target is None or int(target[1], 16) >= place:
            continue
        body = [at for at, op, _ in lines if int(target[1], 16) <= at <= place]
        multiplies = any("MMA" in op for at, op, _ in lines if body[0] <= at <= place)
        if multiplies and (best is None or len(body) < len(best)):
            best = body
    if best is None:
        return len(lines), 0, 0, 0
    waits = sum(op.startswith("WARPGROUP.DEPBAR") for at, op, _ in lines if best[0] <= at <= best[-1])
    return sum(at < best[0] for at, _, _ in lines), len(best), sum(at > best[-1] for at, _, _ in lines), waits


@contextmanager
def compiling() -> Iterator[list[Code]]:
    """Launches inside compile for an H100; what they make is added to the list."""
    made: list[Code] = []

    def launch(kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        made.append(Code.of(kernel.run(*args, grid=tuple(grid), warmup=True, **kwargs)))

    kernels = r"fisedit\.runtime\.kernels\..*(triton|attend|winograd)$"
    modules = [module for name, module in sys.modules.items() if re.match(kernels, name)]
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(driver, "_active", Absent()))
        for module in modules:
            patched.enter_context(mock.patch.object(module, "launch", launch))
            if hasattr(module, "overlaps"):
                patched.enter_context(mock.patch.object(module, "overlaps", lambda tensor: True))
            if hasattr(module, "multiprocessors"):
                patched.enter_context(mock.patch.object(module, "multiprocessors", lambda device: MULTIPROCESSORS))
        yield made


def chosen(only: str) -> Iterator[tuple[str, Code]]:
    """Each kernel at each level, as its rule chooses; of names that match ``only``."""
    kernels = load_kernels("triton")
    for level in LEVELS:
        for case in Cases(kernels, level, blob((96, 96), 0.15), torch.device("cpu"), "float16").all():
            name = f"{case.op}, {case.shape}, {level.side}²"
            if re.search(only, name):
                with compiling() as made:
                    case.runs[0]()
                yield from ((name, code) for code in made)


def tiles(only: str) -> Iterator[tuple[str, Code]]:
    """Products with what follows them, in every tile that fits a multiprocessor, and self-attentions; of names that
    match ``only``."""
    for attention in (Attention(2, 5, 64, 9216, torch.float16), Attention(2, 8, 40, 4096, torch.float16)):
        for way in attention.ways(512):
            name = f"heads of {attention.head_dim}, {way}"
            if isinstance(way, Config) and re.search(only, name):
                with compiling() as made:
                    attend_rows(**self_attention(attention, 512, way.whole), config=way)
                yield from ((name, code) for code in made)
    for tile in TILES + SPECIALIZED + TURNS:
        for kind, given in products(512, 640).items():
            name = f"{kind}, {tile}"
            if re.search(only, name) and not (tile.turns and kind == "convolution"):
                with compiling() as made:
                    multiply_rows(**given, config=tile)
                yield from ((name, code) for code in made if code.shared <= SHARED_MEMORY)
    for tile in (tile for tile in TILES + SPECIALIZED if tile.n == 64 and tile.m >= 16 * tile.warps):
        name = f"attending, {tile}"
        if re.search(only, name):
            with compiling() as made:
                multiply_attend(**attending(512, 640, 64), config=tile)
            yield from ((name, code) for code in made if code.shared <= SHARED_MEMORY)


def attending(rows: int, c: int, head_dim: int) -> dict[str, Any]:
    """Arguments of a linear layer whose rows attend to a text of 77 tokens, by heads of so many channels."""
    linear = products(rows, c)["normalized"]
    names = ("rows", "weight", "bias", "moments", "center", "input_eps", "count")
    key, value = torch.zeros(2, 77, 2 * c, dtype=torch.float16).chunk(2, -1)
    text = {"key": key, "value": value, "heads": c // head_dim, "scale": None}
    return {**{name: linear[name] for name in names}, **text}


def self_attention(attention: Attention, rows: int, whole: bool) -> dict[str, Any]:
    """Its arguments: rows are slices of one product's, recorded maps are given by their addresses; ``whole``: keys and
    values are in one piece each."""
    width = attention.heads * attention.head_dim
    query, key, value = torch.zeros(2, rows, 3 * width, dtype=attention.dtype).chunk(3, -1)
    addresses = torch.zeros(2, dtype=torch.int64)
    given = {
        "query": query, "key": key, "value": value, "recorded_key": addresses, "recorded_value": addresses,
        "table": torch.zeros(1, attention.keys, dtype=torch.int32), "count": torch.zeros(1, dtype=torch.int32),
        "key_count": None, "locks": torch.zeros(1 << 14, dtype=torch.int32), "heads": attention.heads, "scale": None,
    }  # fmt: skip
    if whole:
        key, value = (torch.zeros(2, attention.keys, width, dtype=attention.dtype) for _ in range(2))
        given |= {"key": key, "value": value, "recorded_key": None, "recorded_value": None, "table": None}
    return given


def products(rows: int, c: int) -> dict[str, dict[str, Any]]:
    """Arguments of a convolution and of linear layers; of one whose rows come with moments, as its own do."""

    def make(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float16)

    tables = {"count": torch.zeros(1, dtype=torch.int32), "locks": torch.zeros(1 << 16, dtype=torch.int32)}
    nothing = {"rows2": None, "recorded": None, "sources": None, "affine": None, "residual": None}
    common = {**nothing, **tables, "rows": make(2, rows, c), "full": False, "activation": "none", "gated": False,
              "positions": rows}  # fmt: skip
    convolution = {
        "recorded": torch.zeros(2, dtype=torch.int64), "sources": torch.zeros(1, rows, 9, dtype=torch.int32),
        "weight": make(c, 9 * c), "bias": make(c), "affine": torch.zeros(2, 2, c), "activation": "silu",
    }  # fmt: skip
    return {
        "convolution": {**common, **convolution},
        "linear": {**common, "weight": make(c, c), "bias": make(c), "residual": make(2, rows, c)},
        "gated": {**common, "weight": make(8 * c, c), "bias": make(8 * c), "activation": "gelu", "gated": True},
        "normalized": {
            **common, "weight": make(c, c), "bias": make(c), "moments": torch.zeros(2, c // 64, 2, rows),
            "center": torch.zeros(c), "input_eps": 1e-5, "with_moments": True,
        },
    }  # fmt: skip


def main(
    tiled: Annotated[bool, typer.Option("--tiles", help="In the tiles that may be timed.")] = False,
    only: Annotated[str, typer.Option(help="A regular expression for the lines to show.")] = "",
) -> None:
    """Compile and count."""
    print("| kernel | before | loop | after | waits | registers | spilled | shared, KB |\n| --- |" + " ---: |" * 7)
    for name, code in tiles(only) if tiled else chosen(only):
        print(f"| {name}: `{code.name}` | {code.before} | {code.loop} | {code.after} | {code.waits} "
              f"| {code.registers} | {code.spilled} | {code.shared / 1024:.0f} |", flush=True)  # fmt: skip
    environment = describe_environment(torch.device("cpu"))
    print(f"\ntriton {triton.__version__}, for sm_90; {environment_line(environment)}")


if __name__ == "__main__":
    typer.run(main)
