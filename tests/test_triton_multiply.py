"""The Triton kernel of linear layers and convolutions of rows, against float64. Without a GPU it runs interpreted."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from fisedit.runtime.kernels.launch import specializes  # noqa: E402
from fisedit.runtime.kernels.multiply_rows import reference, triton  # noqa: E402
from fisedit.runtime.kernels.multiply_rows.triton import Config, multiply_rows  # noqa: E402
from fisedit.runtime.tuning.product import SPECIALIZED, TILES, TURNS  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Half a unit in the last place of the result, and of what a layer norm rounds."""


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(dtype: torch.dtype, count: int, config: Config | None, **given) -> None:
    arguments = {
        "rows2": None, "recorded": None, "sources": None, "bias": None, "affine": None,
        "full": False, "residual": None, "activation": "none", "gated": False, "positions": 0, **given,
    }  # fmt: skip
    arguments["count"] = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    arguments["locks"] = torch.zeros(256, dtype=torch.int32, device=DEVICE)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    wanted = reference.multiply_rows(**wide)[:, :count]
    for _ in range(2):  # the locks are as they were
        out = multiply_rows(**arguments, config=config)[:, :count]
        assert (out.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


# The interpreter multiplies the bits of bfloat16, not its values.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("channels", [80, 70], ids=["by descriptor", "by address"])
def test_linear(dtype: torch.dtype, split: int, channels: int) -> None:
    rows, weight = random(2, 12, channels, dtype=dtype), random(40, channels, seed=1, dtype=dtype) / 9
    check(dtype, 9, Config(16, 32, 32, 4, 2, split), rows=rows, weight=weight, bias=random(40, dtype=dtype))


@pytest.mark.parametrize("split", [1, 2])
def test_epilogues(split: int) -> None:
    rows, weight = random(2, 10, 64), random(32, 64, seed=1) / 8
    config = Config(16, 16, 32, 4, 2, split)
    affine, residual = random(2, 2, 48, seed=3)[:, :, 8:40], random(2, 10, 32, seed=4)
    common = {"rows": rows, "weight": weight, "bias": random(32, seed=2)}
    check(torch.float32, 10, config, **common, affine=affine, activation="silu")
    check(torch.float32, 10, config, **common, affine=affine, activation="silu", full=True)
    check(torch.float32, 10, config, **common, residual=residual, activation="gelu_tanh")
    check(torch.float32, 10, config, **common, activation="gelu", gated=True)


@pytest.mark.parametrize("split", [1, 2, 6])
@pytest.mark.parametrize("channels", [(64, 32, 64), (40, 36, 20), (30, 70, 33)], ids=str)
def test_three_sources_of_channels(split: int, channels: tuple[int, int, int]) -> None:
    """Whole steps of the loop or not; by descriptor, or by address where rows begin anywhere."""
    rows, rows2, rows3 = (random(2, 10, c, seed=seed) for seed, c in enumerate(channels, 5))
    check(torch.float32, 9, Config(16, 16, 32, 4, 2, split), rows=rows, rows2=rows2, rows3=rows3,
          weight=random(24, sum(channels), seed=1), bias=random(24, seed=2))  # fmt: skip


@pytest.mark.parametrize(("three", "masks", "split"), [(False, 1, 1), (False, 2, 3), (True, 2, 1), (True, 1, 11)])
def test_channels_of_the_outputs_after_those_of_a_convolution(three: bool, masks: int, split: int) -> None:
    """More outputs than inputs; split between the taps, inside them and behind them."""
    rows, recorded = random(2, 7, 64), random(2, 30, 64, seed=1)
    sources = torch.randint(-1, 7 + 30, (masks, 11, 9), generator=torch.Generator().manual_seed(2))
    merged = random(2, 11, 96, seed=3)
    rows2, rows3 = merged[..., 32:], random(2, 11, 32, seed=4) if three else None
    weight = random(24, 9 * 64 + 64 + 32 * three, seed=5) / 12
    config = Config(16, 16, 32, 4, 2, split)
    check(torch.float32, 10, config, rows=rows, recorded=recorded, rows2=rows2, rows3=rows3,
          sources=sources.int().to(DEVICE), weight=weight, residual=random(2, 11, 24, seed=6))  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="programs run at once there")
def test_a_program_that_waits_in_vain_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one after the other: the last does the rows of all, those of a gate too."""
    monkeypatch.setattr(triton, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(triton, "POLLS", 2)
    rows, weight = random(2, 10, 160), random(32, 160, seed=1) / 8
    for split in (2, 5):
        config = Config(32, 16, 32, 4, 2, split)
        check(torch.float32, 9, config, rows=rows, weight=weight, residual=random(2, 10, 32, seed=4))
        check(torch.float32, 9, config, rows=rows, weight=weight, activation="gelu", gated=True)


def test_two_sources_of_channels() -> None:
    merged = random(2, 10, 3 * 64)
    check(torch.float32, 10, Config(16, 16, 32, 4, 2), rows=merged[..., 64:128], rows2=random(2, 10, 32, seed=5),
          weight=random(24, 96, seed=1))  # fmt: skip


@pytest.mark.parametrize(
    ("addresses", "masks", "channels", "split"),
    [(False, 1, 32, 1), (True, 2, 64, 4), (True, 1, 4, 1), (False, 2, 40, 1), (True, 1, 40, 4)],
)
def test_convolution_reads_the_recorded_map_in_place(addresses: bool, masks: int, channels: int, split: int) -> None:
    rows, recorded = random(2, 12, channels), random(2, 30, channels, seed=1)
    sources = torch.randint(-1, 12 + 30, (masks, 11, 9), generator=torch.Generator().manual_seed(2))
    weight = random(24, 9 * channels, seed=3) / 12
    common = {"rows": rows, "sources": sources.int().to(DEVICE), "weight": weight, "bias": random(24, seed=4)}
    given = recorded
    config = Config(16, 16, 32, 4, 2, split)
    if addresses:
        table = torch.tensor([sample.data_ptr() for sample in recorded], device=DEVICE)
        count = torch.tensor([11], dtype=torch.int32, device=DEVICE)
        locks = torch.zeros(64, dtype=torch.int32, device=DEVICE)
        rest = (None, False, None, count, locks, "none", False, 0)
        wanted = reference.multiply_rows(
            rows.double(), None, recorded.double(), common["sources"], weight.double(), common["bias"].double(), *rest
        )
        out = multiply_rows(rows, None, table, common["sources"], weight, common["bias"], *rest, config=config)
        assert (out.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    else:
        check(torch.float32, 11, config, **common, recorded=given)


@pytest.mark.parametrize("dtype", DTYPES[1:] if DEVICE == "cuda" else [torch.float32])
def test_sizes_of_real_models(dtype: torch.dtype) -> None:
    """What the rule chooses for large products, with all that can follow them; on a GPU also its race conditions."""
    large = [(30, 1280, 1280), (84, 1280, 640), (461, 320, 320), (1382, 320, 320)]
    sizes = large if DEVICE == "cuda" else [(9, 64, 32)]
    for number, channels, outputs in sizes:
        rows, recorded = random(2, number, channels, dtype=dtype), random(2, number + 50, channels, seed=1, dtype=dtype)
        sources = torch.randint(-1, 2 * number + 50, (1, number, 9), generator=torch.Generator().manual_seed(2))
        affine, residual = random(2, 2, outputs, seed=3), random(2, number, outputs, seed=4, dtype=dtype)
        weight = random(outputs, 9 * channels, seed=5, dtype=dtype) / 50
        common = {"bias": random(outputs, seed=6, dtype=dtype)}
        table = sources.int().to(DEVICE)
        check(dtype, number, None, rows=rows, recorded=recorded, sources=table, weight=weight, affine=affine,
              activation="silu", **common)  # fmt: skip
        linear = weight[:, :channels].contiguous()
        check(dtype, number, None, rows=rows, weight=linear, residual=residual, **common)
        check(dtype, number, None, rows=rows, weight=linear, activation="gelu", gated=True, **common)
        more = {"rows2": random(2, number, channels, seed=7, dtype=dtype), "rows3": residual}
        wide = random(outputs, 10 * channels + outputs, seed=8, dtype=dtype) / 50
        check(dtype, number, None, rows=rows, recorded=recorded, sources=table, weight=wide, **more, **common)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("split", "turns"), [(1, False), (3, False), (1, True)])
def test_three_samples_by_warps_of_different_tasks(dtype: torch.dtype, split: int, turns: bool) -> None:
    """On a CPU, by the other kernel."""
    config = Config(64, 64, 64, 4, 4, split, specialized=True, turns=turns)
    rows, recorded = random(3, 40, 64, dtype=dtype), random(3, 50, 64, seed=1, dtype=dtype)
    sources = torch.randint(-1, 90, (1, 40, 9), generator=torch.Generator().manual_seed(2)).int().to(DEVICE)
    weight, residual = random(64, 9 * 64, seed=3, dtype=dtype) / 24, random(3, 40, 64, seed=4, dtype=dtype)
    check(dtype, 37, config, rows=rows, recorded=recorded, sources=sources, weight=weight, residual=residual)
    rows = random(3, 40, 192, seed=5, dtype=dtype)
    check(dtype, 37, config, rows=rows, weight=weight[:, :192].contiguous(), bias=random(64, seed=6, dtype=dtype))


@pytest.mark.skipif(DEVICE == "cpu" or not specializes(), reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("tile", TURNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_more_tiles_than_programs(tile: Config, dtype: torch.dtype) -> None:
    """Some tiles are padding alone, columns an odd number of tiles."""
    rows, residual = random(3, 1000, 320, dtype=dtype), random(3, 1000, 1216, seed=1, dtype=dtype)
    weight, bias = random(1216, 320, seed=2, dtype=dtype) / 18, random(1216, seed=3, dtype=dtype)
    check(dtype, 700, tile, rows=rows, weight=weight, bias=bias, residual=residual)
    weight, moments = random(2432, 320, seed=4, dtype=dtype) / 18, torch.ones(2, 5, 3, 1000, device=DEVICE)
    whole = rows.float().view(3, 1000, 5, 64)
    moments[0], moments[1] = (part.sum(-1).permute(2, 0, 1) for part in (whole, whole * whole))
    given = {"rows": rows, "weight": weight, "bias": random(2432, seed=5, dtype=dtype)}
    check(dtype, 700, tile, **given, gated=True, activation="gelu", moments=moments, center=weight.float().sum(1),
          input_eps=1e-5)  # fmt: skip


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("tile", [*TILES, *(SPECIALIZED + TURNS if specializes() else ())], ids=str)
@pytest.mark.parametrize("split", [1, 4])
def test_every_tile_that_may_be_timed(tile: Config, split: int) -> None:
    """A convolution with what may follow it, a product of three sources, and a gated one of rows that come with
    moments, and their own."""
    stages = min(tile.stages, 227 // ((tile.m + 2 * tile.n) * tile.k * 2 // 1024))  # a gate has weights of its own
    config, dtype = replace(tile, split=split, stages=stages), torch.float16
    rows, recorded = random(2, 300, 384, dtype=dtype), random(2, 350, 384, seed=1, dtype=dtype)
    sources = torch.randint(-1, 650, (1, 300, 9), generator=torch.Generator().manual_seed(2)).int().to(DEVICE)
    weight, bias = random(192, 9 * 384, seed=3, dtype=dtype) / 50, random(192, seed=4, dtype=dtype)
    common = {"rows": rows, "recorded": recorded, "sources": sources, "weight": weight, "bias": bias}
    check(dtype, 290, config, **common, affine=random(2, 2, 192, seed=5), activation="silu")
    more = {"rows2": random(2, 300, 128, seed=6, dtype=dtype), "rows3": random(2, 300, 256, seed=7, dtype=dtype)}
    wide = random(192, 9 * 384 + 384, seed=8, dtype=dtype) / 50
    check(dtype, 290, config, **{**common, "weight": wide}, **more, residual=random(2, 300, 192, seed=9, dtype=dtype))
    check(dtype, 290, config, rows=rows, **more, weight=wide[:, -768:].contiguous(), bias=bias)
    if tile.n == 256:
        return
    inner = 384 if tile.specialized else 320  # whole steps, or not
    first, second = random(inner, inner, seed=10, dtype=dtype) / 18, random(384, inner, seed=11, dtype=dtype) / 18
    rows = rows[:, :, :inner].contiguous()
    tables = {"count": torch.tensor([290], dtype=torch.int32, device=DEVICE), "positions": 0, "full": False,
              "locks": torch.zeros(1024, dtype=torch.int32, device=DEVICE), "rows2": None, "recorded": None,
              "sources": None, "affine": None, "residual": None}  # fmt: skip
    plain = {"activation": "none", "gated": False, "bias": None}
    out, moments = multiply_rows(rows=rows, weight=first, **plain, **tables, config=config, with_moments=True)
    read = {"activation": "gelu", "gated": True, "bias": random(384, seed=12, dtype=dtype)}
    center = second.float().sum(1)
    made = multiply_rows(rows=out, weight=second, **read, **tables, config=config, moments=moments, center=center,
                         input_eps=1e-5)[:, :290]  # fmt: skip
    exact = torch.nn.functional.layer_norm(out[:, :290].double(), [inner], eps=1e-5)
    value, gate = (exact @ second.double().T + read["bias"].double()).chunk(2, -1)
    wanted = value * torch.nn.functional.gelu(gate)
    assert (made.double() - wanted).abs().max() <= 2e-3 * wanted.abs().max()
