"""One class per user mistake; each message says what was given, what was expected and what to do.

An error is a dataclass of the facts, and its message is `template` filled with them, so raising one is short:

    raise PromptTooLongError(prompt=prompt, tokens=81, limit=77)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(eq=False, repr=False)
class FISEditError(Exception):
    """The base of every error that FISEdit raises about its use."""

    template: ClassVar[str] = "FISEdit failed."

    def facts(self) -> dict[str, Any]:
        """The fields of the error, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        return self.template.format(**self.facts())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Callable[..., "FISEditError"], tuple[Any, ...]]:
        return _rebuild, (type(self), self.facts())


def _rebuild(error: type[FISEditError], facts: dict[str, Any]) -> FISEditError:
    return error(**facts)


@dataclass(eq=False, repr=False)
class InvalidMaskError(FISEditError):
    """A mask of wrong shape, dtype or values."""

    given: str
    expected: str
    advice: str = "Give one mask [H, W], true (or above one half) where the image may change."

    template: ClassVar[str] = "The mask is {given}; expected {expected}. {advice}"


@dataclass(eq=False, repr=False)
class MaskBatchError(FISEditError):
    """Several masks, or several samples, where one is taken."""

    given: int
    what: str = "masks"

    template: ClassVar[str] = (
        "Got {given} {what} where one is expected. Call once for each sample, or join the masks with logical or."
    )


@dataclass(eq=False, repr=False)
class RecordingMismatchError(FISEditError):
    """The edit runs under other settings than its recording: size, batch, guidance, dtype, scheduler, steps."""

    differences: Mapping[str, tuple[Any, Any]]  # field -> (value of the recording, value of the edit)

    template: ClassVar[str] = (
        "The edit does not fit its recording:\n{differences}\n"
        "Edit with the settings of the recording, or record again with these."
    )

    def __str__(self) -> str:
        lines = [f"  {name}: recorded {old!r}, edited with {new!r}" for name, (old, new) in self.differences.items()]
        return self.template.format(differences="\n".join(lines))


@dataclass(eq=False, repr=False)
class ForeignRecordingError(FISEditError):
    """A recording that another model made."""

    recorded_by: str
    edited_by: str

    template: ClassVar[str] = (
        "This recording was made by {recorded_by}, and {edited_by} cannot edit it: a recording is edited by the "
        "compiled model that made it, as it was then. Record with the model that edits."
    )


@dataclass(eq=False, repr=False)
class IncompleteRecordingError(FISEditError):
    """The edit needs steps or cache slots that the recording lacks."""

    missing: Sequence[str]
    recorded: str

    template: ClassVar[str] = (
        "The edit needs {missing}, which the recording lacks; it holds {recorded}. "
        "Let the recorded run finish before editing it, and edit with the same scheduler and number of steps."
    )

    def __str__(self) -> str:
        shown = ", ".join(self.missing[:5])
        more = f" and {len(self.missing) - 5} more" if len(self.missing) > 5 else ""
        return self.template.format(missing=shown + more, recorded=self.recorded)


@dataclass(eq=False, repr=False)
class PartialRecordingError(FISEditError):
    """An edit of a recording of which a part found no place."""

    missing: Sequence[str]
    reason: str

    template: ClassVar[str] = (
        "The recording is partial: it lacks {missing}, for which there was no place ({reason}). Record again with "
        "larger budgets, a disk folder with room, or fewer steps (CacheConfig)."
    )

    def __str__(self) -> str:
        more = f" and {len(self.missing) - 5} more" if len(self.missing) > 5 else ""
        return self.template.format(missing=", ".join(self.missing[:5]) + more, reason=self.reason)


@dataclass(eq=False, repr=False)
class NestedSessionError(FISEditError):
    """record() or edit() inside another one on the same module."""

    opened: str
    active: str

    template: ClassVar[str] = (
        "{opened}() was entered while {active}() is still open on the same module. Leave the first `with` block before "
        "the second; to record an edit, ask the edit itself to be recorded."
    )


@dataclass(eq=False, repr=False)
class SessionClosedError(FISEditError):
    """A session used after its `with` block, or a handle whose caches were released."""

    session: str
    action: str

    template: ClassVar[str] = "{action} needs an open {session}, but this one is closed. Open a new one."


@dataclass(eq=False, repr=False)
class NotRecordedError(FISEditError):
    """An edit of an edit that kept no caches."""

    template: ClassVar[str] = (
        "This edit kept no feature maps, so it cannot be edited in turn. Make it with record=True, "
        "or edit the recording that it came from."
    )


@dataclass(eq=False, repr=False)
class PromptTooLongError(FISEditError):
    """A prompt of more tokens than the text encoder takes; it is never cut silently."""

    prompt: str
    tokens: int
    limit: int

    template: ClassVar[str] = (
        "The prompt {prompt!r} has {tokens} tokens, start and end included; the tokenizer takes {limit}. Shorten it."
    )


@dataclass(eq=False, repr=False)
class InvalidTimestepError(FISEditError):
    """One call whose samples are at different timesteps, or at none."""

    given: Sequence[float]

    template: ClassVar[str] = (
        "The samples of one call are at the timesteps {given}; inside record() and edit() they share one, a number. "
        "Call once for each timestep."
    )

    def __str__(self) -> str:
        shown = ", ".join(f"{value:g}" for value in self.given[:6]) + (", ..." if len(self.given) > 6 else "")
        return self.template.format(given=f"[{shown}]")


@dataclass(eq=False, repr=False)
class ModelChangedError(FISEditError):
    """A model that was changed while a session was open: its first calls and its last ones belong to two models."""

    session: str
    changes: str

    template: ClassVar[str] = (
        "The model was changed inside the `with` block of {session}(): {changes}. What ran in it cannot be relied on. "
        "Change the model (LoRA, weights, settings) before the block, and leave it alone inside."
    )


@dataclass(eq=False, repr=False)
class UnsupportedCaptureError(FISEditError):
    """A model that could not be traced into a graph."""

    model: str
    reason: str
    advice: str = "Undo what makes the forward pass depend on data or on Python state, such as attention slicing."

    template: ClassVar[str] = "{model} could not be captured as a graph: {reason}. {advice}"


@dataclass(eq=False, repr=False)
class UnsupportedDtypeError(FISEditError):
    """A dtype that the device cannot compute in."""

    dtype: str
    device: str
    supported: Sequence[str]

    template: ClassVar[str] = (
        "The model is {dtype} on {device}, which is not supported there; supported: {supported}. "
        "Move it with .to(dtype) or to another device."
    )

    def __str__(self) -> str:
        return self.template.format(**self.facts() | {"supported": ", ".join(self.supported)})


@dataclass(eq=False, repr=False)
class ModelNotFoundError(FISEditError):
    """A folder that holds no diffusers pipeline."""

    folder: str

    template: ClassVar[str] = (
        "The folder {folder!r} holds no diffusers pipeline: it has no model_index.json. "
        "Give the folder that pipe.save_pretrained wrote; nothing is downloaded."
    )


@dataclass(eq=False, repr=False)
class UnknownOptionError(FISEditError):
    """An option with a value that it does not take."""

    option: str
    given: object
    allowed: str | Sequence[object]

    template: ClassVar[str] = "{option}={given!r} is not known; it takes {allowed}."

    def __str__(self) -> str:
        allowed = self.allowed if isinstance(self.allowed, str) else " | ".join(map(repr, self.allowed))
        return self.template.format(**self.facts() | {"allowed": allowed})


@dataclass(eq=False, repr=False)
class ScheduleTooShortError(FISEditError):
    """An automatic mask on a schedule that has no step left to be sparse."""

    steps: int

    template: ClassVar[str] = (
        "A schedule of {steps} step is too short to find a mask: at least one dense step finds it and at least one "
        "sparse step follows. Give a mask, or take 2 steps or more."
    )


@dataclass(eq=False, repr=False)
class InvalidAlignmentError(FISEditError):
    """A token alignment of wrong type, shape or values."""

    given: str
    expected: str

    template: ClassVar[str] = (
        "The token alignment has {given}; expected {expected}. Make it with fisedit.alignment.align_prompts, "
        "or leave it out."
    )


@dataclass(eq=False, repr=False)
class UnavailableDeviceError(FISEditError):
    """A device that is not there, or no name of one."""

    device: str
    available: Sequence[str]

    template: ClassVar[str] = "The device {device!r} is not available; available here: {available}."

    def __str__(self) -> str:
        return self.template.format(**self.facts() | {"available": ", ".join(self.available)})


@dataclass(eq=False, repr=False)
class UnavailableProviderError(FISEditError):
    """Kernels were asked for that this machine cannot launch."""

    provider: str
    reason: str

    template: ClassVar[str] = (
        "The kernels of provider={provider!r} cannot be launched here: {reason}. "
        "provider='reference' is plain PyTorch, for any device."
    )


@dataclass(eq=False, repr=False)
class UnreadableModelError(FISEditError):
    """A folder whose pipeline cannot be loaded."""

    folder: str
    reason: str

    template: ClassVar[str] = (
        "The pipeline in the folder {folder!r} cannot be loaded: {reason}. "
        "Give the folder whole, as pipe.save_pretrained wrote it."
    )


@dataclass(eq=False, repr=False)
class UnsupportedPipelineError(FISEditError):
    """A pipeline that EditPipeline cannot drive."""

    pipeline: str
    missing: Sequence[str]

    template: ClassVar[str] = (
        "EditPipeline cannot drive {pipeline}: it lacks {missing}. Compile its U-Net with fisedit.compile and open "
        "record() and edit() around the calls yourself (docs/integrations/custom-loop.md)."
    )

    def __str__(self) -> str:
        return self.template.format(pipeline=self.pipeline, missing=", ".join(self.missing))


@dataclass(eq=False, repr=False)
class UnwritableTraceError(FISEditError):
    """A file that a trace cannot be written to."""

    path: str
    reason: str

    template: ClassVar[str] = (
        "The trace cannot be written to {path!r}: {reason}. Give a file, new or old, in a folder that exists and that "
        "you may write to."
    )


@dataclass(eq=False, repr=False)
class NestedTraceError(FISEditError):
    """trace() inside another one."""

    opened: str
    active: str

    template: ClassVar[str] = (
        "trace({opened!r}) was entered while trace({active!r}) is still open, which takes all spans. Leave the first "
        "`with` block before the second, or open one trace around both."
    )


@dataclass(eq=False, repr=False)
class CacheWriteError(FISEditError):
    """A file that could not be written."""

    path: str
    reason: str

    template: ClassVar[str] = (
        "The file {path!r} cannot be written: {reason}. Make room, or give a folder that can be written to; what is in "
        "memory is as it was."
    )


@dataclass(eq=False, repr=False)
class CacheReadError(FISEditError):
    """A file that is missing, damaged or cannot be read."""

    path: str
    reason: str

    template: ClassVar[str] = (
        "The file {path!r} cannot be used: {reason}. Take it from a copy, or save what it belongs to again."
    )


@dataclass(eq=False, repr=False)
class SavedBaseNotFoundError(FISEditError):
    """A folder that holds nothing saved."""

    folder: str
    reason: str = "it has no manifest.json"

    template: ClassVar[str] = "The folder {folder!r} holds no saved base: {reason}. Give the folder that save() wrote."


@dataclass(eq=False, repr=False)
class UnfinishedSaveError(FISEditError):
    """A folder in which a save was begun and did not come to its end."""

    folder: str
    file: str
    state: str

    template: ClassVar[str] = (
        "The save in the folder {folder!r} did not finish, or is still going on: {file} is {state}. "
        "Save again, with overwrite=True, or wait."
    )


@dataclass(eq=False, repr=False)
class SavedBaseExistsError(FISEditError):
    """A save into a folder that is not empty."""

    folder: str
    holds: str

    template: ClassVar[str] = (
        "Nothing is saved in the folder {folder!r}, since it holds {holds}. Give a new folder, or overwrite=True, "
        "which replaces what a former save wrote and leaves other files alone."
    )


@dataclass(eq=False, repr=False)
class SavedFormatError(FISEditError):
    """A folder that another version of FISEdit wrote, in a format that this one does not know."""

    folder: str
    given: object
    known: int
    written_by: str = "another version of FISEdit"

    template: ClassVar[str] = (
        "The folder {folder!r} was written by {written_by} in format {given}; this version reads format {known}. "
        "Install the version that wrote it, or save again."
    )


@dataclass(eq=False, repr=False)
class SavedBaseMismatchError(FISEditError):
    """A saved base that belongs to another model, or to another use of it."""

    folder: str
    differences: Mapping[str, tuple[Any, Any]]  # field -> (as saved, here)

    template: ClassVar[str] = (
        "What is saved in the folder {folder!r} does not fit what it is loaded into:\n{differences}\n"
        "Load it with the model, adapters and settings that it was made with, or generate again."
    )

    def __str__(self) -> str:
        lines = [f"  {name}: saved with {saved!r}, here {here!r}" for name, (saved, here) in self.differences.items()]
        return self.template.format(folder=self.folder, differences="\n".join(lines))


@dataclass(eq=False, repr=False)
class UnsavableSettingError(FISEditError):
    """Something of a run that cannot be written down without running code when it is read."""

    setting: str
    given: str
    allowed: str = "None, numbers, texts, tensors, arrays, PIL images, and lists, tuples and dicts of these"

    template: ClassVar[str] = (
        "The run cannot be saved, since its {setting} is {given}; what can be saved: {allowed}. Generate without it."
    )


@dataclass(eq=False, repr=False)
class UnreadableWeightsError(FISEditError):
    """A model whose weights cannot be read, and so not be told from others."""

    name: str
    reason: str

    template: ClassVar[str] = (
        "The model cannot be told from others, since the values of {name} cannot be read: {reason}. "
        "Save and load while the weights are in memory (no sequential offloading, no packed formats)."
    )


@dataclass(eq=False, repr=False)
class ModelGoneError(FISEditError):
    """A recording whose model is no longer there."""

    model: str

    template: ClassVar[str] = (
        "The compiled model that made this recording ({model}) is gone, and a recording is saved with what tells its "
        "model from others. Keep the model until the recording is saved."
    )
