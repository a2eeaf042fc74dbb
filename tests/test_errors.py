"""Every error names its facts, survives pickling, and is caught as FISEditError."""

import pickle

import pytest

from fisedit import errors, warnings

EXAMPLES = [
    (errors.InvalidMaskError(given="of shape [3, 4, 5]", expected="[H, W]"), ["[3, 4, 5]", "[H, W]", "Give one mask"]),
    (errors.MaskBatchError(given=3), ["3 masks", "Call once for each sample"]),
    (
        errors.RecordingMismatchError(differences={"steps": (50, 30), "guidance": (7.5, 1.0)}),
        ["steps: recorded 50, edited with 30", "guidance: recorded 7.5, edited with 1.0", "record again"],
    ),
    (errors.ForeignRecordingError(recorded_by="unet A", edited_by="unet B"), ["unet A", "unet B", "Record with"]),
    (
        errors.IncompleteRecordingError(missing=[f"timestep {t}" for t in range(8)], recorded="2 steps"),
        ["timestep 0, timestep 1", "timestep 4 and 3 more", "2 steps"],
    ),
    (
        errors.PartialRecordingError(missing=[f"the maps of call {n}" for n in range(7)], reason="the disk is full"),
        ["lacks the maps of call 0, ", "call 4 and 2 more", "(the disk is full)", "Record again with"],
    ),
    (errors.InvalidTimestepError(given=[900.0, 100.5]), ["[900, 100.5]", "Call once for each timestep"]),
    (
        errors.ModelChangedError(session="record", changes="conv_in.weight"),
        ["`with` block of record(): conv_in.weight.", "Change the model"],
    ),
    (errors.UnsupportedPipelineError(pipeline="a Pipe", missing=["a U-Net", "a VAE"]), ["a Pipe", "a U-Net, a VAE"]),
    (errors.NestedSessionError(opened="edit", active="record"), ["edit() was entered while record() is still open"]),
    (errors.SessionClosedError(session="edit session", action="mask"), ["mask needs an open edit session"]),
    (errors.NotRecordedError(), ["record=True"]),
    (errors.PromptTooLongError(prompt="a {curly} prompt", tokens=81, limit=77), ["'a {curly} prompt'", "81", "77"]),
    (errors.UnsupportedCaptureError(model="UNet", reason="it branches on data"), ["UNet", "branches on data", "Undo"]),
    (errors.UnsupportedDtypeError(dtype="int8", device="cpu", supported=["float32"]), ["int8", "cpu", "float32"]),
    (errors.ModelNotFoundError(folder="models/sd"), ["models/sd", "model_index.json", "nothing is downloaded"]),
    (
        errors.UnknownOptionError(option="cost", given="papr", allowed=["paper", "halo"]),
        ["cost='papr'", "'paper' | 'halo'"],
    ),
    (errors.UnknownOptionError(option="dilation", given=-1, allowed="a whole number >= 0"), ["a whole number >= 0"]),
    (errors.ScheduleTooShortError(steps=1), ["schedule of 1 step", "Give a mask"]),
    (errors.InvalidAlignmentError(given="3 tokens", expected="77"), ["has 3 tokens", "expected 77", "align_prompts"]),
    (errors.UnavailableDeviceError(device="cuda", available=["cpu", "mps:0"]), ["'cuda'", "cpu, mps:0"]),
    (
        errors.UnavailableProviderError(provider="triton", reason="no C compiler"),
        ["provider='triton'", "launched here: no C compiler. provider='reference' is plain"],
    ),
    (
        errors.UnreadableModelError(folder="models/sd", reason="no {weights}"),
        ["models/sd", "no {weights}", "save_pretrained"],
    ),
    (errors.UnwritableTraceError(path="gone/t.json", reason="no such folder"), ["'gone/t.json': no such", "Give a"]),
    (errors.NestedTraceError(opened="b", active="a"), ["trace('b') was entered while trace('a')", "one trace around"]),
    (errors.CacheWriteError(path="b/x", reason="No space left on device"), ["'b/x'", "No space left", "Make room"]),
    (errors.CacheReadError(path="b/x", reason="it is missing"), ["'b/x' cannot be used: it is missing", "save what"]),
    (errors.SavedBaseNotFoundError(folder="b"), ["'b' holds no saved base", "no manifest.json", "save() wrote"]),
    (
        errors.UnfinishedSaveError(folder="b", file="call-0001.safetensors", state="missing"),
        ["'b' did not finish", "call-0001.safetensors is missing", "overwrite=True"],
    ),
    (errors.SavedBaseExistsError(folder="b", holds="a saved base"), ["'b'", "holds a saved base", "overwrite=True"]),
    (errors.SavedFormatError(folder="b", given=7, known=1, written_by="FISEdit 9"), ["FISEdit 9 in format 7", "mat 1"]),
    (
        errors.SavedBaseMismatchError(folder="b", differences={"dtype": ("float32", "float16")}),
        ["'b'", "dtype: saved with 'float32', here 'float16'", "generate again"],
    ),
    (
        errors.UnsavableSettingError(setting="callback_on_step_end", given="a function"),
        ["its callback_on_step_end is a function", "PIL images", "without it"],
    ),
    (errors.UnreadableWeightsError(name="conv_in.weight", reason="offloaded"), ["conv_in.weight", "offloaded"]),
    (errors.ModelGoneError(model="UNet with 1 M parameters"), ["UNet with 1 M parameters", "Keep the model"]),
]


@pytest.mark.parametrize(("error", "parts"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_message_names_the_facts(error, parts):
    for part in parts:
        assert part in str(error)
    assert isinstance(error, errors.FISEditError)


@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES], ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error)


def test_every_error_has_an_example():
    classes = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.FISEditError)}
    assert {type(error) for error, _ in EXAMPLES} == classes - {errors.FISEditError}


def test_warnings_are_user_warnings():
    assert issubclass(warnings.EmptyMaskWarning, warnings.FISEditWarning)
    assert issubclass(warnings.FISEditWarning, UserWarning)
