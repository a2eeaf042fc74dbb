"""Saved bases and the tiers of memory: what is written from where it lies, and where it lies once it is loaded."""

from __future__ import annotations

import functools
import json
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from files import flip
from tiered import (
    DEVICE,
    OTHER_TIERS,
    Small,
    changed,
    edited,
    recorded,
    same,
    sizes,
    tiers_of,
    two_rounds,
)
from torch import Tensor
from toy_sampler import SIZE, TIMESTEPS, corner, run

import fisedit
from fisedit import CompiledUNet, DetectConfig, Recording, errors, program, saving
from fisedit.config import CacheConfig
from fisedit.runtime.cache import disk
from fisedit.runtime.cache.block import Block, Kept
from fisedit.runtime.cache.disk import open_tensors, write_tensors
from fisedit.runtime.cache.keys import KeysPlan
from fisedit.runtime.cache.tiers import Budgets, Tiers
from fisedit.warnings import CacheSpaceWarning

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("cached", {}),
    "int8": ("cached", {"storage": "int8"}),
    "int8 keys": ("int8", {}),
    "active": ("active", {}),
    "steps": ("cached", {"steps": (3, None)}),
}


Made = Callable[..., CompiledUNet]


@pytest.fixture(scope="module")
def call() -> dict[str, Any]:
    arguments = models.arguments(models.one_level(), SIZE)
    return {name: arguments[name].to(DEVICE) for name in ("sample", "encoder_hidden_states")}


@pytest.fixture(scope="module")
def made() -> Made:
    """Compiled models by options, provider and budgets; equal ones are one, whose graphs are captured once."""
    model = Small().eval().requires_grad_(False).to(DEVICE)

    @functools.cache
    def make(options: str = "exact", provider: str = "reference", **budgets: Any) -> CompiledUNet:
        kv, kept = OPTIONS[options]
        return fisedit.compile(model, provider=provider, kv=kv, cache=CacheConfig(**kept, **budgets), dense="eager")

    return make


FEW = TIMESTEPS[:2]


def recorded_edit(
    unet: CompiledUNet, call: dict[str, Any], base: Recording, mask: Tensor, timesteps: Any = FEW
) -> Recording:
    with unet.edit(base, mask, record=True) as edit:
        run(unet, changed(call), timesteps, change=0.5)
    assert edit.recording is not None
    return edit.recording


def edited_few(unet: CompiledUNet, call: dict[str, Any], base: Recording, mask: Tensor | None = None) -> list[Tensor]:
    with unet.edit(base, corner() if mask is None else mask):
        return run(unet, changed(call), FEW, change=0.5)


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("call-*"))


def checksums(folder: Path) -> dict[str, str]:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: kept["checksum"] for name, kept in files.items()}


CASES = [
    *(pytest.param("reference", options, id=options) for options in OPTIONS),
    *(pytest.param("triton", options, id=f"{options}, fused") for options in ("int8", "active", "steps")),
]


@pytest.mark.parametrize(("provider", "options"), CASES)
def test_an_edit_of_a_loaded_base_is_the_edit_of_the_base(
    made: Made, call: dict[str, Any], provider: str, options: str, tmp_path: Path
) -> None:
    """Bit for bit, whatever is kept and however; also where the mask is found, and where an edit is edited."""
    unet = made(options, provider)
    base = recorded(unet, call)
    base.save(tmp_path / "b")
    assert on_disk(tmp_path / "b") < 1.02 * base.nbytes + 2**16  # as it lies in memory
    loaded = unet.load_recording(tmp_path / "b")
    assert sizes(loaded) == sizes(base) and loaded.nbytes == base.nbytes
    if DEVICE == "cpu":
        assert tiers_of(loaded) == {"disk"} and set(loaded.placement()["small"]) == {"pageable"}
    assert same(two_rounds(unet, call, loaded), two_rounds(unet, call, base))
    assert all(not block.readers for block in loaded.blocks())


@pytest.mark.parametrize("options", ["exact", "int8"])
def test_another_provider_edits_it(made: Made, call: dict[str, Any], options: str, tmp_path: Path) -> None:
    """What fused kernels read is what the others do."""
    plain, fused = made(options), made(options, "triton")
    base = recorded(plain, call)
    base.save(tmp_path / "b")
    loaded = fused.load_recording(tmp_path / "b")
    assert same(edited(fused, call, loaded), edited(fused, call, recorded(fused, call)))


# Saving


def test_what_is_saved_does_not_depend_on_where_it_lies(made: Made, call: dict[str, Any], tmp_path: Path) -> None:
    plain = made()
    base = recorded(plain, call, FEW)
    base.save(tmp_path / "plain")
    assert {name for name in checksums(tmp_path / "plain") if name != "values.safetensors"} == {
        "call-0000.safetensors", "call-0001.safetensors"
    }  # fmt: skip
    for tier, options in OTHER_TIERS.items():
        unet = made(**options, disk=tmp_path / "cache")
        base = recorded(unet, call, FEW)
        base.save(tmp_path / tier)
        assert checksums(tmp_path / tier) == checksums(tmp_path / "plain")


def test_a_chain_of_edits_is_saved_by_value(made: Made, call: dict[str, Any], tmp_path: Path) -> None:
    """Of a base in 8 bits, too: what edits read of it is exact from then on, and the same."""
    unet = made("int8")
    base = recorded(unet, call, FEW)
    recording = recorded_edit(unet, call, recorded_edit(unet, call, base, corner()), corner().flip(1))
    recording.save(tmp_path / "b")
    loaded = unet.load_recording(tmp_path / "b")
    assert set(sizes(loaded)) == {"small", "maps", "keys", "queries"} and loaded.nbytes > 2 * base.nbytes
    assert not any(value.quantized for made in loaded.calls.values() for value in made.cache.values.values())
    given = [edited_few(unet, call, each, corner().flip(0)) for each in (loaded, recording)]
    assert same(*given)


def test_some_images_of_several_in_8_bits(made: Made, call: dict[str, Any], tmp_path: Path) -> None:
    unet = made("int8")
    recording = recorded(unet, call, FEW)
    assert recording.images == 2
    recording.split()[1].save(tmp_path / "b")
    loaded = unet.load_recording(tmp_path / "b")
    assert loaded.nbytes == recording.nbytes / 2 and on_disk(tmp_path / "b") < 1.02 * loaded.nbytes + 2**16
    for ours, theirs in zip(loaded.calls.values(), recording.split()[1].calls.values(), strict=True):
        assert all(torch.equal(ours.cache.load(slot), theirs.cache.load(slot)) for slot in theirs.cache.values)


def test_blocks_stay_while_they_are_saved_and_are_not_copied(
    made: Made, call: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dense recording nothing is made but what is being written; of an edit one call at a time."""
    unet = made()
    base = recorded(unet, call)
    edit = recorded_edit(unet, call, base, corner(), TIMESTEPS)
    memory = {block.data.untyped_storage().data_ptr() for block in base.blocks() if block.data is not None}
    at_once, most, held = [0], [0], []

    def counting(path: Path, tensors: dict[str, Tensor], **options: Any) -> str:
        made = sum(value.nbytes for value in tensors.values() if value.untyped_storage().data_ptr() not in memory)
        at_once[0] += made
        most[0] = max(most[0], at_once[0])
        held.append(all(block.readers for block in base.blocks()))
        time.sleep(0.01)
        checksum = write_tensors(path, tensors, **options)
        at_once[0] -= made
        return checksum

    monkeypatch.setattr(saving, "write_tensors", counting)
    base.save(tmp_path / "b")
    assert most == [0]
    edit.save(tmp_path / "e")
    largest = max(path.stat().st_size for path in (tmp_path / "e").glob("call-*"))
    assert 0 < most[0] <= largest and len(held) == 2 * len(TIMESTEPS)
    assert all(held) and not any(block.readers for block in (*base.blocks(), *edit.blocks()))


@pytest.mark.parametrize("disk", ["takes it", "is full"])
def test_a_base_that_is_on_its_way_to_the_disk(
    made: Made, call: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    """Another recording pushed a block out, and the save begins before it is written, or cannot be."""
    unet = made(gpu=0, host=0, disk=tmp_path / "cache")
    base, tiers = recorded(unet, call, FEW), unet.tiers(call["sample"].device)
    wanted = edited_few(unet, call, base)
    block = max(base.blocks(), key=lambda block: block.nbytes)
    values = {slot: value.clone() for slot, value in block.values().items()}
    block.data, block.file = tiers.allocate(block.nbytes), None  # as it was before
    block.layout.write(block.data, values)
    go, write, new_file = threading.Event(), tiers._write, tiers._new_file

    def slow(of: Any) -> None:
        assert go.wait(10)
        write(of)

    def full() -> Path:
        raise errors.CacheWriteError(path="cache", reason="No space left on device")

    monkeypatch.setattr(tiers, "_write", slow)
    monkeypatch.setattr(tiers, "_new_file", new_file if disk == "takes it" else full)
    tiers._move_to_disk(block)
    threading.Timer(0.1, go.set).start()
    if disk == "takes it":
        base.save(tmp_path / "b")
        assert go.is_set() and block.file is not None
        assert same(edited_few(unet, call, unet.load_recording(tmp_path / "b")), wanted)
    else:
        says = r"lacks the \w+ of call \d, .*No space left"
        with pytest.raises(errors.PartialRecordingError, match=says), pytest.warns(CacheSpaceWarning):
            base.save(tmp_path / "b")
        assert not (tmp_path / "b").exists()


def test_what_is_not_whole_is_not_saved(made: Made, call: dict[str, Any], tmp_path: Path) -> None:
    unet = made(gpu=0, host=0)
    with pytest.warns(CacheSpaceWarning):
        partial = recorded(unet, call, FEW)
    with pytest.raises(errors.PartialRecordingError, match=r"lacks the \w+ of call 1"):
        partial.save(tmp_path / "b")
    whole = made()
    base = recorded(whole, call, FEW)
    edit = recorded_edit(whole, call, base, corner())
    base.blocks()[0].lost = "the disk is full"  # when it was moved there
    with pytest.raises(errors.PartialRecordingError, match=r"call 1, .*the disk is full"):
        edit.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


# Loading


@pytest.mark.parametrize(("saved", "here"), [("int8", "exact"), ("exact", "int8"), ("int8 keys", "exact")])
def test_what_is_kept_in_8_bits_is_told_by_what_is_saved(
    made: Made, call: dict[str, Any], tmp_path: Path, saved: str, here: str
) -> None:
    """Not by how the model that loads it records: edits that store nothing are those of the base."""
    one, other = made(saved), made(here)
    base = recorded(one, call, FEW)
    base.save(tmp_path / "b")
    loaded = other.load_recording(tmp_path / "b")
    assert loaded.nbytes == base.nbytes
    assert same(edited_few(other, call, loaded), edited_few(one, call, base))
    again = recorded_edit(other, call, loaded, corner())  # its own rows are stored as this model does
    exact = edited_few(one, call, recorded_edit(one, call, base, corner()), corner().flip(0))
    for out, of_exact in zip(edited_few(other, call, again, corner().flip(0)), exact, strict=True):
        assert (out - of_exact).abs().max() < 0.02 * of_exact.abs().max()


@pytest.mark.parametrize("provider", ["reference", "triton"])
def test_a_base_that_holds_more_than_is_read(made: Made, call: dict[str, Any], provider: str, tmp_path: Path) -> None:
    """Keys and values that ``kv="active"`` does not read, but not the other way round."""
    active, cached = made("active", provider), made("exact", provider)
    base = recorded(active, call)
    base.save(tmp_path / "active")
    with pytest.raises(errors.SavedBaseMismatchError, match="kv: saved with 'active', here 'cached'"):
        cached.load_recording(tmp_path / "active")
    recorded(cached, call).save(tmp_path / "cached")
    loaded = active.load_recording(tmp_path / "cached")
    assert loaded.nbytes > base.nbytes
    assert same(two_rounds(active, call, loaded), two_rounds(active, call, base))
    if provider == "reference":
        recorded_edit(active, call, loaded, corner(), TIMESTEPS).save(tmp_path / "edit")
        with pytest.raises(errors.SavedBaseMismatchError, match="kv: saved with 'active', here 'cached'"):
            cached.load_recording(tmp_path / "edit")  # its keys and values are the base's


@pytest.mark.parametrize("kv", ["cached", "active"])
def test_how_keys_are_kept_by_plan_is_saved(
    made: Made, call: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv: str
) -> None:
    """Not known before a call is captured: what was planned tells, and an edit says if a plan was another one."""
    monkeypatch.setattr(program, "plan_keys", lambda *_: KeysPlan(kv, "as told"))
    planned = [fisedit.compile(Small().to(DEVICE), kv="auto", dense="eager") for _ in range(2)]
    base = recorded(planned[0], call, FEW)
    base.save(tmp_path / "b")
    loaded = planned[1].load_recording(tmp_path / "b")
    assert same(edited_few(planned[1], call, loaded), edited_few(planned[0], call, base))
    other = {"cached": "active", "active": "cached"}[kv]
    monkeypatch.setattr(program, "plan_keys", lambda *_: KeysPlan(other, "as told"))
    late = fisedit.compile(Small().to(DEVICE), kv="auto", dense="eager")
    loaded = late.load_recording(tmp_path / "b")
    if kv == "cached":
        edited_few(late, call, loaded)
    else:
        with pytest.raises(errors.RecordingMismatchError, match="kv: recorded 'active', edited with 'cached'"):
            edited_few(late, call, loaded)


def test_a_file_that_was_not_verified_is_not_read_for_its_checksum(
    made: Made, call: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = made()
    recorded(unet, call, FEW).save(tmp_path / "b")
    flip(tmp_path / "b" / "call-0001.safetensors", -1)
    with pytest.raises(errors.CacheReadError, match="call-0001"):
        unet.load_recording(tmp_path / "b")
    monkeypatch.setattr(disk, "checksum_of", None)
    edited_few(unet, call, unet.load_recording(tmp_path / "b", verify=False))


class OtherMemory(Tiers):
    """Tiers of a GPU, whose memory is the host's."""

    def __init__(self, gpu: int, host: int, disk: Path | None = None) -> None:
        super().__init__(Budgets(gpu, host, disk), torch.device("cpu"))
        self.on_gpu, self.order = True, ["gpu", *self.order]


def adopted(tiers: Tiers, folder: Path, kind: Any, number: int, began: int) -> Block:
    """A block of 512 bytes from a file."""
    values = {"a": torch.full((2, 4, 32), number, dtype=torch.int8), "scale:a": torch.full((2, 4), -0.5)}
    write_tensors(folder / f"{number}.safetensors", {**values, "other": torch.zeros(3)})
    mapped = open_tensors(folder / f"{number}.safetensors")
    return tiers.adopt(kind, {slot: mapped[slot] for slot in values}, began)


def test_a_gpu_takes_what_it_has_room_for(tmp_path: Path) -> None:
    tiers = OtherMemory(gpu=1100, host=600, disk=tmp_path / "disk")
    began = tiers.ring(0).began
    blocks = [adopted(tiers, tmp_path, "maps", number, began) for number in range(4)]
    assert [block.tier for block in blocks] == ["gpu", "gpu", "pageable", "disk"]
    assert [block.nbytes for block in blocks] == [512] * 4  # 1100 hold two of them, 600 one
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()  # mapped is mapped
    for number, block in enumerate(blocks):
        assert list(block.values()) == ["a", "scale:a"] and block.readers == 0
        value = Kept(block, "a", torch.float32, 2).read(torch.device("cpu"))
        assert torch.equal(value, torch.full((2, 4, 32), -0.5 * number))
    statistics = adopted(tiers, tmp_path, "small", 9, began)
    assert statistics.tier == "gpu"  # wherever there is room


def test_what_lies_in_a_saved_file_makes_room_at_no_cost(tmp_path: Path) -> None:
    """It is not written again: the copy goes. What is held stays."""
    tiers = OtherMemory(gpu=1100, host=0, disk=tmp_path / "disk")
    first = [adopted(tiers, tmp_path, "maps", number, tiers.ring(0).began) for number in range(2)]
    tiers.hold(first[:1])
    later = adopted(tiers, tmp_path, "maps", 7, tiers.ring(0).began)
    assert [block.tier for block in (*first, later)] == ["gpu", "disk", "gpu"]
    assert first[1].data is None and (first[1].value("a") == 1).all()
    assert tiers.moved == {("maps", "gpu", "disk"): 512} and not (tmp_path / "disk").exists()
    tiers.let_go(first[:1])
    assert (first[0].value("a") == 0).all()


def test_a_recorded_edit_that_finds_no_room(made: Made, call: dict[str, Any], tmp_path: Path) -> None:
    """Its images are the same, whether the mask is given or found; it says what it lacks, and its base is whole."""
    unet, full = made(), made(gpu=0, host=0)
    base = recorded(unet, call)
    base.save(tmp_path / "b")
    loaded = full.load_recording(tmp_path / "b")
    detect = DetectConfig(steps=2, window=(1, 2), dilation=0, smooth=0)
    for how in ({"mask": corner()}, {"detect": detect}):
        images, edits = [], []
        for model, of in ((unet, base), (full, loaded)):
            with warnings.catch_warnings(), model.edit(of, **how, record=True) as edit:
                warnings.simplefilter("ignore", CacheSpaceWarning)
                images.append(run(model, changed(call), change=0.8))
            edits.append(edit.recording)
        assert same(*images) and not edits[0].partial and edits[1].partial
        with pytest.raises(errors.PartialRecordingError, match=r"lacks the \w+ of call 1, .*budgets"):
            edited_few(full, call, edits[1])
    assert same(edited_few(full, call, loaded), edited_few(unet, call, base))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("budgets", [{}, {"gpu": 0}, {"gpu": 0, "host": 0}, {"gpu": 150_000, "host": 150_000}])
@pytest.mark.parametrize("provider", ["reference", "triton"])
def test_a_loaded_base_on_the_tiers_of_a_gpu(
    made: Made, call: dict[str, Any], provider: str, budgets: dict[str, int], tmp_path: Path
) -> None:
    unet = made("exact", provider)
    base = recorded(unet, call)
    assert base.nbytes > 300_000
    base.save(tmp_path / "b")
    other = made("exact", provider, **budgets, disk=tmp_path / "cache")  # where recorded edits find no other place
    loaded = other.load_recording(tmp_path / "b")
    assert tiers_of(loaded) == {(): {"gpu"}, ("gpu",): {"pinned"}}.get(tuple(budgets), tiers_of(loaded))
    assert "gpu" not in budgets or tiers_of(loaded) - {"gpu"}
    assert set(loaded.placement()["small"]) == {"gpu"}
    assert same(two_rounds(other, call, loaded), two_rounds(unet, call, base))
    loaded.save(tmp_path / "c")
    assert checksums(tmp_path / "c") == checksums(tmp_path / "b")
