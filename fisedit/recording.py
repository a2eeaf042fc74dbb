"""A recorded run: the handle that ``record()`` gives, which owns its caches and can be edited any number of times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fisedit.capture import Call, Signature
from fisedit.config import CacheConfig
from fisedit.errors import (
    ForeignRecordingError,
    IncompleteRecordingError,
    PartialRecordingError,
    RecordingMismatchError,
    SessionClosedError,
)
from fisedit.fingerprint import ModelState
from fisedit.program import Program
from fisedit.runtime import trace
from fisedit.runtime.cache.block import Block, Kept, Kind, take_samples
from fisedit.runtime.cache.store import StepCache, clone_detached
from fisedit.runtime.cache.tiers import Tiers
from fisedit.runtime.cache.writer import Writer
from fisedit.runtime.executor import Store
from fisedit.runtime.timing import Span
from fisedit.sameness import Copies

CallKey = tuple[float, int]
"""A call within a run: the timestep's value, and how many calls of that value came before it."""


class CallCounter:
    """Names the calls of a run, in the order they come. No step count is assumed: second-order samplers visit a
    timestep twice, and some codebases run the two halves of guidance in two calls."""

    def __init__(self) -> None:
        self._seen: Counter[float] = Counter()

    def next(self, call: Call) -> CallKey:
        key = (call.timestep_value, self._seen[call.timestep_value])
        self._seen[call.timestep_value] += 1
        return key


@dataclass
class RecordedCall:
    """One recorded U-Net call: its input ``sample`` and ``text``, its outputs, its cache, and its time."""

    cache: StepCache
    sample: Tensor
    text: Tensor | None
    outputs: list[Tensor]
    span: Span
    signature: Signature
    batch: int  # samples of the signature, of which this may be some
    graph: str = ""  # digest of the graph whose nodes the slots of the cache are named after
    kv: str = "cached"  # "active" if keys and values of self-attention are not among them

    def blocks(self) -> list[Block]:
        """The blocks that its values are in, and those of what it is an edit of."""
        return [block for link in self.cache.chain for block in link.blocks()]

    @property
    def seconds(self) -> float:
        """How long it took; waits for a GPU that is not done with it."""
        return self.span.seconds

    def check(self, call: Call) -> None:
        """Raise unless a call has the shapes, dtypes and settings of this one, for any number of samples.

        Raises:
            RecordingMismatchError: names what differs.
        """
        differences = self.signature.differences(call.signature, (self.batch, call.batch))
        differences.pop("return_dict", None)  # how the result is wrapped changes no feature map
        if differences:
            raise RecordingMismatchError(differences=differences)

    def samples(self, numbers: list[int]) -> RecordedCall:
        """Some samples of this call, sharing its memory."""
        batch = len(self.sample)
        return replace(
            self,
            cache=self.cache.samples(numbers),
            sample=take_samples(self.sample, batch, numbers),
            text=None if self.text is None else take_samples(self.text, batch, numbers),
            outputs=[take_samples(output, batch, numbers) for output in self.outputs],
        )


class Owner(Protocol):
    """The compiled model that a recording belongs to."""

    def save(self, recording: Recording, folder: Path | str, overwrite: bool) -> None: ...


@dataclass
class Recording:
    """What ``record()`` yields: the feature maps of a run, keyed by timestep. It belongs to the model that made it.

    Attributes:
        calls: the recorded calls in order.
        latents: the latents after each step, if :meth:`on_step_end` was given to the pipeline.
        corrections: kept latents less those that the sampler made, after each step; empty where they are the same.
        complete: whether the ``with`` block ended without an exception.
        saved_with: the versions that saved it, if it was loaded from a folder.
    """

    owner: Owner
    model_name: str
    weights: ModelState
    calls: dict[CallKey, RecordedCall] = field(default_factory=dict)
    latents: list[Tensor] = field(default_factory=list)
    corrections: list[Tensor] = field(default_factory=list)
    complete: bool = False
    released: bool = False
    writer: Writer | None = field(default=None, repr=False)
    saved_with: str = ""

    @property
    def timesteps(self) -> list[float]:
        """The timesteps of the schedule, in the order they were first called."""
        return list(dict.fromkeys(timestep for timestep, _ in self.calls))

    @property
    def images(self) -> int:
        """K: the images that the run makes at once; a call has K samples for each part of guidance it carries."""
        if self.latents:
            return len(self.latents[0])
        call = next(iter(self.calls.values()))
        sample = call.sample[:, : call.outputs[0].shape[1]]  # without channels that only condition
        parts = [p for p in range(len(sample), 0, -1) if len(sample) % p == 0]
        return next(len(sample) // p for p in parts if all(torch.equal(c, sample[: len(c)]) for c in sample.chunk(p)))

    def blocks(self) -> list[Block]:
        """The blocks of its own values."""
        return [block for call in self.calls.values() for block in call.cache.blocks()]

    @property
    def partial(self) -> bool:
        """Whether some of its values found no place on any tier. It cannot be edited then."""
        return any(block.lost is not None for block in self.blocks())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let its values, and those of what it is an edit of, stay where they are."""
        blocks = {id(block): block for call in self.calls.values() for block in call.blocks()}
        if self.writer is None:
            yield
            return
        self.writer.tiers.hold(blocks.values())
        try:
            yield
        finally:
            self.writer.tiers.let_go(blocks.values())

    def placement(self) -> dict[str, dict[str, int]]:
        """Bytes by kind of value and by tier (``gpu``, ``pinned``, ``pageable``, ``disk``), where they are now; what
        found no place is ``lost``."""
        found: dict[str, dict[str, int]] = {}
        for call in self.calls.values():
            for value in call.cache.kept():
                of_kind = found.setdefault(value.block.kind, {})
                tier = value.block.tier if value.block.lost is None else "lost"
                of_kind[tier] = of_kind.get(tier, 0) + value.nbytes
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of cached feature maps that this recording holds itself."""
        return sum(call.cache.nbytes for call in self.calls.values())

    def on_step_end(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A diffusers ``callback_on_step_end`` that keeps the latents of each step, for an exact background."""
        self.latents.append(clone_detached(kwargs["latents"]))
        return kwargs

    def keep(self, call: Call, cache: StepCache, outputs: list[Tensor], span: Span, texts: Copies) -> RecordedCall:
        """What is kept of a call; ``texts`` are those of the calls before it, which most often are the same."""
        sample = clone_detached(call.tensors[call.sample])
        text = texts.of(call.tensors[call.text]) if call.text is not None else None
        return RecordedCall(cache, sample, text, outputs, span, call.signature, call.batch)

    def split(self) -> list[Recording]:
        """A recording for each image of a run that made several. They share memory, which is freed with the last."""
        images, alone = self.images, []
        for image in range(images):
            calls = {
                key: call.samples(list(range(image, len(call.sample), images))) for key, call in self.calls.items()
            }
            latents = [latent[image : image + 1] for latent in self.latents]
            alone.append(replace(self, calls=calls, latents=latents))
        return alone

    def save(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write this recording to a folder, for ``unet.load_recording(folder)``, which another process may call.

        The folder holds JSON and safetensors, and becomes loadable at the very end: a save that is cut off leaves
        nothing that could be taken for a recording. A recorded edit is written whole, with what it shares with its
        base, so that the folder depends on no other.

        Args:
            folder: made if it is not there. It must be empty, unless ``overwrite``.
            overwrite: replace what a former save wrote. From the beginning of this one that is gone.

        Raises:
            SavedBaseExistsError: the folder is not empty.
            CacheWriteError: a file cannot be written; what was written so far is removed, this recording is as it was.
            ForeignRecordingError: the model was changed since.
            SessionClosedError, IncompleteRecordingError, NestedSessionError: it was released, or is not finished yet.
            PartialRecordingError: some of its values found no place when it was made.
            UnreadableWeightsError, ModelGoneError: what tells the model from others cannot be found out.
        """
        self.owner.save(self, folder, overwrite)

    def compact(self) -> None:
        """Make calls whole where the overlays of a chain of edits have come to hold more than the dense recording: so
        a chain of any length holds at most twice what that does."""
        for call in self.calls.values():
            root, *overlays = call.cache.chain
            if self.writer is not None and sum(step.nbytes for step in overlays) > root.nbytes:
                kept = self.writer.keep_again(call.cache)
                call.cache = StepCache(call.cache.batch, kept, device=call.cache.device)

    def release(self) -> None:
        """Free the caches now; the recording cannot be edited any more."""
        self.calls.clear()
        self.latents.clear()
        self.corrections.clear()
        self.released = True

    def check_editable(self, owner: object, model_name: Callable[[], str], weights: ModelState) -> None:
        """Raise unless this recording can be edited by the model ``owner`` with the weights and settings it has now.

        Raises:
            ForeignRecordingError, SessionClosedError, PartialRecordingError, IncompleteRecordingError.
        """
        if self.owner is not owner:
            edited_by = f"another compiled model ({model_name()})"
            raise ForeignRecordingError(recorded_by=self.model_name, edited_by=edited_by)
        if changes := self.weights.changes(weights):
            edited_by = f"the same model, which was changed since ({changes}),"
            raise ForeignRecordingError(recorded_by=self.model_name, edited_by=edited_by)
        if self.released:
            raise SessionClosedError(session="recording", action="edit")
        if lost := [(number, b) for number, call in enumerate(self.calls.values(), 1)
                    for b in call.blocks() if b.lost is not None]:  # fmt: skip
            missing = [f"the {block.kind} of call {number}" for number, block in lost]
            raise PartialRecordingError(missing=missing, reason=str(lost[0][1].lost))
        if not self.complete or not self.calls:
            recorded = f"{len(self.calls)} calls of a run that did not finish" if self.calls else "no call at all"
            raise IncompleteRecordingError(missing=["a finished run"], recorded=recorded)

    def check_program(self, key: CallKey, program: Program) -> None:
        """Raise unless the feature maps of a call are those that a program reads.

        Raises:
            ForeignRecordingError: they come from a folder, and the model computes something else now, or is traced
                otherwise.
            RecordingMismatchError: it reads keys and values, which were not kept (``kv="active"``, given or planned).
        """
        made = self.calls[key]
        if self.saved_with and made.graph != program.digest:
            edited_by = (
                "the same model with a forward pass that traces to another graph (other versions of its libraries, "
                "attention processors, adapter scales or the like)"
            )
            recorded_by = f"{self.model_name}, saved with {self.saved_with}"
            raise ForeignRecordingError(recorded_by=recorded_by, edited_by=edited_by)
        if made.kv == "active" != program.kv:
            raise RecordingMismatchError(differences={"kv": (made.kv, program.kv)})

    def find(self, key: CallKey) -> RecordedCall:
        """The recorded call ``key``.

        Raises:
            RecordingMismatchError: the run has no such timestep, or fewer calls of it.
        """
        if (recorded := self.calls.get(key)) is not None:
            return recorded
        timestep, occurrence = key
        if timestep in self.timesteps:
            calls = sum(1 for t, _ in self.calls if t == timestep)
            raise RecordingMismatchError(differences={f"calls at timestep {timestep:g}": (calls, occurrence + 1)})
        shown = ", ".join(f"{t:g}" for t in self.timesteps[:6]) + (", ..." if len(self.timesteps) > 6 else "")
        raise RecordingMismatchError(
            differences={"timesteps (scheduler or number of steps)": (f"{len(self.timesteps)}: {shown}", timestep)}
        )

    def check_order(self, number: int, key: CallKey) -> None:
        """Raise unless call ``number`` (0-based) of an edit is the recorded run's: no step skipped, none exchanged.

        Raises:
            RecordingMismatchError: names both timesteps.
        """
        recorded = list(self.calls)[number] if number < len(self.calls) else None
        if key != recorded:
            then = f"timestep {recorded[0]:g}" if recorded else "no such call"
            differences = {f"call {number + 1} (scheduler or number of steps)": (then, f"timestep {key[0]:g}")}
            raise RecordingMismatchError(differences=differences)

    def check_noise(self, recorded: Tensor, sample: Tensor) -> None:
        """Raise unless an edit starts from the recorded run's noise.

        Raises:
            RecordingMismatchError: the first samples differ.
        """
        if not torch.allclose(recorded, sample, rtol=1e-2, atol=1e-2):
            raise RecordingMismatchError(differences={"first sample (seed, noise)": ("the recorded one", "another")})

    def step_of(self, key: CallKey) -> int:
        """The 0-based step of the schedule that a call belongs to."""
        return self.timesteps.index(key[0])

    def __repr__(self) -> str:
        state = "released" if self.released else f"{len(self.timesteps)} steps, {self.nbytes / 2**20:.0f} MiB"
        return f"Recording({state}{'' if self.complete or self.released else ', not finished'})"


class RecordSession:
    """Runs calls dense and keeps their feature maps."""

    name = "record"

    def __init__(
        self, recording: Recording, programs: Callable[[Call], Program],
        tiers: Callable[[torch.device], Tiers], config: CacheConfig,
    ) -> None:  # fmt: skip
        self.recording = recording
        self.programs = programs
        self.tiers = tiers
        self.config = config
        self.counter = CallCounter()
        self.texts = Copies()

    def run(self, call: Call) -> Any:
        shape = tuple(call.tensors[call.sample].shape)
        first = next((tuple(made.sample.shape) for made in self.recording.calls.values()), shape)
        if shape[1:] != first[1:]:
            raise RecordingMismatchError(differences={"sample shape": (first, shape)})
        program, kept = self.programs(call), dict[str, Kept]()
        executable, uses = program.executable("record"), program.uses
        writer = self.recording.writer = self.recording.writer or Writer(self.tiers(call.device))
        key = self.counter.next(call)
        kinds = self._kinds(key)

        def keep(values: dict[Store, Tensor]) -> None:
            kept.update(writer.keep(values, uses, call.batch, kinds))

        span = Span.start(call.device)
        with trace.span("compute", f"record t={call.timestep_value:g}", call.device, {"samples": call.batch}):
            outputs = _with_room(writer.tiers, lambda: executable.run(call.tensors, keep=keep))
        span.end()
        cache = StepCache(call.batch, kept, device=call.device)
        if program.fused:  # looked at now, while the GPU is busy for long, and kept
            views, loads = program.replays().reads
            if cache.is_resident((*views, *loads)):
                cache.addresses(views)
        results = [clone_detached(output) for output in outputs]
        made = self.recording.calls[key] = self.recording.keep(call, cache, results, span, self.texts)
        made.graph, made.kv = program.digest, program.kv
        return program.captured.result(outputs)

    def _kinds(self, key: CallKey) -> frozenset[Kind]:
        """What is kept of a call."""
        timesteps = list(dict.fromkeys([*self.recording.timesteps, key[0]]))
        share = key[0] / timesteps[0] if timesteps[0] > 0 else 1.0
        return self.config.kinds(timesteps.index(key[0]) + 1, share)

    def close(self) -> None:
        """Wait for what is written to files: whether the disk took it is known then."""
        if self.recording.writer is not None:
            self.recording.writer.tiers.finish()


def _with_room(tiers: Tiers, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Run a call; if the GPU's memory runs out, recorded values leave it and the call is run again."""
    try:
        return run()
    except torch.OutOfMemoryError:
        if not tiers.on_gpu or tiers.spill() == 0:
            raise
    return run()
