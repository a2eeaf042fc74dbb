"""Recordings on every tier: what an edit gives does not depend on where its base lies."""

from __future__ import annotations

import contextvars
import gc
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from tiered import (
    DEVICE,
    OTHER_TIERS,
    Small,
    changed,
    compiled,
    edited,
    recorded,
    same,
    sizes,
    tiers_of,
    two_rounds,
)
from torch import Tensor, nn
from toy_sampler import SIZE, TIMESTEPS, corner, run

import fisedit
from fisedit import DetectConfig
from fisedit.config import CacheConfig
from fisedit.errors import (
    IncompleteRecordingError,
    PartialRecordingError,
)
from fisedit.runtime.cache import host
from fisedit.runtime.cache.block import Block, Kept, Layout
from fisedit.runtime.cache.host import HostPool, Slab
from fisedit.runtime.cache.store import StepCache
from fisedit.warnings import CacheSpaceWarning, PageableMemoryWarning


@pytest.fixture(scope="module", params=["reference"])
def provider(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(provider: str) -> nn.Module:
    return (
        models.one_level(block_out_channels=(32, 64))
        if provider == "reference"
        else Small().eval().requires_grad_(False)
    ).to(DEVICE)


@pytest.fixture(scope="module")
def call() -> dict[str, Any]:
    arguments = models.arguments(models.one_level(), SIZE)
    return {name: arguments[name].to(DEVICE) for name in ("sample", "encoder_hidden_states")}


both = pytest.mark.parametrize("provider", ["reference", "triton"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def wanted(model: nn.Module, provider: str, call: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Edits of a base that lies whole in the memory of the device."""
    unet = compiled(model, provider)
    base = recorded(unet, call)
    return edited(unet, call, base), two_rounds(unet, call, base)


@both
@pytest.mark.parametrize("tier", list(OTHER_TIERS))
def test_edits_are_the_same_on_every_tier(
    model: nn.Module, call: dict[str, Any], wanted: Any, tmp_path: Path, tier: str, provider: str
) -> None:
    """Bit for bit, also where the mask is found, and where an edit is edited."""
    unet = compiled(model, provider, **OTHER_TIERS[tier], disk=tmp_path / "cache")
    base = recorded(unet, call)
    assert tiers_of(base) == {"disk"} if tier == "disk" else tiers_of(base) <= {"pinned", "pageable"}
    assert same(edited(unet, call, base), wanted[0])
    assert same(two_rounds(unet, call, base), wanted[1])
    assert same(edited(unet, call, base), wanted[0])


@both
@pytest.mark.parametrize(
    "options",
    [pytest.param({"storage": "int8"}, id="all"), pytest.param({}, id="keys", marks=pytest.mark.nightly)],
)
def test_8_bits(
    model: nn.Module, call: dict[str, Any], wanted: Any, provider: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Smaller by what floats of 4 bytes become, and near the exact edit; the same on every tier."""
    kv = "cached" if options else "int8"
    given = []
    for tier in ({}, {"gpu": 0, "host": 0, "disk": tmp_path}):
        unet = fisedit.compile(model, provider=provider, kv=kv, cache=CacheConfig(**options, **tier), dense="eager")
        base = recorded(unet, call)
        given.append(edited(unet, call, base) + two_rounds(unet, call, base))
    assert same(*given)
    exact = wanted[0] + wanted[1]
    for out, of_exact in zip(given[0], exact, strict=True):
        error = (out - of_exact).abs().max() / of_exact.abs().max()
        assert error < 0.02
    assert not same(given[0], exact)
    plain = recorded(compiled(model, provider), call)
    smaller = [kind for kind in ("maps", "keys", "queries") if sizes(base)[kind] < 0.5 * sizes(plain)[kind]]
    assert smaller == (["maps", "keys", "queries"] if options else ["keys"])


@both
def test_active_keys(model: nn.Module, call: dict[str, Any], provider: str, tmp_path: Path) -> None:
    """No keys are recorded, and none are fetched."""
    given = []
    for tier in ({}, {"gpu": 0, "host": 0, "disk": tmp_path}):
        unet = fisedit.compile(model, provider=provider, kv="active", cache=CacheConfig(**tier), dense="eager")
        base = recorded(unet, call)
        given.append(edited(unet, call, base))
    assert same(*given)


def test_memory_fills(model: nn.Module, call: dict[str, Any], wanted: Any, tmp_path: Path) -> None:
    """The budget of the first tier takes what matters most; the rest goes down; nothing is lost."""
    whole = recorded(compiled(model), call)
    budget = sum(sizes(whole).values()) // 2
    tier = "gpu" if DEVICE == "cuda" else "host"
    unet = compiled(model, **{"gpu": 0, tier: budget}, disk=tmp_path)
    base = recorded(unet, call)
    held = base.placement()
    first = {"gpu"} if DEVICE == "cuda" else {"pageable"}
    assert sum(n for of in held.values() for where, n in of.items() if where in first) <= budget
    assert tiers_of(base) > first
    share = {kind: sum(of.get(t, 0) for t in first) / sum(of.values()) for kind, of in held.items()}
    assert share["keys"] >= share["maps"] >= share["queries"] and share["queries"] < 1
    assert same(edited(unet, call, base), wanted[0])
    assert "moved" in unet.tiers(call["sample"].device).describe() or share["maps"] < 1


def test_a_dropped_base_gives_its_place_back(model: nn.Module, call: dict[str, Any]) -> None:
    """A second recording takes the memory of a first one that is gone; one that is kept moves nowhere if edited."""
    unet = compiled(model, gpu=0)
    tiers = None
    for _ in range(3):
        base = recorded(unet, call)
        tiers = unet.tiers(call["sample"].device)
        assert DEVICE == "cpu" or tiers_of(base) == {"pinned"}
        used = tiers.pool.used
        base.release()
        del base
        gc.collect()
        assert used > 0 and tiers.pool.used == 0
    assert tiers is not None and tiers.pool.idle == used


def test_no_room(model: nn.Module, call: dict[str, Any]) -> None:
    """The image is made, the recording is partial, and an edit of it says what is missing."""
    unet = compiled(model, gpu=0, host=0)
    plain = run(compiled(model), call)
    text = "budgets are used up.*not affected.*CacheConfig"
    with pytest.warns(CacheSpaceWarning, match=text) as seen, unet.record() as base:
        outputs = run(unet, call)
    assert len(seen) == 1 and same(outputs, plain)
    assert base.partial and base.complete
    with pytest.raises(PartialRecordingError, match=r"lacks the maps of call 1, .* and \d+ more.*budgets"):
        edited(unet, call, base)


@pytest.mark.parametrize("reason", ["full", "read-only"])
def test_the_disk_fails(
    model: nn.Module, call: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    import os

    folder = tmp_path / "cache"
    unet = compiled(model, gpu=0, host=0, disk=folder)
    if reason == "full":
        monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    else:
        folder.write_text("a file where the folder should be")
    with pytest.warns(CacheSpaceWarning), unet.record() as base:
        outputs = run(unet, call)
    monkeypatch.undo()
    assert same(outputs, run(compiled(model), call)) and base.partial
    with pytest.raises(PartialRecordingError, match="No space left" if reason == "full" else "ile exists"):
        edited(unet, call, base)
    assert not folder.is_dir() or not list(folder.rglob("*.safetensors*"))


def test_the_host_runs_out_of_memory(
    model: nn.Module, call: dict[str, Any], wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a recording, whatever its budget: the disk takes the rest, and the base is whole."""
    unet, make, made = compiled(model, gpu=0, disk=tmp_path), HostPool._make, []

    def sometimes(pool: HostPool, nbytes: int) -> Slab:
        if len(made) > 6:
            raise MemoryError("no memory")
        made.append(nbytes)
        return make(pool, nbytes)

    monkeypatch.setattr(HostPool, "_make", sometimes)
    base = recorded(unet, call)
    monkeypatch.undo()
    assert len(tiers_of(base)) == 2 and not base.partial
    assert same(edited(unet, call, base), wanted[0])


def test_pages_that_cannot_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_lock_pages", lambda memory: "no more of them")
    pool = HostPool(pin=True)
    with pytest.warns(PageableMemoryWarning, match="no more of them.*slower.*ulimit"):
        data, slab = pool.take(1000)
    data.fill_(3)
    assert not slab.pinned and pool.used == slab.nbytes >= 1000
    _, other = pool.take(1000)  # without a second warning
    assert not other.pinned


needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@needs_gpu
@both
def test_locked_pages_that_run_out(
    model: nn.Module, call: dict[str, Any], wanted: Any, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, locked = host._lock_pages, []

    def sometimes(memory: Any) -> str | None:
        locked.append(memory)
        return lock(memory) if len(locked) < 5 else "no more of them"

    monkeypatch.setattr(host, "_lock_pages", sometimes)
    unet = compiled(model, provider, gpu=0)
    with pytest.warns(PageableMemoryWarning):
        base = recorded(unet, call)
    assert tiers_of(base) == {"pinned", "pageable"}
    assert same(edited(unet, call, base), wanted[0]) and same(two_rounds(unet, call, base), wanted[1])


@needs_gpu
@both
def test_the_gpu_runs_out_of_memory(
    model: nn.Module, call: dict[str, Any], wanted: Any, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a recording: what was recorded moves off it, and the base is whole."""
    empty, made = torch.empty, []

    def sometimes(*shape: Any, **options: Any) -> Tensor:
        if options.get("dtype") == torch.uint8 and options.get("device", "cpu") != "meta":
            made.append(shape)
            if len(made) in (7, 8, 9, 20):
                raise torch.OutOfMemoryError("no memory")
        return empty(*shape, **options)

    unet = compiled(model, provider)
    monkeypatch.setattr(torch, "empty", sometimes)
    base = recorded(unet, call)
    monkeypatch.undo()
    assert tiers_of(base) >= {"gpu", "pinned"} or tiers_of(base) == {"pinned"}
    data = base.blocks()[0].data
    assert data is not None and not base.partial and "ran out" in unet.tiers(data.device).describe()
    assert same(edited(unet, call, base), wanted[0]) and same(two_rounds(unet, call, base), wanted[1])


def test_a_file_that_was_changed_is_noticed(model: nn.Module, call: dict[str, Any], tmp_path: Path) -> None:
    unet = compiled(model, gpu=0, host=0, disk=tmp_path)
    base = recorded(unet, call)
    for file in tmp_path.rglob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    with pytest.raises(fisedit.errors.CacheReadError, match=r"safetensors.*changed since"):
        edited(unet, call, base)


def test_files_go_with_the_base(model: nn.Module, call: dict[str, Any], tmp_path: Path) -> None:
    unet = compiled(model, gpu=0, host=0, disk=tmp_path)
    base = recorded(unet, call)
    assert list(tmp_path.rglob("*.safetensors"))
    base.release()
    gc.collect()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_two_edits_of_one_base_at_once(model: nn.Module, call: dict[str, Any], wanted: Any, tmp_path: Path) -> None:
    unet = compiled(model, gpu=0, host=0, disk=tmp_path)
    base, given = recorded(unet, call), dict[int, list[Tensor]]()

    def work(number: int) -> None:
        given[number] = edited(unet, call, base)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(given) == 2 and all(same(out, wanted[0]) for out in given.values())


@both
def test_two_edits_of_one_base_by_turns(
    model: nn.Module, call: dict[str, Any], wanted: Any, tmp_path: Path, provider: str
) -> None:
    """Call by call, each in a context of its own: Triton's interpreter is not one for threads."""
    unet = compiled(model, provider, gpu=0, host=0, disk=tmp_path)
    base, given = recorded(unet, call), ([], [])

    def steps(outputs: list[Tensor]) -> Iterator[None]:
        now = changed(call)
        sample = now["sample"].clone()
        with unet.edit(base, corner()):
            for timestep in TIMESTEPS:
                outputs += unet(sample, timestep, now["encoder_hidden_states"], return_dict=False)
                sample = sample - 0.1 * outputs[-1]
                sample[..., :3, :3] += 0.1
                yield

    turns = [(contextvars.copy_context(), steps(outputs)) for outputs in given]
    for _ in (*TIMESTEPS, None):
        for context, of in turns:
            context.run(next, of, None)
    assert all(same(outputs, wanted[0]) for outputs in given)


class Stop(BaseException):
    """As Ctrl-C: no ``Exception``."""


@both
@pytest.mark.parametrize("error", [Stop, pytest.param(ValueError, marks=pytest.mark.nightly)])
def test_an_edit_that_is_broken_off(
    model: nn.Module, call: dict[str, Any], wanted: Any, tmp_path: Path, provider: str, error: type[BaseException]
) -> None:
    """Buffers come back, threads end, and the next edit is right."""
    unet = compiled(model, provider, gpu=0, host=0, disk=tmp_path)
    base = recorded(unet, call)
    for calls in (1, 3):
        with pytest.raises(error), unet.edit(base, corner(), record=True):
            run(unet, changed(call), TIMESTEPS[:calls], change=0.1)
            raise error
    gc.collect()
    assert not [t for t in threading.enumerate() if t.name.startswith("fisedit-read")]
    assert all(not block.readers for block in base.blocks())
    assert same(edited(unet, call, base), wanted[0])


def test_many_edits_in_a_row(model: nn.Module, call: dict[str, Any]) -> None:
    """Memory stays as it is, whatever their masks: no block, slab or file is left behind."""
    unet = compiled(model, gpu=0)
    base = recorded(unet, call, TIMESTEPS[:2])
    tiers, held = unet.tiers(call["sample"].device), []
    for number in range(200):
        mask = torch.zeros(SIZE, dtype=torch.bool)
        mask[: 1 + number % 5, : 1 + number % 7] = True
        with unet.edit(base, mask, record=number % 5 == 0):
            run(unet, changed(call), TIMESTEPS[:2], change=0.1)
        if number % 50 == 49:
            gc.collect()
            assert tiers.pool.used + tiers.pool.idle <= tiers.pool.most
            held.append((tiers.pool.used, tiers.pool.most, len(tiers.blocks())))
    assert len(set(held[1:])) == 1, held


def test_a_base_dropped_while_it_is_stored(
    model: nn.Module, call: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks are still being written when nobody wants them any more."""
    from fisedit.runtime.cache import tiers

    begun, go, write = threading.Event(), threading.Event(), tiers.write_tensors

    def slow(*arguments: Any, **options: Any) -> str:
        begun.set()
        assert go.wait(10)
        return write(*arguments, **options)

    monkeypatch.setattr(tiers, "write_tensors", slow)
    unet = compiled(model, gpu=0, host=0, disk=tmp_path)
    with unet.record() as base:
        run(unet, call, TIMESTEPS[:1])
        assert begun.wait(10)
        base.release()
        go.set()
    gc.collect()
    assert not list(tmp_path.rglob("*.safetensors"))
    other = recorded(unet, call)
    assert not other.partial and same(edited(unet, call, other), edited(unet, call, other))


def test_what_killed_processes_left_is_swept(model: nn.Module, call: dict[str, Any], tmp_path: Path) -> None:
    left = tmp_path / "fisedit-999999999-abc"
    left.mkdir()
    (left / "block-00000001.safetensors").write_bytes(b"x")
    recorded(compiled(model, gpu=0, host=0, disk=tmp_path), call, TIMESTEPS[:1])
    assert not left.exists()


# Which steps are kept


@pytest.mark.parametrize("provider", ["triton"], indirect=True, scope="module")
def test_queries_are_read_ahead_while_a_mask_is_sought(
    model: nn.Module, call: dict[str, Any], provider: str, wanted: Any, tmp_path: Path
) -> None:
    """And no longer: not for the first call after it."""
    unet = compiled(model, provider, **OTHER_TIERS["disk"], disk=tmp_path / "cache")
    base = recorded(unet, call)
    with fisedit.trace(tmp_path / "trace.json"):
        assert same(two_rounds(unet, call, base), wanted[1])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    reads = [event["name"] for event in events if event["name"].startswith("read queries")]
    assert reads == ["read queries, call 1", "read queries, call 2"]


@both
def test_selected_steps(model: nn.Module, call: dict[str, Any], wanted: Any, provider: str) -> None:
    """Without feature maps of the first steps: smaller, dense there, sparse behind; the background stays exact."""
    unet = compiled(model, provider, steps=(3, None))
    base, whole = recorded(unet, call), recorded(compiled(model, provider), call)
    assert sizes(base)["maps"] < 0.7 * sizes(whole)["maps"] and sizes(base)["queries"] < sizes(whole)["queries"]
    with unet.edit(base, corner()) as edit:
        outputs = run(unet, changed(call), change=0.1)
    report = edit.report()
    assert [len(report.timings[kind]) for kind in ("dense", "sparse")] == [2, 3]
    assert "CacheConfig.steps" in str(report)
    for out, made in zip(outputs, base.calls.values(), strict=True):
        assert torch.equal(out[..., ~corner()], made.outputs[0][..., ~corner()])
    detect = DetectConfig(steps=2, window=(1, 2), dilation=0, smooth=0)
    plain = compiled(model, provider)
    given = []
    for one, of in ((unet, base), (plain, recorded(plain, call))):
        with one.edit(of, detect=detect) as edit:
            given.append(run(one, changed(call), change=0.8))
        assert len(edit.timings["sparse"]) == 3
    assert same(*given)


def test_queries_are_kept_where_a_mask_can_be_sought(model: nn.Module, call: dict[str, Any]) -> None:
    unet = compiled(model)
    base = recorded(unet, call)
    kinds = [{block.kind for block in made.cache.blocks()} for made in base.calls.values()]
    assert ["queries" in of_call for of_call in kinds] == [True, True, True, False, False]  # 900, 700, 500, 300, 100
    text = "queries of cross-attention at step 4.*detect_steps"
    with pytest.raises(IncompleteRecordingError, match=text), unet.edit(base, detect=DetectConfig(steps=4)):
        run(unet, changed(call))
    with unet.edit(base, detect=DetectConfig(steps=4, control=False)) as edit:
        run(unet, changed(call), change=0.8)
    assert len(edit.timings["detect"]) == 4
    more = compiled(model, detect_steps=4)
    with more.edit(recorded(more, call), detect=DetectConfig(steps=4)) as edit:
        run(more, changed(call), change=0.8)
    assert len(edit.timings["detect"]) == 4


def test_values_of_a_block_lie_apart() -> None:
    """Of several dtypes, a scalar and an empty one among them; in memory that begins anywhere."""
    values = {
        "maps": torch.randn(2, 7, 5).half(), "scales": torch.randn(2, 3), "eights": torch.arange(-3, 3).to(torch.int8),
        "one": torch.tensor(2.5, dtype=torch.float64), "none": torch.empty(0, 4), "turned": torch.randn(4, 6).T,
    }  # fmt: skip
    layout = Layout.of(values)
    assert Layout.of({slot: value + 1 for slot, value in values.items()}) is layout  # of the next call
    assert Layout.of({**values, "scales": torch.randn(2, 4)}) is not layout
    memory = torch.full((layout.nbytes + 512,), 7, dtype=torch.uint8)
    layout.write(memory[256:-256], values)
    for slot, value in values.items():
        view = layout.view(memory[256:-256], slot)
        assert torch.equal(view, value) and view.is_contiguous() and view.dtype == value.dtype
    assert memory[:256].eq(7).all() and memory[-256:].eq(7).all()


def test_what_a_call_lacks() -> None:
    """What is not there, what is lost, and what only the base has; after its values were replaced, too."""
    layout = Layout.of({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)})
    blocks = [Block("maps", layout, "pageable", torch.zeros(layout.nbytes, dtype=torch.uint8)) for _ in range(2)]
    base = StepCache(2, {"b": Kept(blocks[0], "b", torch.float32, 2)})
    cache = StepCache(2, {"a": Kept(blocks[0], "a", torch.float32, 2)}, base)
    assert cache.lacks(["a", "b"]) == [] and cache.lacks(["c", "a"]) == ["c"] and cache.blocks() == [blocks[0]]
    cache.values = {slot: Kept(blocks[1], slot, torch.float32, 2) for slot in ("a", "b")}
    assert cache.blocks() == [blocks[1]]
    blocks[1].lost = "no tier has room"
    assert cache.lacks(["a", "b"]) == ["a"]  # the base has the other


def test_values_look_like_tensors(model: nn.Module, call: dict[str, Any]) -> None:
    base = recorded(compiled(model), call)
    cache = next(iter(base.calls.values())).cache
    for slot, value in cache.values.items():
        assert isinstance(value, Kept) and value.shape == cache.load(slot).shape
        part = cache.samples([1])
        assert torch.equal(part.load(slot), cache.load(slot).unflatten(0, (2, -1))[1])
