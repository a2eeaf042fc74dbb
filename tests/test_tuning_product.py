"""Which ways of a product the model of tiles proposes, with what split, and with how many rows they are timed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fisedit.runtime.kernels.launch import _overlaps, shared_memory, specializes, starts_early  # noqa: E402
from fisedit.runtime.kernels.multiply_rows import triton as kernel  # noqa: E402
from fisedit.runtime.kernels.multiply_rows.triton import Config  # noqa: E402
from fisedit.runtime.row_plan import bucket, buckets, smallest, typical  # noqa: E402
from fisedit.runtime.tuning import product as module  # noqa: E402
from fisedit.runtime.tuning.choose import RULE  # noqa: E402
from fisedit.runtime.tuning.product import LIBRARY, Product, actives, candidates, estimate, wide  # noqa: E402


def product(taps: int, channels: tuple[int, int], outputs: int, fused: str = "") -> Product:
    return Product(taps, 2, channels, outputs, torch.float16, fused)


def tiles(shape: Product, rows: int) -> set[tuple[int, int, int]]:
    return {(way.m, way.n, way.k) for way in candidates(shape, rows)}


def test_channels_come_in_whole_chunks_where_a_tile_can_take_them() -> None:
    assert {k for _, _, k in tiles(product(0, (1280, 1280), 1280), 100)} == {64, 128}
    assert {k for _, _, k in tiles(product(0, (640, 320), 320), 100)} == {64}
    assert {n for _, n, k in tiles(product(9, (320, 0), 320), 100) if k == 128} <= {32}  # which has no other
    assert product(0, (32, 0), 320).ways(100) == [RULE, LIBRARY]


def test_ways_are_few_and_run_on_the_gpu() -> None:
    """Tiles of about the rows' number; a gated product holds two tiles of the weight."""
    for shape in (product(9, (1280, 0), 1280), product(0, (1280, 0), 10240, "bias gelu gated"),
                  product(0, (320, 0), 320), product(9, (960, 0), 320)):  # fmt: skip
        for rows in (8, 24, 96, 200, 800, 3000, 9216):
            *ways, library = shape.ways(rows)
            assert library == LIBRARY and 1 <= len([way for way in ways if not way.turns]) <= 6
            assert not shape.taps or not any(way.turns for way in ways)
            for way in ways:
                assert isinstance(way, Config) and way.m <= 4 * rows and way.stages >= 2
                steps = way.stages - (way.m < 64)
                assert way.k * 2 * (way.m + wide(way, shape)) * steps <= 227 * 1024
    assert 256 not in {n for _, n, _ in tiles(product(0, (1280, 0), 10240, "gated"), 3000)}
    assert 256 in {n for _, n, _ in tiles(product(0, (1280, 0), 10240), 3000)}


def test_tiles_in_turns_are_timed_where_they_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tiles, and of few ones that are long; not of so few that most multiprocessors have none."""
    monkeypatch.setattr(module, "specializes", lambda: True)

    def turns(inner: int, outputs: int, rows: int, fused: str = "") -> bool:
        ways = module.ways.__wrapped__(product(0, (inner, 0), outputs, fused), rows)
        return any(isinstance(way, Config) and way.turns for way in ways)

    candidates.cache_clear()
    assert turns(320, 2560, 2816, "bias gelu gated") and turns(1280, 10240, 384, "bias gelu gated")
    assert turns(5120, 1280, 224) and not turns(1280, 1280, 40) and not turns(320, 320, 2816)
    candidates.cache_clear()


def test_work_is_split_where_tiles_are_few() -> None:
    """So far that each program still has a multiprocessor to itself."""
    shape = product(9, (1280, 0), 1280)
    for rows in (8, 38, 96, 130, 224):
        way = shape.ways(rows)[0]
        assert isinstance(way, Config) and way.split > 1
        active = typical(rows)
        assert 40 <= -(-2 * active // way.m) * -(-1280 // way.n) * way.split <= 132
    assert {way.split for way in candidates(product(0, (320, 0), 320), 8)} == {1}
    way = product(0, (5120, 0), 1280).ways(3000)[0]
    assert isinstance(way, Config) and way.split == 1


def test_rows_are_timed_with_the_padding_that_is_typical_of_them() -> None:
    for rows in (8, 12, 64, 80, 512, 640, 3072):
        assert bucket(typical(rows), 10_000) == bucket(smallest(rows), 10_000) == rows and typical(rows) < rows
        assert rows == 8 or bucket(smallest(rows) - 1, 10_000) < rows
    assert buckets(144) == (8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144)
    assert buckets(5) == (5,) and buckets(9) == (8, 9)


def test_no_two_programs_share_a_multiprocessor_that_need_not() -> None:
    """Where there is one for each, half of its shared memory is not enough for any."""
    for shape, rows in ((product(9, (320, 0), 320), 512), (product(0, (1280, 0), 1280), 48),
                        (product(9, (1280, 0), 1280), 16), (product(0, (640, 0), 640), 1024)):  # fmt: skip
        for way in candidates(shape, rows):
            programs = -(-2 * rows // way.m) * -(-shape.columns // way.n) * way.split
            memory = (way.stages - (way.m < 64)) * (way.m + way.n) * way.k * 2
            assert programs > 132 or memory > 113 * 1024


def test_two_programs_may_share_where_none_starts_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before Hopper: one starts or ends while the other multiplies."""
    monkeypatch.setattr(module, "starts_early", lambda: False)
    monkeypatch.setattr(module, "specializes", lambda: False)
    shape = product(9, (640, 0), 640, "bias only here")
    (way,) = [way for way in candidates(shape, 160) if (way.m, way.n, way.k) == (64, 128, 64)]
    assert 2 * way.stages * (64 + 128) * 64 * 2 <= 227 * 1024


@pytest.fixture
def other_gpu() -> Iterator[None]:
    """What was found for one GPU is forgotten, before and after."""

    def forget() -> None:
        asked = candidates, module.ways, module.fit, specializes, starts_early, shared_memory
        for cached in (*asked, actives, estimate, _overlaps):
            cached.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("other_gpu")
@pytest.mark.parametrize("early", [False, True])
def test_tiles_fit_a_gpu_with_less_shared_memory(early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """99 KB for a program, as on most GPUs that are no data center's; the rule's tile as well."""
    for where in (module, kernel):
        monkeypatch.setattr(where, "shared_memory", lambda: 99 * 1024)
    monkeypatch.setattr(module, "starts_early", lambda: early)
    monkeypatch.setattr(module, "specializes", lambda: False)
    for shape in (product(9, (1280, 0), 1280), product(0, (1280, 0), 10240, "gelu gated"), product(0, (320, 0), 960)):
        for rows in (8, 24, 96, 200, 800, 3000):
            assert len(tiles(shape, rows)) >= 2
            for way in (*candidates(shape, rows), module.rule(shape, 2 * rows)):
                step = (way.m + wide(way, shape)) * way.k * 2
                assert way.stages >= 2 and step * (way.stages - (way.m < 64)) <= 99 * 1024


@pytest.mark.usefixtures("other_gpu")
def test_unlike_gpus_have_tiles_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is asked for first: a Hopper's would not compile for the other, or not fit it."""
    capabilities, memory, asked = [(9, 0), (8, 9)], [228, 100], [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: asked[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[gpu_of(device)])
    facts = [SimpleNamespace(shared_memory_per_multiprocessor=kilobytes * 1024) for kilobytes in memory]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts[gpu_of(device)])

    def gpu_of(device: Any) -> int:
        return asked[0] if device is None else getattr(device, "index", device)

    shape = product(9, (1280, 0), 1280)
    for gpu in (0, 1, 0):
        asked[0] = gpu
        ways = candidates(shape, 200)
        assert any(way.specialized for way in ways) == (gpu == 0)
        largest = max((way.m + way.n) * way.k * 2 * way.stages for way in ways)
        assert (largest > 99 * 1024) == (gpu == 0)


def test_a_tile_is_split_as_its_rows_fill_the_gpu() -> None:
    """Two tiles of rows by ten share 132 multiprocessors in six; three, in four."""
    shape = product(9, (1280, 0), 1280)
    for rows, split in ((128, 6), (192, 4)):
        ways = [way for way in candidates(shape, rows) if (way.m, way.n, way.k) == (128, 128, 64)]
        assert [way.specialized for way in ways] == [False, True]
        for way in ways:
            assert way.split == split
            assert estimate(replace(way, split=2), shape, rows) > 1.3 * estimate(way, shape, rows)


def test_a_way_is_timed_where_a_round_more_begins() -> None:
    """3585 to 3840 rows of two samples: 29 or 30 tiles of rows by 9 of columns, on 132 multiprocessors."""
    shape, tile = product(9, (1280, 0), 1152), Config(128, 128, 64, 8, 4)
    assert actives(tile, shape, 1920) == (1793, 1920)
    assert actives(replace(tile, split=2), product(9, (1280, 0), 640), 768) == (typical(768),)  # up to 120 programs
    assert actives(LIBRARY, shape, 1920) == (typical(1920),)
    full = product(9, (1280, 0), 1152, "bias full")
    assert actives(tile, full, 1920) == (1920,)
    assert estimate(tile, full, 1792) < estimate(tile, shape, 1920) < estimate(tile, full, 1920)


def test_the_model_knows_what_is_slower() -> None:
    """Rows in tiles that fill the multiprocessors; large tiles for many rows, small ones for few."""
    many, few = product(9, (320, 0), 320), product(0, (1280, 0), 1280)
    small, large = Config(32, 64, 128, 4, 6), Config(128, 256, 64, 8, 3)
    assert estimate(large, many, 3072) < estimate(small, many, 3072)
    assert estimate(small, few, 16) < estimate(large, few, 16)
