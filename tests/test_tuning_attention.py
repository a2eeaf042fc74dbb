"""Every way to attend gives the attention, and the fastest one is taken. Without a GPU, interpreted."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meter import Allocations
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from fisedit.runtime.calibration import Timings  # noqa: E402
from fisedit.runtime.kernels.attend_rows import config, reference  # noqa: E402
from fisedit.runtime.kernels.attend_rows.config import Config, choose_config  # noqa: E402
from fisedit.runtime.kernels.compilers import Compilers  # noqa: E402
from fisedit.runtime.kernels.gather_keys import triton as gather_keys  # noqa: E402
from fisedit.runtime.kernels.launch import rehearse  # noqa: E402
from fisedit.runtime.row_plan import typical  # noqa: E402
from fisedit.runtime.tuning import attend_rows as tuning  # noqa: E402
from fisedit.runtime.tuning.choose import RULE, choose_way, run_fastest  # noqa: E402

HEADS, DIM, ACTIVE, KEYS = 2, 16, 5, 24
SD2 = [tuning.Attention(2, heads, 64, keys, torch.float16) for heads, keys in ((5, 9216), (10, 2304), (20, 576))]
CUDNN = "_scaled_dot_product_cudnn_attention"


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.float16)


def arguments() -> dict[str, Any]:
    """Five rows of which four are real, over a map of 24 positions; slices of one product, as in a graph."""
    query, key, value = random(2, ACTIVE, 3 * HEADS * DIM, seed=1).chunk(3, -1)
    recorded = [random(2, KEYS, HEADS * DIM, seed=seed) for seed in (2, 3)]
    table = torch.arange(KEYS, dtype=torch.int32) + ACTIVE
    table[[3, 4, 11, 20]] = torch.arange(ACTIVE - 1, dtype=torch.int32)
    return {
        "query": query, "key": key, "value": value, "recorded_key": recorded[0], "recorded_value": recorded[1],
        "table": table[None].to(DEVICE), "count": torch.tensor([ACTIVE - 1], dtype=torch.int32, device=DEVICE),
        "key_count": None, "locks": torch.zeros(64, dtype=torch.int32, device=DEVICE), "heads": HEADS, "scale": 0.2,
    }  # fmt: skip


def attend_like_cudnn(query: Tensor, key: Tensor, value: Tensor, *rest: Any, scale: float) -> tuple[Tensor]:
    """Its op, on a CPU: it takes views, and lays its result out as the query."""
    assert rest == (None, False)
    assert all(t.stride(3) == 1 and t.stride(1) == DIM for t in (query, key, value))  # no copies
    logits = query.double() @ key.double().transpose(2, 3) * scale
    out = (logits.softmax(-1) @ value.double()).half()
    return (torch.empty_like(query).copy_(out),)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.ops.aten, CUDNN, attend_like_cudnn)


WHOLE = [Config(64, 16, 4, 1, whole=True), Config(64, 16, 4, 1, programs=7, whole=True)]
"""Keys and values in one piece first: a cut block of keys, whole tiles and parts of one."""


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("way", [RULE, Config(64, 32, 4, 1, programs=12), *WHOLE, tuning.CUDNN], ids=str)
def test_every_way_gives_the_attention(way: tuning.Way) -> None:
    given = arguments()
    wanted = reference.attend_rows(*(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
                                     for v in given.values()))  # fmt: skip
    out = tuning.run(way, given)
    assert out.shape == wanted.shape and out.is_contiguous()
    torch.testing.assert_close(out[:, : ACTIVE - 1].double(), wanted[:, : ACTIVE - 1], atol=2e-3, rtol=0)


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("way", [RULE, Config(64, 32, 4, 1, programs=12), *WHOLE, tuning.CUDNN], ids=str)
def test_what_a_way_needs_is_known(way: tuning.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its kernels, whose arguments the interpreter copies."""
    monkeypatch.setattr(tuning.kernel, "launch", lambda *_, **__: None)
    monkeypatch.setattr(gather_keys, "launch", lambda *_, **__: None)
    given = arguments()
    with Allocations() as seen:
        tuning.run(way, given)
        gathered = 2 * given["recorded_key"].nbytes
    wanted = tuning.Attention.of(given).workspace(way, ACTIVE)
    if way == tuning.CUDNN:  # what a library needs besides is its own
        assert wanted == gathered <= seen.peak
    else:
        assert seen.peak - given["query"].nbytes == wanted


def test_there_is_a_choice_over_whole_maps_in_half_precision() -> None:
    given = arguments()
    query = given["query"]
    assert tuning.has_ways(given)
    for change in (
        {"table": None},
        {"key_count": torch.ones(2, dtype=torch.int32)},
        {"query": query.float()},
        {"query": query[..., 4:28]},  # not at multiples of 16 bytes
        {"heads": 8},  # of four channels
    ):
        assert not tuning.has_ways(given | change)


def test_nothing_is_timed_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "run", lambda way, given: way)
    monkeypatch.setattr(tuning, "timings_of", None)
    given = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments().items()}
    assert tuning.attend_rows(*given.values()) == RULE


def test_what_is_met_is_timed_once(tmp_path: Path) -> None:
    timings, asked = Timings.load(DEVICE, tmp_path), []

    def measure(way: Any, rows: int) -> float:
        asked.append((str(way), rows))
        return 1.0 if str(way).startswith("64x32") else 2.0

    call = tuning.Call(arguments())
    chosen = choose_way(call, timings, measure)
    assert isinstance(chosen, Config) and chosen.n == 32 and choose_way(call, timings, measure) == chosen
    assert {rows for _, rows in asked} == {8, 12, 16, 24}  # of 24 positions
    assert len(asked) == len(set(asked))
    for rows in (8, 12, 16, 24):
        assert {way for way, at in asked if at == rows} == set(map(str, call.shape.ways(rows)))
    timings.calibrate = "off"
    timings.table.clear()
    timings._settled.clear()
    assert choose_way(call, timings, measure) == RULE and timings.settled(call.shape, call.number) is None


def test_cudnn_attends_nothing_in_a_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was never computed would be their input."""
    monkeypatch.setattr(torch.ops.aten, CUDNN, None)
    monkeypatch.setattr(tuning, "LEAST_WORK", 0)
    given, timings = arguments(), Timings.load(DEVICE, tmp_path)
    call = tuning.Call(given)
    assert tuning.CUDNN in call.shape.ways(8)
    monkeypatch.setattr(tuning.kernel, "attend_rows", lambda **given: given["query"].contiguous())
    monkeypatch.setattr(tuning, "gather_keys", lambda *rows: rows[2:4])
    with Compilers() as compilers, rehearse(compilers) as first:
        assert run_fastest(call, timings).shape == given["query"].shape
    assert first.news
    with Compilers() as compilers, rehearse(compilers, decide=True):
        out = run_fastest(call, timings, lambda way, rows: 1.0 if way == tuning.CUDNN else 2.0)
    assert out.shape == given["query"].shape and out.is_contiguous()
    with Compilers() as compilers, rehearse(compilers) as again:
        run_fastest(call, timings)
    assert not again.news and again.skipped  # the library has loaded nothing yet


@pytest.mark.usefixtures("cudnn")
def test_rows_to_time_are_attended_like_those_of_a_graph() -> None:
    """Twelve of them, two of which are padding, at the first positions of the map, in both kinds of memory."""
    given = arguments()
    sized = tuning.Stopwatch(given).with_rows(12, 10)
    assert sized["query"].shape == (2, 12, HEADS * DIM) and sized["query"].stride() == (12 * 96, 96, 1)
    assert int(sized["count"]) == 10 and tuning.has_ways(sized)
    assert sized["table"].tolist() == [[*range(10), *range(22, 36)]]
    out, wanted = tuning.run(RULE, sized), reference.attend_rows(**sized)
    torch.testing.assert_close(out[:, :10], wanted[:, :10], atol=2e-3, rtol=0)
    many = tuning.Stopwatch(given).with_rows(32, 28)  # past the map's end
    assert int(many["table"].max()) < 32

    pointers = torch.tensor([rows.data_ptr() for rows in given["recorded_key"]], device=DEVICE)
    stopwatch = tuning.Stopwatch(given | {"recorded_key": pointers, "recorded_value": pointers})
    for (key, value), (key_at, value_at) in zip(stopwatch.maps, stopwatch.recorded, strict=True):
        assert key_at.tolist() == [rows.data_ptr() for rows in key]
        assert value_at.tolist() == [rows.data_ptr() for rows in value]


def test_a_library_that_refuses_is_never_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("No valid execution plans built.")

    monkeypatch.setattr(torch.ops.aten, CUDNN, refuse)
    monkeypatch.setattr(tuning, "time_way", lambda runs: 1.0)
    stopwatch = tuning.Stopwatch(arguments())
    assert [stopwatch(way, 8) for way in (RULE, tuning.CUDNN)] == [1.0, float("inf")]


@pytest.mark.parametrize("attention", SD2, ids=lambda attention: str(attention.keys))
def test_ways_are_few(attention: tuning.Attention) -> None:
    for number in (8, 32, 128, 512, 3072, 6144):
        ways = tuning.candidates(attention, number)
        assert RULE not in ways and len(set(map(str, ways))) == len(ways) <= 13
        configs = [way for way in ways if isinstance(way, Config)]
        rule = choose_config(typical(number), attention.keys, 64, 2 * attention.heads, 2, True)
        assert rule.programs in {way.programs for way in configs if way.m == rule.m}
        assert len(configs) >= 4 and all(way.m <= max(64, number) for way in configs)


def test_a_further_round_of_tiles_counts() -> None:
    """Of a tile for each program, 2305 queries have 130 tiles and 2560 have 140, of 132 multiprocessors."""
    attention, tile = tuning.Attention(2, 5, 64, 4096, torch.float16), tuning.SPECIALIZED
    assert tuning.actives(tile, attention, 2560) == (2305, 2560)
    assert tuning.actives(tile, attention, 384) == tuning.actives(replace(tile, programs=132), attention, 384) == (352,)
    assert tuning.actives(replace(tile, programs=132), attention, 2560) == (2432,)
    assert tuning.actives(tuning.CUDNN, attention, 2560) == (2432,)


@pytest.mark.parametrize("attention", SD2, ids=lambda attention: str(attention.keys))
def test_no_more_programs_fit_a_multiprocessor_than_it_gets(attention: tuning.Attention) -> None:
    """Of 228 KB, a program takes one, its queries, and the blocks of keys and values that are on their way. Where warps
    have tasks of their own, one takes all."""
    for number in (16, 160, 512, 768):
        for way in attention.ways(number):
            if isinstance(way, Config) and way.n >= 64 and not way.specialized:
                programs = way.programs or -(-typical(number) // way.m) * 2 * attention.heads
                each = -(-programs // 132)
                blocks, table = (way.stages, 0) if way.whole else ((way.stages + 1) // 2, 4)
                memory = 1024 + way.m * 128 + blocks * way.n * (256 + table)
                assert each > 2 or (each + 1) * memory > 228 * 1024 >= each * memory


def test_pipelines_are_short_where_no_program_starts_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Hopper, which has the most shared memory."""
    deep = SD2[1].ways(160)
    monkeypatch.setattr(config, "starts_early", lambda: False)
    pairs = zip(deep, SD2[1].ways(160), strict=True)
    alone = [
        (way, short)
        for way, short in pairs
        if isinstance(way, Config) and way.programs == 132 and way.n >= 64 and not way.specialized
    ]
    assert alone and all(short.stages <= 5 < way.stages for way, short in alone)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("keys", [64, 256, 4096])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 160, 256])
def test_rule_tiles_fit_a_gpu_with_less_shared_memory(
    head_dim: int, keys: int, gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """99 KB for a program, some of which what follows the sums takes; a block comes two stages after its table."""
    monkeypatch.setattr(config, "shared_memory", lambda programs=1: (100 - programs) * 1024)
    monkeypatch.setattr(config, "starts_early", lambda: False)
    row = 2 * (1 << (head_dim - 1).bit_length())
    for queries in (40, 400):
        tile = choose_config(queries, keys, head_dim, 16, 2, gathered)
        blocks = max(1, (tile.stages - 1) // (2 if gathered else 1))
        assert tile.m * row + blocks * tile.n * 2 * row <= 90 * 1024


def test_keys_are_put_in_one_piece_where_that_can_win() -> None:
    def found(attention: tuning.Attention, number: int) -> list[tuning.Way]:
        ways = tuning.candidates(attention, number)
        return [way for way in ways if way == tuning.CUDNN or (isinstance(way, Config) and way.whole)]

    assert len(found(SD2[0], 3072)) == len(found(SD2[0], 512)) == 3 and found(SD2[0], 512)[-1] == tuning.CUDNN
    assert found(SD2[2], 32) == []
    assert found(tuning.Attention(2, 8, 160, 4096, torch.bfloat16), 1024) == []
