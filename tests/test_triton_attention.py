"""Attention of active rows, reference and Triton kernel, against softmax in float64; interpreted without a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from fisedit.runtime.kernels.attend_rows import reference, triton  # noqa: E402
from fisedit.runtime.kernels.attend_rows.config import Config, choose_config  # noqa: E402
from fisedit.runtime.kernels.attend_rows.triton import attend_rows  # noqa: E402
from fisedit.runtime.kernels.gather_keys import reference as gather_reference  # noqa: E402
from fisedit.runtime.kernels.gather_keys.triton import gather_keys  # noqa: E402

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# The interpreter multiplies the bits of bfloat16, not its values.
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else [])]
HALVES = [dtype for dtype in DTYPES if dtype != torch.float32]
HEADS = 2


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One sample and head: ``[N, d]``, ``[L, d]``, ``[L, d]`` to ``[N, d]``, in float64."""
    return (query.double() @ key.double().T * scale).softmax(-1) @ value.double()


def head(rows: Tensor, number: int) -> Tensor:
    return rows.unflatten(-1, (HEADS, -1))[..., number, :]


def check(out: Tensor, wanted: dict[tuple[int, int], Tensor], dtype: torch.dtype) -> None:
    """``wanted`` by sample and head; it may say less rows than ``out`` has."""
    for (sample, number), rows in wanted.items():
        difference = head(out[sample], number)[: len(rows)].double() - rows
        assert difference.abs().max() <= TOLERANCE[dtype] * rows.abs().max()


def projections(number: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values as slices of one buffer; the last rows are not real."""
    merged = random(2, number, 3 * HEADS * dim, seed=1, dtype=dtype)
    query, key, value = merged.chunk(3, -1)
    key[:, -1] = value[:, -1] = float("nan")
    return query, key, value


def map_tables(masks: int, number: int, positions: int) -> Tensor:
    """Where each position of a map lies, all but the last of ``number`` active rows in use."""
    table = torch.arange(positions).repeat(masks, 1) + number
    for mask in range(masks):
        places = torch.randperm(positions, generator=torch.Generator().manual_seed(mask))[: number - 1]
        table[mask, places.sort().values] = torch.arange(number - 1)
    return table.to(DEVICE, torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "masks", "number", "positions", "config"),
    [
        (16, 1, 21, 64, Config(16, 32, 4, 2)),
        (40, 2, 9, 50, Config(16, 16, 4, 2, 7)),  # padded heads, a cut block, parts of tiles
        (20, 1, 9, 48, Config(16, 16, 4, 1, 2)),  # rows of any alignment, whole tiles and parts
        (80, 1, 5, 16, None),
        (64, 1, 300, 640, Config(192, 128, 4, 6, specialized=True)),  # on a CPU, by the other kernel
        (64, 2, 300, 640, Config(192, 128, 4, 6, 132, specialized=True)),  # each program has a part of a tile
        (40, 1, 200, 300, Config(192, 128, 4, 6, 7, specialized=True)),  # whole tiles and parts
    ],
)
def test_recorded_map_with_its_active_rows_renewed(dtype, dim, masks, number, positions, config) -> None:
    query, key, value = projections(number, dim, dtype)
    recorded_key, recorded_value = (random(2, positions, HEADS * dim, seed=seed, dtype=dtype) for seed in (2, 3))
    table = map_tables(masks, number, positions)
    wanted = {}
    for sample in range(2):
        places = table[sample % masks]
        full_key, full_value = recorded_key[sample].clone(), recorded_value[sample].clone()
        for position, place in enumerate(places.tolist()):
            if place < number:
                full_key[position], full_value[position] = key[sample, place], value[sample, place]
        for h in range(HEADS):
            given = (head(query[sample, : number - 1], h), head(full_key, h), head(full_value, h))
            wanted[sample, h] = softmax_attention(*given, 0.2)
    rest = (table, int32([number - 1]), None, locks := int32([0] * 64), HEADS, 0.2)
    double = [t.double() for t in (query, key, value, recorded_key, recorded_value)]
    check(reference.attend_rows(*double, *rest), wanted, torch.float64)
    addresses = [
        torch.tensor([t[0].data_ptr(), t[1].data_ptr()], device=DEVICE) for t in (recorded_key, recorded_value)
    ]
    for recorded in ((recorded_key, recorded_value), addresses):
        check(attend_rows(query, key, value, *recorded, *rest, config=config), wanted, dtype)
        assert not locks.any()


@pytest.mark.parametrize("dim", [16, 40, 80])
@pytest.mark.parametrize("programs", [0, 5])
def test_keys_in_one_piece(dim: int, programs: int) -> None:
    """By descriptor: what is loaded of a padded head belongs to the next one, or lies behind the last."""
    query = random(2, 20, HEADS * dim, seed=0, dtype=torch.float16)
    key, value = (random(2, 50, HEADS * dim, seed=seed, dtype=torch.float16) for seed in (1, 2))
    given = (query, key, value, None, None, None, int32([20]), None, locks := int32([0] * 64), HEADS, None)
    wanted = {
        (s, h): softmax_attention(head(query[s], h), head(key[s], h), head(value[s], h), dim**-0.5)
        for s in range(2)
        for h in range(HEADS)
    }
    check(attend_rows(*given, config=Config(16, 16, 4, 2, programs, whole=True)), wanted, torch.float16)
    assert not locks.any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("config", [Config(16, 64, 4, 1), Config(32, 16, 4, 2, 3), None], ids=str)
def test_text(dtype, config) -> None:
    """Few words, keys and values of any strides or as rows, the default scale."""
    query = random(2, 20, HEADS * 40, seed=0, dtype=dtype)
    key = random(2, 13, HEADS, 40, seed=1, dtype=dtype).transpose(1, 2)
    value = random(2, HEADS, 13, 48, seed=2, dtype=dtype)[..., :40]
    given = (query, key, value, None, None, None, int32([20]), None, int32([0] * 64), HEADS, None)
    wanted = {
        (s, h): softmax_attention(head(query[s], h), key[s, h], value[s, h], 40**-0.5)
        for s in range(2)
        for h in range(HEADS)
    }
    check(attend_rows(*given, config=config), wanted, dtype)
    check(reference.attend_rows(*(t.double() for t in given[:3]), *given[3:]), wanted, torch.float64)
    rows = torch.cat([key.transpose(1, 2).flatten(2), value.transpose(1, 2).flatten(2)], 2).chunk(2, 2)
    check(attend_rows(query, *rows, *given[3:], config=config), wanted, dtype)  # slices of one product
    check(reference.attend_rows(query.double(), *(t.double() for t in rows), *given[3:]), wanted, torch.float64)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("config", [Config(16, 32, 4, 2), Config(16, 16, 4, 1, 11)], ids=str)
def test_active_rows_alone(dtype, config) -> None:
    """Each sample has its own number of keys; what stands past them is not read as a number."""
    query, key, value = projections(35, 16, dtype)
    counts = [34, 7]
    value[1, 7:] = float("nan")
    rest = (None, None, None, int32([34]), int32(counts), locks := int32([0] * 64), HEADS, 0.3)
    wanted = {
        (s, h): softmax_attention(*(head(t[s, : counts[s]], h) for t in (query, key, value)), 0.3)
        for s in range(2)
        for h in range(HEADS)
    }
    check(attend_rows(query, key, value, *rest, config=config), wanted, dtype)
    assert not locks.any()
    clean = [t.double().nan_to_num() for t in (query, key, value)]
    check(reference.attend_rows(*clean, *rest), wanted, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("masks", "width", "number", "positions"),
    [(1, 64, 9, 100), (2, 72, 21, 130), (1, 10, 5, 16)],  # whole blocks of channels, cut ones, rows of any alignment
)
def test_keys_and_values_are_put_in_one_piece(dtype, masks, width, number, positions) -> None:
    key, value = random(2, number, 3 * width, seed=1, dtype=dtype).chunk(3, -1)[1:]  # slices of one product
    recorded = [random(2, positions, width, seed=seed, dtype=dtype) for seed in (2, 3)]
    table = map_tables(masks, number, positions)
    wanted = [rows.clone() for rows in recorded]
    for whole, rows in zip(wanted, (key, value), strict=True):
        for sample in range(2):
            places = table[sample % masks]
            active = (places < number).nonzero()[:, 0]
            whole[sample, active] = rows[sample, places[active].long()]
    strided = [torch.cat([rows, rows], -1)[..., :width] for rows in recorded]
    addresses = [torch.tensor([sample.data_ptr() for sample in rows], device=DEVICE) for rows in recorded]
    for maps in (recorded, strided, addresses):
        for out, rows in zip(gather_keys(key, value, *maps, table), wanted, strict=True):
            assert torch.equal(out, rows) and out.is_contiguous()
    for out, rows in zip(gather_reference.gather_keys(key, value, *recorded, table), wanted, strict=True):
        assert torch.equal(out, rows)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("programs", [1, 2, 3, 5, 8, 13, 40, 1000])
def test_any_number_of_programs_shares_the_work(programs: int, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one tile each, parts of two tiles, parts of one, and more of them than there is work for. Interpreted
    one after the other, they wait in vain."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton, "multiprocessors", lambda device: 132 * waits)
        monkeypatch.setattr(triton, "POLLS", 2)
    query, key, value = (random(1, 40, HEADS * 16, seed=seed, dtype=torch.float32) for seed in range(3))
    given = (query, key, value, None, None, None, int32([35]), None, locks := int32([0] * 64), HEADS, None)
    whole = attend_rows(*given, config=Config(16, 16, 4, 1))[:, :35]
    shared = attend_rows(*given, config=Config(16, 16, 4, 1, programs))[:, :35]
    assert (whole - shared).abs().max() <= 1e-5 * whole.abs().max() and not locks.any()


def test_too_few_locks_for_shared_tiles() -> None:
    query, key, value = (random(1, 40, HEADS * 16, seed=seed, dtype=torch.float32) for seed in range(3))
    given = (query, key, value, None, None, None, int32([40]), None)
    locks = int32([7] * 5)  # there are six tiles, which would wait for zeros
    few = attend_rows(*given, locks, HEADS, None, config=Config(16, 16, 4, 1, 2))
    whole = attend_rows(*given, int32([0]), HEADS, None, config=Config(16, 16, 4, 1))
    assert torch.equal(whole, few) and (locks == 7).all()


@pytest.mark.parametrize("queries", [8, 461, 2765, 16384])
@pytest.mark.parametrize(("keys", "dim", "pairs"), [(77, 64, 10), (1024, 80, 16), (4096, 40, 16), (9216, 64, 10)])
def test_the_chosen_programs_fill_the_gpu_and_no_more(queries: int, keys: int, dim: int, pairs: int) -> None:
    config = choose_config(queries, keys, dim, pairs, itemsize=2, gathered=keys > 77)
    tiles, blocks = -(-queries // config.m) * pairs, -(-keys // config.n)
    assert config.programs <= tiles * blocks
    assert (config.programs or tiles) >= 120 or blocks == 1
    assert config.programs % 132 == 0
