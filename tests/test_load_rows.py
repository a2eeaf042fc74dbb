"""Scattered rows of recorded maps into buffers, reference and Triton kernel, against a loop over all pairs; and rows
as int8.

Without a GPU the kernel runs interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from fisedit.runtime.kernels.load_rows import reference  # noqa: E402
from fisedit.runtime.kernels.load_rows.moves import ROWS, Moves, plan_moves  # noqa: E402
from fisedit.runtime.kernels.load_rows.triton import load_rows  # noqa: E402
from fisedit.runtime.kernels.quantize_rows.reference import dequantize_rows, quantize_rows  # noqa: E402

PROVIDERS = {"reference": (reference.load_rows, "cpu"), "triton": (load_rows, DEVICE)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SOURCES, GOALS = 150, 130
"""Rows of a sample."""


def random_pairs(number: int, seed: int) -> Tensor:
    """Source rows, some of them twice; goal rows, each once; in any order."""
    generator = torch.Generator().manual_seed(seed)
    goals = torch.randperm(GOALS, generator=generator)[:number]
    return torch.stack([torch.randint(SOURCES, (number,), generator=generator), goals], 1)


@dataclass
class Case:
    """Recorded maps, their buffers, full of NaN, and what these should become."""

    moves: Moves
    recorded: list[Tensor]  # of each view [B, R, C]
    scales: list[Tensor] | None
    goals: list[Tensor]
    wanted: list[Tensor]
    dtype: torch.dtype

    def run(self, load: Callable[..., None], without: tuple[tuple[int, int], ...] = (), **more: int) -> None:
        origins = addresses(self.recorded)
        for view, sample in without:
            origins[view, sample] = 0
        device = self.goals[0].device
        scales = None if self.scales is None else addresses(self.scales).to(device)
        load(self.moves, origins.to(device), addresses(self.goals).to(device), self.dtype, scales, **more)

    def check(self) -> None:
        """To the bit, the NaN of rows that nobody names included.

        Triton's interpreter truncates where it should round to bfloat16: one unit in the last place.
        """
        truncated = DEVICE == "cpu" and self.scales is not None and self.dtype == torch.bfloat16
        for out, wanted in zip(self.goals, self.wanted, strict=True):
            if truncated:
                torch.testing.assert_close(out, wanted, rtol=2**-7, atol=0, equal_nan=True)
            else:
                assert torch.equal(out.cpu().view(torch.uint8), wanted.view(torch.uint8))


def addresses(maps: list[Tensor]) -> Tensor:
    return torch.tensor([[sample.data_ptr() for sample in each] for each in maps])


def make(
    pairs: list[list[Tensor]], lists: list[int], widths: list[int], batch: int, dtype: torch.dtype, device: str,
    int8: bool = False, pinned: bool = False, without: tuple[tuple[int, int], ...] = (),
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    recorded, scales, goals, wanted = [], [], [], []
    for view, width in enumerate(widths):
        if int8:
            rows = torch.randint(-127, 128, (batch, SOURCES, width), generator=generator, dtype=torch.int8)
        else:
            rows = torch.randn(batch, SOURCES, width, generator=generator).to(dtype)
        scale = torch.rand(batch, SOURCES, generator=generator)
        goal = torch.full((batch, GOALS, width), torch.nan, dtype=dtype)
        result = goal.clone()
        for sample in range(batch):
            of_mask = pairs[lists[view]][sample if len(pairs[lists[view]]) > 1 else 0]
            for source, place in of_mask.tolist() if (view, sample) not in without else []:
                row = rows[sample, source]
                result[sample, place] = (row.float() * scale[sample, source]).to(dtype) if int8 else row
        recorded.append(rows.pin_memory() if pinned else rows.to(device))
        scales.append(scale.pin_memory() if pinned else scale.to(device))
        goals.append(goal.to(device))
        wanted.append(result)
    moves = plan_moves(pairs, lists, widths, batch, device)
    return Case(moves, recorded, scales if int8 else None, goals, wanted, dtype)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_arrive(dtype: torch.dtype, int8: bool, masks: int, provider: str) -> None:
    """Widths that fill a block and overflow it, that are no multiple of what is loaded at once, and of one element;
    lists that end with an item, within one, or have none."""
    load, device = PROVIDERS[provider]
    lengths = [[2 * ROWS + 5, ROWS], [0, 0], [3, 0], [ROWS + 1, GOALS]]
    pairs = [
        [random_pairs(number, seed=10 * i + j) for j, number in enumerate(each[:masks])]
        for i, each in enumerate(lengths)
    ]
    without = ((4, 1), (6, 0))
    case = make(pairs, [0, 3, 1, 2, 3, 0, 0, 3], [320, 8, 16, 1296, 40, 5, 12, 1], 2, dtype, device, int8,
                without=without)  # fmt: skip
    case.run(load, without, programs=7)
    case.check()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_many_programs_and_few(provider: str) -> None:
    """More than there is work, the default, one; rows of the wide and the narrow kind in one launch."""
    load, device = PROVIDERS[provider]
    for more in ({"programs": 1000}, {}, {"programs": 1}):
        case = make([[random_pairs(GOALS, seed=0)]], [0, 0], [64, 3], 3, torch.float16, device)
        case.run(load, **more)
        case.check()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nothing_to_load(provider: str) -> None:
    load, device = PROVIDERS[provider]
    empty = torch.empty(0, 2, dtype=torch.int64)
    case = make([[empty]], [0], [8], 2, torch.float16, device)
    case.run(load)
    case.check()
    nothing = torch.empty(0, 2, dtype=torch.int64, device=device)
    load(plan_moves([], [], [], 2, device), nothing, nothing, torch.float16)


@pytest.mark.skipif(DEVICE == "cpu", reason="a GPU reads the host's memory")
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
def test_rows_come_from_the_hosts_memory(int8: bool) -> None:
    """Some views of one launch lie there, others in the GPU's; on a stream of its own."""
    pairs = [[random_pairs(GOALS, seed=0), random_pairs(50, seed=1)]]
    case = make(pairs, [0, 0, 0], [320, 6, 1280], 2, torch.float16, DEVICE, int8, pinned=True)
    case.recorded[2] = case.recorded[2].to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.run(load_rows)
    stream.synchronize()
    case.check()


def test_work_covers_every_pair_once() -> None:
    pairs = [[random_pairs(n, seed=n) for n in each] for each in ([0, ROWS, 2], [2 * ROWS + 1, 1, 0])]
    lists = [1, 0, 1]
    moves = plan_moves(pairs, lists, [8, 16, 24], 3, "cpu")
    assert all(table.dtype == torch.int32 for table in vars(moves).values())
    assert moves.lists.tolist() == lists and moves.widths.tolist() == [8, 16, 24]
    assert moves.counts.tolist() == [[0, ROWS, 2], [2 * ROWS + 1, 1, 0]]
    for which, each in enumerate(pairs):
        for mask, wanted in enumerate(each):
            start = moves.starts[which, mask]
            assert torch.equal(moves.pairs[start : start + len(wanted)].long(), wanted)
    moved = [(view, sample, first // ROWS) for view, sample, first in moves.work.tolist()]
    assert moved == [
        (view, sample, number)
        for view, which in enumerate(lists)
        for sample in range(3)
        for number in range(-(-len(pairs[which][sample]) // ROWS))
    ]


def test_masks_must_be_one_or_the_batchs() -> None:
    with pytest.raises(ValueError, match=r"\[2\] masks for a batch of 3"):
        plan_moves([[random_pairs(2, seed=0)] * 2], [0], [8], 3, "cpu")
    with pytest.raises(ValueError, match=r"\[1, 2\] masks for a batch of 2"):
        plan_moves([[random_pairs(2, seed=0)], [random_pairs(2, seed=0)] * 2], [0], [8], 2, "cpu")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-4, 300.0])
def test_int8_is_off_by_half_a_step(dtype: torch.dtype, size: float) -> None:
    rows = (torch.randn(2, 50, 40, generator=torch.Generator().manual_seed(0)) * size).to(DEVICE, dtype)
    rows[0, 3, :] = 0
    rows[1, 4, :] = rows[1, 4, 0]
    steps, scales = quantize_rows(rows)
    assert (steps.shape, steps.dtype) == (rows.shape, torch.int8)
    assert (scales.shape, scales.dtype) == (rows.shape[:2], torch.float32)
    assert steps.int().abs().amax(-1).eq(127).sum() == 99  # all rows but the one of zeros use the whole range
    values = dequantize_rows(steps, scales, torch.float64)
    error = (values - rows.double()).abs()
    assert (error <= scales.double()[..., None] * 0.50001).all()  # and what float32 rounds
    assert not values[0, 3].any() and scales[0, 3] > 0
    rounded = dequantize_rows(steps, scales, dtype)
    assert rounded.dtype == dtype and torch.equal(rounded, dequantize_rows(steps, scales, torch.float32).to(dtype))


def test_int8_of_extreme_rows() -> None:
    """The smallest numbers that there are, the largest, and those that are none."""
    tiny = torch.finfo(torch.float32).tiny
    finite = [[tiny / 64, -tiny / 3], [3e-45, -1e-44], [3e38, -1e38]]
    rows = torch.tensor([*finite, [torch.inf, 1.0], [torch.nan, 1.0]], device=DEVICE)
    steps, scales = quantize_rows(rows[None])
    values = dequantize_rows(steps, scales, torch.float32)[0]
    assert ((values - rows).abs()[:3] <= scales[0, :3, None] * 0.50001).all()
    assert not values[3:].isfinite().any()


def test_quantized_rows_are_what_the_kernel_reads() -> None:
    """What was quantized and loaded is what PyTorch dequantizes."""
    rows = torch.randn(1, SOURCES, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    steps, scales = quantize_rows(rows)
    pairs = random_pairs(40, seed=1)
    out = torch.zeros(1, GOALS, 48, dtype=torch.float16, device=DEVICE)
    origins, goals, factors = (addresses([each]).to(DEVICE) for each in (steps, out, scales))
    load_rows(plan_moves([[pairs]], [0], [48], 1, DEVICE), origins, goals, torch.float16, factors)
    source, place = pairs.T.to(DEVICE)
    assert torch.equal(out[0, place], dequantize_rows(steps, scales, torch.float16)[0, source])
