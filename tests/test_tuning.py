"""Every way to compute a product gives the product, and the fastest one is taken. Without a GPU, interpreted."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from meter import Allocations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from fisedit.runtime.calibration import Timings  # noqa: E402
from fisedit.runtime.kernels.compilers import Compilers  # noqa: E402
from fisedit.runtime.kernels.finish_rows import triton as finish_rows  # noqa: E402
from fisedit.runtime.kernels.gather_patches import triton as gather_patches  # noqa: E402
from fisedit.runtime.kernels.launch import current, rehearse, starts_early  # noqa: E402
from fisedit.runtime.kernels.multiply_norm_rows import reference as norm_reference  # noqa: E402
from fisedit.runtime.kernels.multiply_rows import reference  # noqa: E402
from fisedit.runtime.kernels.multiply_rows.triton import Config  # noqa: E402
from fisedit.runtime.tuning import multiply_rows as tuning  # noqa: E402
from fisedit.runtime.tuning.choose import choose_way, run_fastest  # noqa: E402
from fisedit.runtime.tuning.product import candidates  # noqa: E402

ACTIVE, POSITIONS, CHANNELS, OUTPUTS = 5, 9, 64, 96


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.float16)


def arguments(taps: int) -> dict[str, Any]:
    """A product of 5 rows, as a linear layer or a convolution of 9 positions."""
    rows, recorded, sources = random(2, ACTIVE, CHANNELS, seed=1), None, None
    if taps > 1:
        recorded = random(2, POSITIONS, CHANNELS, seed=2)
        sources = torch.randint(-1, ACTIVE + POSITIONS, (1, ACTIVE, taps), generator=torch.Generator().manual_seed(3))
        sources = sources.to(DEVICE, torch.int32)
    return {
        "rows": rows, "rows2": None, "recorded": recorded, "sources": sources,
        "weight": random(OUTPUTS, taps * CHANNELS, seed=4) * 0.05, "bias": random(OUTPUTS, seed=5),
        "affine": None, "full": False, "residual": random(2, ACTIVE, OUTPUTS, seed=6),
        "count": torch.tensor([ACTIVE], dtype=torch.int32, device=DEVICE),
        "locks": torch.zeros(64, dtype=torch.int32, device=DEVICE), "activation": "silu", "gated": False,
        "positions": 24,
    }  # fmt: skip


def check(out: torch.Tensor, given: dict[str, Any], rows: int = ACTIVE) -> None:
    wide: dict[str, Any] = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()
    }
    wanted = reference.multiply_rows(**wide)[:, :rows]
    assert out.dtype == torch.float16 and out.shape == wanted.shape
    assert (out.double() - wanted).abs().max() <= 2e-3 * wanted.abs().max()


@pytest.mark.parametrize("taps", [1, 9])
def test_every_way_gives_the_product(taps: int) -> None:
    given = arguments(taps)
    shape = tuning.Product.of(given)
    ways = shape.ways(ACTIVE)
    assert ways[-1] == tuning.LIBRARY and 2 <= len(ways) <= 7
    for way in (tuning.RULE, *ways, *candidates(shape, 64)):
        check(tuning.run(way, given), given)


FUSED: dict[str, dict[str, Any]] = {
    "a bias in float32": {"bias": random(OUTPUTS, seed=5).float()},
    "a normalization": {"affine": random(2, 2, OUTPUTS, seed=7).float(), "residual": None},
    "a normalization for later": {"affine": random(2, 2, OUTPUTS, seed=7).float(), "full": True, "residual": None},
    "a bias alone": {"activation": "none", "residual": None},
    "a gate": {"gated": True, "activation": "gelu", "residual": None},
    "a gate, all rows active": {"gated": True, "activation": "gelu", "full": True, "residual": None},
    "three sources": {"rows2": random(2, ACTIVE, 128, seed=8), "rows3": random(2, ACTIVE, 64, seed=10),
                      "weight": random(OUTPUTS, 256, seed=9) * 0.05},
    "two sources": {"rows2": random(2, ACTIVE, 192, seed=8), "weight": random(OUTPUTS, 256, seed=9) * 0.05},
}  # fmt: skip


@pytest.mark.parametrize("name", list(FUSED))
def test_the_library_is_followed_by_all_that_is_fused(name: str) -> None:
    given = arguments(1) | FUSED[name]
    check(tuning.run(tuning.LIBRARY, given), given)
    check(tuning.run(tuning.RULE, given), given)


def with_more(three: bool) -> dict[str, Any]:
    """A convolution with channels of the outputs' own rows."""
    given = arguments(9)
    more = {"rows2": random(2, ACTIVE, 128, seed=8), "rows3": random(2, ACTIVE, 64, seed=10) if three else None}
    return given | more | {"weight": random(OUTPUTS, 9 * CHANNELS + 128 + 64 * three, seed=9) * 0.05}


@pytest.mark.parametrize("three", [False, True])
def test_a_convolution_with_channels_of_its_outputs(three: bool) -> None:
    given = with_more(three)
    product = tuning.Product.of(given)
    assert product.channels == (CHANNELS, 128, 64 * three) and product.steps(64) == 9 + 2 + three
    for way in product.ways(ACTIVE):
        check(tuning.run(way, given), given)


NO_NORM = {
    "norm_affine": None, "norm_activation": "none", "norm_weight": None, "norm_bias": None, "eps": 0.0,
    "norm_moments": False,
}  # fmt: skip
NORMS: dict[str, dict[str, Any]] = {
    "layer_norm": NO_NORM | {"norm_weight": random(OUTPUTS, seed=7), "norm_bias": random(OUTPUTS, seed=8), "eps": 0.1},
    "normalize": NO_NORM
    | {"norm_affine": random(2, 2, 2 * OUTPUTS, seed=7).float()[..., OUTPUTS:], "norm_activation": "silu"},
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of what is run; by the rule, and nothing is timed."""
    calls: list[dict[str, Any]] = []

    def run(way: tuning.Way, given: dict[str, Any], run: Any = tuning.run) -> Any:
        calls.append(given)
        return run(way, given)

    monkeypatch.setattr(tuning, "run", run)
    monkeypatch.setattr(tuning, "run_fastest", lambda call, *_, **others: call.run(tuning.RULE))
    monkeypatch.setattr(tuning, "timings_of", lambda device: None)
    return calls


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("name", list(NORMS))
def test_every_way_is_followed_by_a_norm(name: str, taps: int, ran: list[dict[str, Any]]) -> None:
    """Padded rows; the norm is that of the reference, of the rows as they were rounded. It has timings of its own."""
    given = arguments(taps)
    given["count"].fill_(ACTIVE - 1)
    made = [tuning.multiply_norm_rows(*given.values(), **NORMS[name])]
    shape = tuning.Product.of(ran[0])
    assert shape.fused == f"bias residual silu {name}"
    made += [tuning.run(way, ran[0]) for way in (tuning.LIBRARY, shape.ways(ACTIVE)[0])]
    wanted = norm_reference.multiply_norm_rows(*given.values(), **NORMS[name])[1]
    for out, normalized, moments in made:
        assert moments.shape == (2, 0, *out.shape[:2])
        check(out[:, : ACTIVE - 1], given, rows=ACTIVE - 1)
        torch.testing.assert_close(normalized[:, : ACTIVE - 1], wanted[:, : ACTIVE - 1], atol=4e-2, rtol=0)


def test_rows_whose_statistics_come_after_them_are_not_normalized(ran: list[dict[str, Any]]) -> None:
    given = arguments(1)
    out, same, _ = tuning.multiply_norm_rows(*given.values(), **NORMS["normalize"], norm_full=True)
    assert same is out and tuning.Product.of(ran[0]).fused == "bias residual silu"
    check(out, given)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("makes", [tuning.LIBRARY, tuning.RULE, Config(16, 64, 32, 4, 2, 2)])
def test_a_norm_between_two_products(makes: tuning.Way, gated: bool) -> None:
    """In all pairs of ways: the first gives normalized rows, or the rows as they are and their moments."""
    given = arguments(1) | {"weight": random(OUTPUTS, CHANNELS, seed=4), "activation": "none"}
    given["residual"] = 4 + given["residual"]  # a mean beside which the deviation is small
    norm = NO_NORM | {"eps": 0.1, "norm_moments": True}
    rows, normalized, moments = tuning.run(makes, given | {"norm": norm})
    assert (moments.shape[1] > 0) == (normalized is rows) == (makes != tuning.LIBRARY)
    weight = random(64, OUTPUTS, seed=3) * 0.1
    read = arguments(1) | {
        "rows": normalized, "weight": weight, "bias": random(64, seed=5), "residual": None, "moments": moments,
        "activation": "gelu" if gated else "none", "gated": gated, "center": weight.float().sum(1), "input_eps": 0.1,
    }  # fmt: skip
    exact = F.layer_norm(rows.double(), rows.shape[2:], eps=0.1)
    for way in (tuning.RULE, Config(16, 32, 64, 4, 2, 2), tuning.LIBRARY):
        check(tuning.run(way, read), read | {"rows": exact, "moments": None})


def test_both_forms_of_a_norm_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other numbers of rows may take another way, and so may the product before, which gives the other form."""
    seen: list[tuple[tuning.Way, int]] = []
    monkeypatch.setattr(tuning, "run", lambda way, given: seen.append((way, given["moments"].shape[1])))
    for parts in (0, 3):
        given = {"moments": torch.zeros(2, parts, 2, ACTIVE, device=DEVICE), "center": torch.zeros(OUTPUTS)}
        tuning.Call(arguments(1) | given).prepare([tuning.RULE, tuning.LIBRARY])
    both = [(tuning.RULE, 0), (tuning.LIBRARY, 0), (tuning.RULE, 1), (tuning.LIBRARY, 1)]
    assert sorted(seen[:4]) == sorted(both)
    assert sorted(seen[4:]) == sorted([(tuning.RULE, 3), (tuning.LIBRARY, 3), (tuning.RULE, 0), (tuning.LIBRARY, 0)])


def test_a_way_is_timed_with_all_that_follows_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the layer's own comes from another place each time, as it does in a model of many layers."""
    given = arguments(1) | {"norm": NORMS["layer_norm"], "center": random(OUTPUTS, seed=1)}
    ran: list[dict[str, Any]] = []

    def time_way(runs: Any) -> float:
        for each in runs:
            each()
        return 1.0

    monkeypatch.setattr(tuning, "run", lambda way, given: ran.append(given))
    monkeypatch.setattr(tuning, "time_way", time_way)
    monkeypatch.setattr(tuning, "copies_beyond_l2", lambda *own, most: [own, tuple(t.clone() for t in own)])
    assert tuning.Stopwatch(given)(tuning.RULE, 8) == 1.0
    first, second = ran
    assert {*first} == {*second} == {*given, "moments"} and first["norm"] is given["norm"]
    for name in ("weight", "bias", "center"):
        assert first[name] is given[name] and second[name].equal(given[name]) and second[name] is not given[name]
    assert second["residual"] is first["residual"] and first["residual"].shape == (2, 8, OUTPUTS)


def test_a_product_of_rows_with_moments_is_timed_with_them() -> None:
    """However the rows come: to read them takes a kernel longer than the rest of what is fused."""
    reads = arguments(1) | {"rows": random(2, ACTIVE, 160, seed=1), "center": random(OUTPUTS, seed=1)}
    for parts in (0, 2):
        given = reads | {"moments": torch.zeros(2, parts, 2, ACTIVE, device=DEVICE)}
        assert tuning.timed(given, tuning.LIBRARY)["moments"].shape == (2, 1, 2, ACTIVE)
        assert tuning.timed(given, tuning.RULE)["moments"].shape == (2, 3, 2, ACTIVE)
    assert "moments" not in tuning.timed(arguments(1), tuning.RULE)
    assert tuning.Product.of(reads).key != tuning.Product.of(arguments(1) | {"rows": reads["rows"]}).key


def test_what_is_met_is_timed_once(tmp_path: Path) -> None:
    timings, asked = Timings.load(DEVICE, tmp_path), []

    def measure(way: Any, rows: int) -> float:
        asked.append((str(way), rows))
        return 1.0 if way == tuning.LIBRARY else 3.0

    linear, conv = arguments(1), arguments(9)
    with timings.collect() as choices:
        for given in (linear, linear, conv):
            assert choose_way(tuning.Call(given), timings, measure) == tuning.LIBRARY
    assert [choice.kind for choice in choices] == ["linear", "linear", "convolution of 9 taps"]
    linears = sum(len(tuning.Product.of(linear).ways(rows)) for rows in (8, 12, 16, 24))  # of 24 positions
    assert len(set(asked[:linears])) == linears and {rows for _, rows in asked} == {8, 12, 16, 24}
    assert len(asked) == linears + len(set(asked[linears:]))

    near = linear | {"rows": random(2, 10, CHANNELS, seed=1)}
    before = len(asked)
    assert choose_way(tuning.Call(near), timings, measure) == tuning.LIBRARY and len(asked) == before
    timings.calibrate = "off"
    far = linear | {"rows": random(2, 100, CHANNELS, seed=1)}  # of more positions
    assert choose_way(tuning.Call(far), timings, measure) == tuning.RULE and len(asked) == before


def test_nothing_is_timed_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "run", lambda way, given: way)
    given = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments(1).items()}
    monkeypatch.setattr(tuning, "timings_of", None)
    assert tuning.multiply_rows(*given.values()) == tuning.RULE


def test_a_rehearsal_has_compiled_what_the_next_one_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings, given = Timings.load(DEVICE, tmp_path), arguments(9)
    ran: list[tuning.Way] = []
    timed: list[tuning.Way] = []

    def run(way: tuning.Way, given: dict[str, Any]) -> torch.Tensor:
        assert current() is not None  # compiles only
        ran.append(way)
        return given["rows"]

    def measure(way: Any, rows: int) -> float:
        assert current() is None
        timed.append(way)
        return 1.0 if way == tuning.LIBRARY else 3.0

    monkeypatch.setattr(tuning, "run", run)
    with Compilers() as compilers, rehearse(compilers) as first:
        run_fastest(tuning.Call(given), timings, measure)
    assert first.news and not timed and len(ran) == len(set(ran)) > 2
    with Compilers() as compilers, rehearse(compilers, decide=True):
        run_fastest(tuning.Call(given), timings, measure)
    assert set(timed) == set(ran[:-1]) and ran[-1] == tuning.LIBRARY
    with Compilers() as compilers, rehearse(compilers) as again:
        run_fastest(tuning.Call(given), timings, measure)
    assert not again.news and ran[-2:] == [tuning.LIBRARY] * 2


def test_ops_that_are_alike_are_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What else they fuse is another kernel; how often a product is split is none."""
    timings, conv = Timings.load(DEVICE, tmp_path), arguments(9)
    ran: list[tuning.Way] = []

    def run(way: tuning.Way, given: dict[str, Any]) -> torch.Tensor:
        ran.append(way)
        return given["rows"]

    monkeypatch.setattr(tuning, "run", run)
    counts, apart = list[int](), {**conv, "rows": conv["rows"].repeat(1, 1, 2)[..., :CHANNELS]}
    with Compilers() as compilers, rehearse(compilers):
        for given in (conv, {**conv, "residual": None}, conv, apart):
            run_fastest(tuning.Call(given), timings)
            counts.append(len(ran))
    assert counts[1] == 2 * counts[0] > 2 and counts[2:] == [counts[1], counts[1] + 1]
    call = tuning.Call(conv)
    assert len({call.variant(Config(64, 64, 64, 4, 7, split)) for split in (1, 2, 3, 9)}) == 2
    assert call.variant(tuning.LIBRARY) == tuning.LIBRARY


@pytest.mark.parametrize("given", [arguments(1), arguments(9), with_more(True)], ids=["linear", "conv", "with more"])
def test_arguments_are_timed_for_other_numbers_of_rows(given: dict[str, Any]) -> None:
    """What one program computes for rows of its own, it computes for their repetitions."""
    given["count"].fill_(ACTIVE - 1)  # the last row is padding
    wanted = reference.multiply_rows(**given)
    out = reference.multiply_rows(**tuning.Stopwatch(given).with_rows(12))
    for row in range(12):
        torch.testing.assert_close(out[:, row], wanted[:, row % (ACTIVE - 1)], atol=1e-2, rtol=0)


def test_a_way_is_timed_with_as_many_rows_active_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given, counts = arguments(9), []
    monkeypatch.setattr(tuning, "actives", lambda way, product, number: (number - 3, number))
    monkeypatch.setattr(tuning, "run", lambda way, given: counts.append(int(given["count"])))
    monkeypatch.setattr(tuning, "time_way", lambda runs: [1.0 + 2 * counts[-1] for run in runs[:1] if not run()][0])
    assert tuning.Stopwatch(given)(Config(16, 32, 64, 4, 2), 16) == 1.0 + 13 + 16
    assert counts == [13, 16]


WAYS = [tuning.LIBRARY, tuning.RULE, Config(16, 32, 64, 4, 2, 2), Config(16, 64, 64, 4, 2)]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", ["conv", "plain conv", "with more", "linear", "plain", "gated"])
def test_what_a_way_needs_is_known(name: str, way: tuning.Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its kernels, whose arguments the interpreter copies."""
    for module in (tuning.kernel, finish_rows, gather_patches):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    plain = {"residual": None, "activation": "none"}
    given = {
        "conv": arguments(9), "plain conv": arguments(9) | plain, "with more": with_more(True), "linear": arguments(1),
        "plain": arguments(1) | plain, "gated": arguments(1) | FUSED["a gate"],
    }[name]  # fmt: skip
    with Allocations() as seen:
        out = tuning.run(way, given)
    wanted = tuning.Product.of(given).workspace(way, ACTIVE)
    assert abs(seen.peak - out.nbytes - wanted) <= 4  # one number stands for no parts


@pytest.mark.parametrize("gated", [False, True])
def test_what_a_way_takes_more_between_other_kernels_counts(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some take more than in a row of their own: they have to be faster by more."""
    turns = Config(64, 64, 64, 4, 8, specialized=True, turns=True)
    monkeypatch.setattr(tuning, "time_way", lambda runs: 10.0)
    timed = tuning.Stopwatch(arguments(1) | {"gated": gated, "residual": None})
    times = [timed(way, 8) for way in (replace(turns, turns=False), turns, tuning.LIBRARY)]
    assert times == [10.0, 14.0 if gated else 10.0, 11.5 if starts_early() else 10.0]


@pytest.mark.parametrize("case", ["feed-forward", "other rows", "no gate", "no memory"])
def test_a_second_layer_is_timed_behind_the_first(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts what it adds to the product in front of it, in the way that was chosen for that one."""
    follows = case in ("feed-forward", "no memory")
    ran, seen = list[tuple[tuning.Way, bool]](), list[tuple[tuning.Way, bool]]()
    weight = random(2 * CHANNELS, CHANNELS, seed=4)
    first = arguments(1) | {"weight": weight, "residual": None, "gated": case != "no gate"}
    made = random(2, ACTIVE, CHANNELS, seed=8)
    second = arguments(1) | {"rows": made.clone() if case == "other rows" else made}

    def run(way: tuning.Way, given: dict[str, Any]) -> torch.Tensor:
        ran.append((way, given["weight"] is first["weight"]))
        return made

    def time_way(runs: Any) -> float:
        ran.clear()
        runs[0]()
        seen.append(ran[0])
        if case == "no memory":
            return math.inf
        return sum(6.0 if of_first else (1.0 if way == tuning.LIBRARY else 2.0) for way, of_first in ran)

    monkeypatch.setattr(tuning, "run", run)
    monkeypatch.setattr(tuning, "time_way", time_way)
    timings = Timings.load(DEVICE, tmp_path)
    number, best = tuning.Call(first).number, tuning.Product.of(first).ways(8)[0]
    timings.put(tuning.Product.of(first), number, best, 0.5)
    with Compilers() as compilers, rehearse(compilers, decide=True):
        run_fastest(tuning.Call(first), timings)
        run_fastest(tuning.Call(second), timings)
    if case == "no memory":
        assert set(timings.times(tuning.Product.of(second), number).values()) == {math.inf}
        return
    between = 0.0 if follows or not starts_early() else 1.5
    times = timings.expect(tuning.Product.of(second), number)
    assert times == {way: 1.0 + between if way == tuning.LIBRARY else 2.0 for way in times} != {}
    before = [way for way, of_first in seen[-len(times) * len(tuning.Call(second).numbers) :] if of_first]
    assert (best in before) == bool(before) == follows
