"""The compiled module: a drop-in outside its sessions, and what ``record`` and ``edit`` do inside."""

from __future__ import annotations

import copy
import threading
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from toy_sampler import SIZE, TIMESTEPS, corner, other_text, run

import fisedit
from fisedit import CompiledUNet, DetectConfig, Recording
from fisedit.errors import (
    ForeignRecordingError,
    IncompleteRecordingError,
    InvalidMaskError,
    NestedSessionError,
    RecordingMismatchError,
    SessionClosedError,
    UnknownOptionError,
    UnsupportedCaptureError,
)
from fisedit.warnings import EmptyMaskWarning


@pytest.fixture(scope="module")
def unet() -> CompiledUNet:
    return fisedit.compile(models.one_level())


@pytest.fixture(scope="module")
def call(unet: CompiledUNet) -> dict[str, Any]:
    arguments = models.arguments(unet, SIZE)
    return {"sample": arguments["sample"], "encoder_hidden_states": arguments["encoder_hidden_states"]}


@pytest.fixture(scope="module")
def base(unet: CompiledUNet, call: dict[str, Any]) -> Recording:
    with unet.record() as recording:
        run(unet, call)
    return recording


def test_outside_sessions_it_is_the_model(unet: CompiledUNet, call: dict[str, Any]) -> None:
    original = unet._unet
    with torch.no_grad():
        for mine, theirs in zip(run(unet, call), run(original, call), strict=True):
            assert torch.equal(mine, theirs)
    assert unet.config is original.config and unet.dtype == torch.float32 and unet.device.type == "cpu"
    assert list(unet.state_dict()) == list(original.state_dict())
    assert [n for n, _ in unet.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert fisedit.compile(unet) is unet


def test_moving_and_loading_reach_the_original() -> None:
    original = models.one_level()
    unet = fisedit.compile(original)
    unet.to(torch.float64)
    assert original.conv_in.weight.dtype == torch.float64
    state = {name: torch.zeros_like(value) for name, value in unet.state_dict().items()}
    unet.load_state_dict(state)
    assert original.conv_in.weight.abs().max() == 0
    assert not unet.train(False).training and unet.train() is unet and original.training


def test_a_deep_copy_is_another_model(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    twin = copy.deepcopy(unet)
    with torch.no_grad():
        assert torch.equal(run(twin, call)[0], run(unet, call)[0])
        twin.conv_in.weight.data.zero_()
        assert not torch.equal(run(twin, call)[0], run(unet, call)[0])
    with pytest.raises(ForeignRecordingError, match="another compiled model"), twin.edit(base):
        pass


def test_saving_saves_the_original(unet: CompiledUNet, tmp_path: Any) -> None:
    unet.save_pretrained(tmp_path)
    loaded = type(unet._unet).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), unet.parameters(), strict=True))


def test_record_is_dense_and_keyed_by_timestep(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    with torch.no_grad():
        dense = run(unet, call)
    for (timestep, occurrence), made, wanted in zip(base.calls, base.calls.values(), dense, strict=True):
        assert occurrence == 0 and timestep in TIMESTEPS
        torch.testing.assert_close(made.outputs[0], wanted)
    assert base.timesteps == [float(t) for t in TIMESTEPS] and base.nbytes > 0 and "5 steps" in repr(base)


@pytest.mark.parametrize("kind", ["int", "float", "tensor", "int tensor"])
def test_timesteps_of_every_kind(unet: CompiledUNet, call: dict[str, Any], base: Recording, kind: str) -> None:
    convert = {"int": int, "float": float, "tensor": torch.tensor, "int tensor": lambda t: torch.tensor([int(t)])}[kind]
    with unet.edit(base, corner()) as edit:
        outputs = run(unet, call, [convert(t) for t in TIMESTEPS])
    torch.testing.assert_close(outputs[-1], base.calls[(100.0, 0)].outputs[0])
    assert len(edit.timings["sparse"]) == 5


def test_dataclass_and_tuple_results(unet: CompiledUNet, call: dict[str, Any]) -> None:
    with unet.record():
        result = unet(call["sample"], 5, call["encoder_hidden_states"])
    assert type(result).__name__ == "UNet2DConditionOutput" and result.sample.shape == call["sample"].shape


def test_an_edit_computes_only_the_mask(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    changed = other_text(call)
    with unet.edit(base, corner()) as edit:
        outputs = run(unet, changed, change=0.1)
    with torch.no_grad():
        dense = run(unet, changed, change=0.1)
    for out, made, wanted in zip(outputs, base.calls.values(), dense, strict=True):
        assert torch.equal(out[..., ~corner()], made.outputs[0][..., ~corner()])
        old, new = (x[..., corner()] for x in (made.outputs[0], wanted))
        assert (out[..., corner()] - new).norm() < (old - new).norm()
    report = edit.report()
    assert report.active_share == 9 / 64 and report.detect_steps == 0
    assert report.macs_sparse and report.macs_dense and report.macs_sparse < report.macs_dense / 2
    assert "active share" in str(report) and report.to_dict()["islands"] == []


def test_the_mask_is_found(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    """The corner that the toy sampler changes is the mask, after the detect steps."""
    with unet.edit(base, detect=DetectConfig(steps=3, dilation=0, smooth=0, control=False)) as edit:
        assert edit.mask is None
        outputs = run(unet, call, change=0.8)
    assert edit.mask is not None and torch.equal(edit.mask, corner())
    assert [len(edit.timings[kind]) for kind in ("detect", "sparse")] == [3, 2]
    assert torch.equal(outputs[-1][..., ~corner()], base.calls[(100.0, 0)].outputs[0][..., ~corner()])


def test_two_calls_a_timestep(unet: CompiledUNet, call: dict[str, Any]) -> None:
    """Guidance in two calls, or a second-order sampler: told apart by their place within the timestep."""

    def halves(unet: nn.Module) -> list[Tensor]:
        text, sample = call["encoder_hidden_states"], call["sample"][:1]
        return [unet(sample, t, text[i : i + 1], return_dict=False)[0] for t in (9, 5) for i in (0, 1)]

    with unet.record() as base:
        recorded = halves(unet)
    assert list(base.calls) == [(9.0, 0), (9.0, 1), (5.0, 0), (5.0, 1)] and base.timesteps == [9.0, 5.0]
    with unet.edit(base, corner()):
        for out, wanted in zip(halves(unet), recorded, strict=True):
            torch.testing.assert_close(out, wanted)
    with pytest.raises(RecordingMismatchError, match="calls at timestep 9"), unet.edit(base, corner()):
        for _ in range(3):
            unet(call["sample"][:1], 9, call["encoder_hidden_states"][:1], return_dict=False)


def test_an_empty_mask_is_the_recording(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    empty = torch.zeros(SIZE, dtype=torch.bool)
    with pytest.warns(EmptyMaskWarning) as seen, unet.edit(base, empty, record=True) as edit:
        outputs = run(unet, other_text(call), change=0.5)
    for out, made in zip(outputs, base.calls.values(), strict=True):
        assert torch.equal(out, made.outputs[0])
    assert edit.recording is not None and edit.recording.nbytes == 0
    assert [warning.filename for warning in seen] == [__file__]  # at the line of the caller's code


def test_no_change_gives_the_recording(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    with pytest.warns(EmptyMaskWarning), unet.edit(base) as edit:
        outputs = run(unet, call)
    assert edit.mask is not None and not edit.mask.any()
    torch.testing.assert_close(outputs[-1], base.calls[(100.0, 0)].outputs[0])


def test_a_full_mask_is_dense(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    with unet.edit(base, torch.ones(SIZE), record=True) as edit:
        outputs = run(unet, other_text(call), change=0.3)
    with torch.no_grad():
        dense = run(unet, other_text(call), change=0.3)
    for out, wanted in zip(outputs, dense, strict=True):
        torch.testing.assert_close(out, wanted)
    assert len(edit.timings["dense"]) == 5 and edit.recording is not None
    assert edit.recording.calls[(900.0, 0)].cache.base is None


MISMATCHES = {
    "sample shape": lambda c: {**c, "sample": c["sample"][..., :6]},
    "sample dtype": lambda c: {**c, "sample": c["sample"].bfloat16()},
    "encoder_hidden_states shape": lambda c: {**c, "encoder_hidden_states": c["encoder_hidden_states"][:, :5]},
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_other_settings_are_named(unet: CompiledUNet, call: dict[str, Any], base: Recording, name: str) -> None:
    with pytest.raises(RecordingMismatchError, match=name), unet.edit(base, corner()):
        run(unet, MISMATCHES[name](call))


def test_another_batch_and_other_steps_are_named(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    single = {name: value[:1] for name, value in call.items()}
    with pytest.raises(RecordingMismatchError, match=r"\(2, 4, 8, 8\), edited with \(1, 4, 8, 8\)"), unet.edit(base):
        run(unet, single)
    with pytest.raises(RecordingMismatchError, match="scheduler or number of steps"), unet.edit(base, corner()):
        run(unet, call, (900, 600))
    smaller = {**call, "sample": call["sample"][..., :6]}
    with unet.record(), pytest.raises(RecordingMismatchError, match="sample shape"):
        run(unet, call, (900,))
        run(unet, smaller, (700,))


def test_guidance_that_ends_halfway(unet: CompiledUNet, call: dict[str, Any]) -> None:
    """Calls of one run may carry fewer samples from some step on (guidance cut off)."""
    single = {name: value[:1] for name, value in call.items()}
    same = {**call, "sample": call["sample"][:1].repeat(2, 1, 1, 1)}

    def cut(model: nn.Module) -> list[Tensor]:
        return run(model, same, (900, 700)) + run(model, single, (500, 300))

    with unet.record() as base:
        recorded = cut(unet)
    assert [len(made.sample) for made in base.calls.values()] == [2, 2, 1, 1] and base.images == 1
    with unet.edit(base, corner()):
        for out, wanted in zip(cut(unet), recorded, strict=True):
            torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("timesteps", [(900, 500, 100), (100, 300), (700,)])
def test_skipped_and_exchanged_steps_are_named(
    unet: CompiledUNet, call: dict[str, Any], base: Recording, timesteps: tuple[int, ...]
) -> None:
    """Timesteps that the recording has, but not in this order: their latents would be another step's."""
    with (
        pytest.raises(RecordingMismatchError, match=r"call \d \(scheduler or number of steps\)"),
        unet.edit(base, corner()),
    ):
        run(unet, call, timesteps)


def test_other_noise_is_named(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    other = {**call, "sample": call["sample"].flip(0)}
    with pytest.raises(RecordingMismatchError, match="seed, noise"), unet.edit(base, corner()):
        run(unet, other)
    with unet.edit(base, torch.ones(SIZE)):
        run(unet, other)  # nothing of the recording is left under a full mask


def test_the_wrapping_of_results_may_differ(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    with unet.edit(base, corner()):
        out = unet(call["sample"], 900, call["encoder_hidden_states"])
    torch.testing.assert_close(out.sample, base.calls[(900.0, 0)].outputs[0])


def test_recordings_that_cannot_be_edited(unet: CompiledUNet, call: dict[str, Any]) -> None:
    with unet.record() as nothing:
        pass
    with pytest.raises(IncompleteRecordingError, match="no call at all"), unet.edit(nothing):
        pass
    with pytest.raises(KeyboardInterrupt), unet.record() as half:
        run(unet, call, (900, 700))
        raise KeyboardInterrupt
    with pytest.raises(IncompleteRecordingError, match="2 calls of a run that did not finish"), unet.edit(half):
        pass
    with unet.record() as released:
        run(unet, call, (900,))
    released.release()
    with pytest.raises(SessionClosedError), unet.edit(released):
        pass
    with unet.record() as foreign:
        run(unet, call, (900,))
    with pytest.raises(ForeignRecordingError), fisedit.compile(models.one_level()).edit(foreign):
        pass


def test_changed_weights_are_noticed(call: dict[str, Any]) -> None:
    unet = fisedit.compile(models.one_level())
    with unet.record() as base:
        run(unet, call, (900,))
    with unet.edit(base, corner()):
        run(unet, call, (900,))
    unet.load_state_dict(models.one_level(seed=7).state_dict())
    with pytest.raises(ForeignRecordingError, match="was changed since"), unet.edit(base, corner()):
        pass


def test_inference_mode(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    """Tensors made in inference mode count no writes: edits inside it, and outside of what it recorded, are right."""
    with torch.inference_mode():
        inside = {name: value.clone() for name, value in other_text(call).items()}
        with unet.record() as made:
            run(unet, call)
        with unet.edit(base, corner()):
            outputs = run(unet, inside, change=0.1)
    with unet.edit(made, corner()):
        again = run(unet, other_text(call), change=0.1)
    for a, b in zip(outputs, again, strict=True):
        torch.testing.assert_close(a.clone(), b)


def test_an_exact_background_needs_the_recorded_latents(unet: CompiledUNet, base: Recording) -> None:
    with pytest.raises(IncompleteRecordingError, match="latents after step 1"), unet.edit(base, corner()) as edit:
        edit.on_step_end(None, 0, 900, {"latents": torch.zeros(1, 4, *SIZE)})


def test_a_changed_model_is_captured_anew(call: dict[str, Any]) -> None:
    """A setting or submodule changed after the first capture: what is recorded is the model as it is now."""
    unet = fisedit.compile(models.one_level())
    with unet.record():
        run(unet, call, (900,))
    torch.manual_seed(3)
    unet._unet.conv_out = nn.Conv2d(16, 4, 3, padding=1).requires_grad_(False)
    with unet.record() as base:
        (recorded,) = run(unet, call, (900,))
    with torch.no_grad():
        torch.testing.assert_close(recorded, run(unet._unet, call, (900,))[0])
    with unet.edit(base, corner()):
        torch.testing.assert_close(run(unet, call, (900,))[0], recorded)


def test_active_dropout_is_refused(call: dict[str, Any]) -> None:
    unet = fisedit.compile(models.one_level(dropout=0.3).train())
    with pytest.raises(UnsupportedCaptureError, match="dropout is active"), unet.record():
        run(unet, call, (900,))


def test_sessions_do_not_nest(unet: CompiledUNet, base: Recording) -> None:
    with unet.record(), pytest.raises(NestedSessionError, match=r"edit\(\) was entered while record"), unet.edit(base):
        pass
    with unet.edit(base), pytest.raises(NestedSessionError), unet.record():
        pass


def test_an_exception_leaves_the_model_dense(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    with pytest.raises(ZeroDivisionError), unet.edit(base, corner()):
        run(unet, call, (900,))
        raise ZeroDivisionError
    with torch.no_grad():
        assert torch.equal(run(unet, call)[0], run(unet._unet, call)[0])
    with unet.edit(base, corner()):
        torch.testing.assert_close(run(unet, call)[-1], base.calls[(100.0, 0)].outputs[0])


@pytest.mark.parametrize(
    "mask", [torch.full(SIZE, 2.0), torch.full(SIZE, float("nan")), torch.ones(2, 8, 8), "no file"]
)
def test_bad_masks(unet: CompiledUNet, base: Recording, mask: Any) -> None:
    with pytest.raises(InvalidMaskError), unet.edit(base, mask):
        pass


def test_bad_options(unet: CompiledUNet, base: Recording) -> None:
    with pytest.raises(UnknownOptionError, match="kv='everything'"):
        fisedit.compile(unet._unet, kv="everything")
    with pytest.raises(TypeError, match="not str"):
        fisedit.compile("unet")  # type: ignore[arg-type]
    for bad in ({"steps": 0}, {"threshold": 1.5}, {"window": (3, 2)}, {"method": "guess"}, {"dilation": -1}):
        with pytest.raises(UnknownOptionError):
            DetectConfig(**bad)
    with (
        pytest.raises(UnknownOptionError, match="the schedule has 5 steps"),
        unet.edit(base, detect=DetectConfig(steps=5)),
    ):
        pass


def test_two_edits_at_once_equal_one_after_the_other(unet: CompiledUNet, call: dict[str, Any], base: Recording) -> None:
    masks_ = [corner(), corner().flip(0)]
    serial: list[list[Tensor]] = []
    for mask in masks_:
        with unet.edit(base, mask):
            serial.append(run(unet, other_text(call), change=0.2))
    results: dict[int, list[Tensor]] = {}
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        with unet.edit(base, masks_[number]):
            barrier.wait()
            results[number] = run(unet, other_text(call), change=0.2)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        for a, b in zip(results[number], serial[number], strict=True):
            assert torch.equal(a, b)


def test_the_callers_tensors_are_their_own(unet: CompiledUNet, call: dict[str, Any]) -> None:
    """Writing into a returned output or an input afterwards does not reach the recording."""
    sample = call["sample"].clone()
    with unet.record() as base:
        out = unet(sample, 5, call["encoder_hidden_states"], return_dict=False)[0]
    kept = base.calls[(5.0, 0)].outputs[0].clone()
    out.zero_()
    sample.zero_()
    with unet.edit(base, corner()):
        again = unet(call["sample"], 5, call["encoder_hidden_states"], return_dict=False)[0]
    torch.testing.assert_close(again, kept)


def test_what_stays_dense_is_named() -> None:
    class Rolling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.last(torch.roll(self.first(x), 1, -1) * (1 + 0 * t[0]))

    unet = fisedit.compile(Rolling().eval())
    x = torch.randn(1, 4, *SIZE)
    assert "Nothing is captured yet" in unet.inspect()
    with unet.record() as base:
        recorded = unet(x, 5)
    with unet.edit(base, corner()) as edit:
        torch.testing.assert_close(unet(x, 5), recorded)
    assert "aten.roll.default" in unet.inspect() and "no pass knows this op" in unet.inspect()
    assert any("roll" in island for island in edit.report().islands)


def test_what_cannot_be_captured_says_so() -> None:
    class DataDependent(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    unet = fisedit.compile(DataDependent())
    with pytest.raises(UnsupportedCaptureError, match="DataDependent could not be captured"), unet.record():
        unet(torch.ones(1, 4, *SIZE), 5)
    assert unet(torch.ones(1, 4, *SIZE), 5).sum() > 0
