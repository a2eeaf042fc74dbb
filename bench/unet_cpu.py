"""One U-Net call: dense as fast as PyTorch does it, and sparse under blob and ragged masks.

    python bench/unet_cpu.py                          the demo U-Net
    python bench/unet_cpu.py --config sdxl --device cuda --output unet.json

The dense baseline is the fastest of eager contiguous, eager channels-last and, with --torch-compile, Inductor. Dense
and sparse calls take turns, so that a busy machine slows both. Weights are random; they do not change the time.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel
from masks import blob, occupancy, ragged
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fisedit
from fisedit.demo.architectures import build_unet
from fisedit.environment import describe_environment, environment_line

BLOB_SHARES = (0.05, 0.10, 0.15, 0.30)
RAGGED_SHARES = (0.08, 0.16, 0.23, 0.40)
"""From the 5th percentile of the ragged family over its mean to the 95th."""


class Config(StrEnum):
    DEMO = "demo"
    SD1 = "sd1"
    SD2 = "sd2"
    SDXL = "sdxl"


CROSS, CROSS_UP = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
NARROW: dict[Config, dict[str, Any]] = {
    Config.SD1: {
        "block_out_channels": (64, 128, 256, 256), "attention_head_dim": 8, "cross_attention_dim": 192,
        "down_block_types": CROSS, "up_block_types": CROSS_UP,
    },
    Config.SD2: {
        "block_out_channels": (64, 128, 256, 256), "attention_head_dim": (2, 4, 8, 8), "cross_attention_dim": 192,
        "down_block_types": CROSS, "up_block_types": CROSS_UP, "use_linear_projection": True,
    },
    Config.SDXL: {
        "block_out_channels": (64, 128, 256), "attention_head_dim": (2, 4, 8), "cross_attention_dim": 256,
        "down_block_types": ("DownBlock2D", *CROSS[:2]), "up_block_types": (*CROSS_UP[1:3], "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 4), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 6 * 32 + 64,
    },
}  # fmt: skip
"""The big models' architectures at a fifth of their width."""


@dataclass(frozen=True)
class Row:
    """One mask's figures: seconds of the median call and multiply-accumulates."""

    mask: str
    share: float
    levels: dict[str, float]
    dense_seconds: float
    sparse_seconds: float
    dense_macs: int
    sparse_macs: int

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.sparse_seconds


def build(config: Config) -> UNet2DConditionModel:
    """The U-Net with random weights."""
    torch.manual_seed(0)
    unet = build_unet() if config is Config.DEMO else UNet2DConditionModel(sample_size=64, **NARROW[config])
    return unet.eval().requires_grad_(False)


def arguments(unet: UNet2DConditionModel, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A call at the model's own latent size: sample ``[B, 4, H, W]``, text ``[B, 77, D]``."""
    size, make = unet.config.sample_size, partial(torch.randn, device=device, dtype=dtype)
    call: dict[str, Any] = {
        "sample": make(batch, 4, size, size),
        "encoder_hidden_states": make(batch, 77, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        call["added_cond_kwargs"] = {"text_embeds": make(batch, 64), "time_ids": make(batch, 6)}
    return call


def dense_variants(unet: nn.Module, with_compile: bool) -> dict[str, Callable[..., Any]]:
    """The model under each memory format and, if wanted, Inductor."""
    channels_last = copy.deepcopy(unet)
    channels_last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    variants: dict[str, Callable[..., Any]] = {"contiguous": unet, "channels last": channels_last}
    if with_compile:
        variants["torch.compile"] = torch.compile(unet)
        variants["torch.compile, channels last"] = torch.compile(channels_last)
    return variants


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """One call; a GPU is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fastest_dense(
    variants: dict[str, Callable[..., Any]], call: dict[str, Any], repeats: int, device: torch.device
) -> tuple[str, dict[str, float]]:
    """The name of the fastest variant, and the median seconds of each; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats + 1):
        for name, variant in variants.items():
            sample = call["sample"]
            if "channels last" in name:
                sample = sample.contiguous(memory_format=torch.channels_last)
            given = {**call, "sample": sample}
            times[name].append(seconds(partial(variant, timestep=500.0, **given), device))
    medians = {name: median(values[1:]) for name, values in times.items()}
    return min(medians, key=medians.__getitem__), medians


def measure(
    unet: fisedit.CompiledUNet, dense: Callable[..., Any], name: str, mask: Tensor, call: dict[str, Any], repeats: int
) -> Row:
    """Record ``repeats + 1`` calls, edit them under ``mask``, each beside a dense call; the first is left out."""
    device, times = call["sample"].device, []
    timesteps = [900.0 - 10 * i for i in range(repeats + 1)]
    with unet.record() as base:
        for timestep in timesteps:
            unet(timestep=timestep, **call)
    with unet.edit(base, mask) as edit:
        for timestep in timesteps:
            times.append(seconds(partial(dense, timestep=timestep, **call), device))
            unet(timestep=timestep, **call)
    report = edit.report()
    assert report.macs_dense is not None and report.macs_sparse is not None
    sparse = median(report.timings["sparse"][1:])
    share = float(mask.float().mean())
    return Row(name, share, report.levels, median(times[1:]), sparse, report.macs_dense, report.macs_sparse)


def print_rows(rows: list[Row], title: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("mask", no_wrap=True)
    for heading in ("active", "dense ms", "sparse ms", "faster", "dense GMAC", "sparse GMAC", "fewer"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.mask, f"{row.share:.1%}", f"{row.dense_seconds * 1e3:.1f}", f"{row.sparse_seconds * 1e3:.1f}",
            f"{row.speedup:.1f}x", f"{row.dense_macs / 1e9:.2f}", f"{row.sparse_macs / 1e9:.2f}",
            f"{row.dense_macs / row.sparse_macs:.1f}x",
        )  # fmt: skip
    Console().print(table)


def main(
    config: Config = Config.DEMO,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    batch: Annotated[int, typer.Option(help="2: one image with guidance.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls per mask; the median is shown.")] = 5,
    kv: str = "cached",
    cost: str = "halo",
    torch_compile: Annotated[bool, typer.Option("--torch-compile", help="Try Inductor as a baseline too.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure one U-Net call, dense and sparse."""
    where, of = torch.device(device), getattr(torch, dtype)
    model = build(config).to(where)
    model = model if of == torch.float32 else model.to(of)
    call = arguments(model, batch, where, of)
    size = tuple(call["sample"].shape[-2:])
    masks = [(f"blob {share:.0%}", blob(size, share)) for share in BLOB_SHARES]
    masks += [(f"ragged {share:.0%}", ragged(size, 0, share)) for share in RAGGED_SHARES]
    environment = describe_environment(where)
    with torch.no_grad():
        variants = dense_variants(model, torch_compile)
        best, baselines = fastest_dense(variants, call, repeats, where)
        compiled = fisedit.compile(model, kv=kv, cost=cost)
        dense_call = {**call, "sample": call["sample"].contiguous(memory_format=torch.channels_last)}
        dense = variants[best]
        chosen = (lambda **given: dense(**{**given, **dense_call})) if "channels last" in best else dense
        rows = [measure(compiled, chosen, name, mask.to(where), call, repeats) for name, mask in masks]
    shown = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in baselines.items())
    print_rows(
        rows, f"{config.value} U-Net, batch {batch}, {dtype}, kv={kv}, cost={cost}; {environment_line(environment)}"
    )
    family = occupancy([ragged(size, seed) for seed in range(100)])
    print(f"dense baselines: {shown}; the fastest is used: {best}")
    print("ragged family, mean share per level:", ", ".join(f"{share:.1%}" for share in family))
    if output is not None:
        settings = {"config": config.value, "dtype": dtype, "batch": batch, "kv": kv, "cost": cost, "baseline": best}
        result = {"environment": environment, "settings": settings, "baselines": baselines}
        output.write_text(json.dumps({**result, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
