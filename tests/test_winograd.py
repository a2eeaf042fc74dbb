"""3x3 convolutions in blocks of 2x2 outputs, against PyTorch's over whole maps in float64.

Without a GPU, Triton's kernels run interpreted.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from fisedit.runtime.calibration import Timings  # noqa: E402
from fisedit.runtime.geometry import ConvGeometry, Upsample  # noqa: E402
from fisedit.runtime.kernels.compilers import Compilers  # noqa: E402
from fisedit.runtime.kernels.launch import rehearse  # noqa: E402
from fisedit.runtime.plan import Table  # noqa: E402
from fisedit.runtime.row_plan import LevelMasks, RowPlan, buckets, typical  # noqa: E402
from fisedit.runtime.tuning import multiply_rows as tuning  # noqa: E402
from fisedit.runtime.tuning.blocks import BlockCall, BlockStopwatch, run_blocks  # noqa: E402
from fisedit.runtime.tuning.choose import RULE, choose_call, run_fastest  # noqa: E402
from fisedit.runtime.tuning.product import WINOGRAD, Blocks, Product  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Sums of rows and of weights are rounded, their products, and the result."""
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
UPSAMPLED_G = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 1]], dtype=torch.float64)


class Case:
    """A convolution to a map of ``side``² rows under masks, one for each sample if ``own``; of a map of half the size
    if ``upsampled``."""

    def __init__(
        self, side: int, channels: int, outputs: int, dtype: torch.dtype, upsampled: bool = False, batch: int = 2,
        own: bool = False,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.masks = torch.rand(batch if own else 1, side, side, generator=generator) < 0.3
        self.masks[:, : side // 4] = False
        large, small = (side, side), (side // 2, side // 2)
        self.source = small if upsampled else large
        taps = ((3, 3), (1, 1), (1, 1), (1, 1))
        nine = ConvGeometry(self.source, large, *taps, Upsample(large, None) if upsampled else None)
        block = ConvGeometry(large, small, (4, 4), (2, 2), (1, 1), (1, 1))
        read = ConvGeometry(small, small, *taps) if upsampled else block
        keys = [Table("sources", nine), Table("sources", read), Table("places", block), Table("number", large)]
        keys += [Table("number", small), Table("active", self.source)]
        levels = LevelMasks(self.masks, [large, small])
        plan = RowPlan(keys, levels.buckets, batch, torch.device(DEVICE))
        plan.write(levels)
        sources, block_sources, places, count, block_count, active = map(plan.table, keys)
        assert isinstance(active, torch.Tensor) and isinstance(sources, torch.Tensor)
        positions = self.source[0] * self.source[1]
        self.map = random(batch, positions, channels)
        index = active.clamp_max(positions - 1).expand(batch, -1)[:, :, None].expand(-1, -1, channels)
        here = torch.zeros(len(active), positions + 1, dtype=torch.bool, device=DEVICE).scatter_(1, active, True)
        recorded = self.map.masked_fill(here[:, :-1, None], float("nan"))  # what is active is not read there
        self.weight, self.bias = random(outputs, 3, 3, channels) / (3 * channels**0.5), random(outputs)
        self.number = sources.shape[1]
        self.blocks: dict[str, Any] = {
            "block_sources": block_sources, "block_count": block_count, "places": places,
            "block_weight": self.block_weight(UPSAMPLED_G if upsampled else G),
        }  # fmt: skip
        self.given: dict[str, Any] = {
            "rows": self.map.gather(1, index), "rows2": None, "recorded": recorded, "sources": sources,
            "weight": self.weight.flatten(1), "bias": self.bias, "affine": None, "full": False, "residual": None,
            "count": count, "locks": plan.locks, "activation": "none", "gated": False, "positions": side * side,
            "blocks": self.blocks,
        }  # fmt: skip

    def block_weight(self, g: torch.Tensor) -> torch.Tensor:
        g = g.to(DEVICE)
        sums = torch.einsum("iy,oyxc,jx->ijoc", g, self.weight.double(), g)
        return sums.flatten(0, 2).to(self.weight.dtype)  # [16 * Co, C]

    def wanted(self) -> torch.Tensor:
        """The dense layer, float64 ``[B, Co, side, side]``."""
        dense = self.map.double().mT.unflatten(2, self.source)  # [B, C, h, w]
        if self.blocks["block_sources"].shape[2] == 9:
            dense = F.interpolate(dense, scale_factor=2.0, mode="nearest")
        return F.conv2d(dense, self.weight.double().permute(0, 3, 1, 2), self.bias.double(), padding=1)

    def check(self, out: torch.Tensor, wanted: torch.Tensor | None = None) -> None:
        """Against the dense layer, each sample's active outputs in their order."""
        wanted = self.wanted() if wanted is None else wanted
        for number, (rows, own) in enumerate(zip(out, wanted, strict=True)):
            expected = own[:, self.masks[number % len(self.masks)].to(DEVICE)].T  # [N', Co]
            difference = (rows[: len(expected)].double() - expected).abs().max()
            assert difference <= TOLERANCE[self.map.dtype] * wanted.abs().max()


@pytest.mark.parametrize("upsampled", [False, True], ids=["", "upsampled"])
@pytest.mark.parametrize("own", [False, True], ids=["one mask", "a mask for each"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution(dtype: torch.dtype, own: bool, upsampled: bool) -> None:
    """Channels that fill no program."""
    for batch, channels, outputs in ((2, 32, 40), (3, 136, 16)):
        case = Case(12, channels, outputs, dtype, upsampled, batch, own)
        case.check(run_blocks(**case.given))


@pytest.mark.skipif(DEVICE == "cpu", reason="as large as a GPU's programs are many")
@pytest.mark.parametrize("upsampled", [False, True], ids=["", "upsampled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_convolution(dtype: torch.dtype, upsampled: bool) -> None:
    for batch, own in ((2, False), (3, True)):
        case = Case(48, 640, 320, dtype, upsampled, batch, own)
        case.check(run_blocks(**case.given))


def test_what_follows_it() -> None:
    """Scale and offset of each sample, an activation, a residual, and what it is once more, normalized."""
    case = Case(12, 32, 136, torch.float32)
    affine, norm_affine = torch.randn(2, 2, 2, 136).to(DEVICE)
    residual = torch.randn(2, case.number, 136).to(DEVICE)
    norm = {"norm_affine": norm_affine, "norm_activation": "silu"}
    given = {**case.given, "affine": affine, "activation": "silu", "residual": residual}
    out, normalized, moments = run_blocks(**given, norm=norm)
    scaled = F.silu(case.wanted() * affine[0][:, :, None, None] + affine[1][:, :, None, None])
    where = case.masks[0].to(DEVICE)
    rows = scaled[..., where].mT + residual[:, : int(where.sum())].double()  # [B, N', Co]
    whole = torch.zeros_like(scaled)
    whole[..., where] = rows.mT
    case.check(out, whole)
    whole[..., where] = F.silu(rows * norm_affine[0][:, None] + norm_affine[1][:, None]).mT
    case.check(normalized, whole)
    assert moments.shape == (2, 0, 2, case.number)
    plain = run_blocks(**{**given, "full": True, "residual": None})
    case.check(plain)


def test_no_map_is_recorded() -> None:
    """Where all that is read is active, none need be there."""
    case = Case(12, 16, 24, torch.float32)
    case.masks[:] = True
    levels = LevelMasks(case.masks, [(12, 12), (6, 6)])
    block = ConvGeometry((12, 12), (6, 6), (4, 4), (2, 2), (1, 1), (1, 1))
    keys = [Table("sources", block), Table("places", block), Table("number", (6, 6))]
    plan = RowPlan(keys, levels.buckets, 2, torch.device(DEVICE))
    plan.write(levels)
    tables = dict(zip(("block_sources", "places", "block_count"), map(plan.table, keys), strict=True))
    sources = torch.zeros(1, 144, 9, dtype=torch.int32)
    given = {**case.given, "rows": case.map, "recorded": None, "sources": sources, "blocks": {**case.blocks, **tables}}
    case.check(run_blocks(**given))


def test_blocks_that_it_is_timed_with() -> None:
    """The real ones over and over, and each output once."""
    case = Case(12, 16, 24, torch.float32)
    watch, real = BlockStopwatch(case.given), int(case.blocks["block_count"])
    for number in (real, 3 * real, real // 2):
        given = watch.with_blocks(number)
        blocks, places = given["blocks"], given["blocks"]["places"]
        assert blocks["block_sources"].shape[1] == places.shape[1] == number
        assert int(blocks["block_count"]) == typical(number)
        taken = places[places >= 0].sort().values
        assert torch.equal(taken, torch.arange(len(taken), dtype=torch.int32, device=DEVICE))
        assert len(taken) <= given["sources"].shape[1]
        assert run_blocks(**given).shape == (2, 4 * number, 24)


def test_its_timings_are_of_numbers_of_blocks() -> None:
    case = Case(12, 16, 24, torch.float16, upsampled=True)
    call, product = BlockCall(case.given), Product.of(case.given)
    assert call.shape == Blocks(product, 9) and call.shape.key == (*product.key[:2], "bias upsampled")
    assert call.shape.ways(8) == [WINOGRAD] and call.numbers == buckets(36) and call.number in call.numbers
    assert call.shape.workspace(WINOGRAD, 8) == 2 * 8 * 9 * (16 + 24) * 2
    full = BlockCall({**case.given, "full": True})
    assert full.numbers == (full.number,) == (case.blocks["places"].shape[1],)
    case.check(call.run(WINOGRAD))


@pytest.mark.parametrize(("nine", "blocks"), [(3.0, 2.0), (2.0, 3.0), (2.0, math.inf)])
def test_the_faster_one_for_rows_and_blocks_is_taken(nine: float, blocks: float, tmp_path: Path) -> None:
    """Each is timed once for all its numbers, and compiled before, where nothing is known."""
    case, timings, asked = Case(12, 32, 40, torch.float16), Timings.load("cpu", tmp_path), []
    rows = {name: value for name, value in case.given.items() if name != "blocks"}
    call, other = tuning.Call(rows), BlockCall(case.given)

    def measure(way: Any, number: int) -> float:
        asked.append((way, number))
        return blocks if way == WINOGRAD else nine

    with Compilers() as compilers:
        for decide in (False, True):
            with rehearse(compilers, decide) as rehearsal:
                run_fastest(call, timings, measure, [other])
                assert rehearsal.news == (not decide)
    assert {number for way, number in asked if way == WINOGRAD} == set(other.numbers)
    assert {number for way, number in asked if way != WINOGRAD} == set(call.numbers)
    chosen, way = choose_call([call, other], timings, measure)
    assert chosen is (other if blocks < nine else call) and (way == WINOGRAD) == (chosen is other)
    known = len(asked)
    case.check(run_fastest(call, timings, measure, [other]))
    assert len(asked) == known


def test_nothing_known_means_nine_taps(tmp_path: Path) -> None:
    case, timings = Case(12, 32, 40, torch.float16), Timings.load("cpu", tmp_path, calibrate="off")
    call, other = tuning.Call(case.given), BlockCall(case.given)
    assert choose_call([call, other], timings) == (call, RULE)
    timings.put(other.shape, other.number, WINOGRAD, 1.0)
    assert choose_call([call, other], timings) == (call, RULE)
