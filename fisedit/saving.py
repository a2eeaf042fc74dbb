"""Recordings in folders: JSON and safetensors, read by mapping, so that an edit reads only what it needs.

The feature maps of a dense recording are written as they lie in their blocks, in 8 bits if they do. A recorded edit is
written whole, by value, as if it had no base: a folder depends on no other, and what its base holds besides is not
kept. Its feature maps take the disk space that a dense recording of the run takes in memory, one not in 8 bits.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from fisedit.capture import Signature
from fisedit.errors import CacheReadError
from fisedit.identity import ModelIdentity
from fisedit.manifest import MANIFEST, WriteFile, read_folder, verify_folder, write_folder
from fisedit.packing import VALUES, Packer, Unpacker
from fisedit.recording import RecordedCall, Recording
from fisedit.runtime.cache.block import SCALE, Kept, Kind
from fisedit.runtime.cache.disk import open_tensors, write_tensors
from fisedit.runtime.cache.store import Overlay, StepCache, Value
from fisedit.runtime.cache.tiers import Tiers
from fisedit.runtime.cache.writer import Writer
from fisedit.runtime.timing import Span

MakeTiers = Callable[[torch.device], Tiers]
"""The memory for a model's recordings on a device."""
Kinds = dict[Kind, dict[str, torch.dtype]]
"""What a call's file holds: the slots of each kind, in the order of its block, and what they were recorded in."""


def save_recording(identity: ModelIdentity, recording: Recording, folder: Path | str, overwrite: bool = False) -> None:
    """Write a recording; see :meth:`Recording.save`."""
    packer = Packer()
    with held_for_saving(identity, recording):
        content, files = pack_recording(identity, recording, packer)
        write_folder(Path(folder), content, files | packer.files(), overwrite)


def load_recording(identity: ModelIdentity, tiers: MakeTiers, folder: Path | str, verify: bool = True) -> Recording:
    """A recording that was saved, alone or with a generation; see :meth:`CompiledUNet.load_recording`."""
    saved = SavedFolder(Path(folder), identity, verify)
    return saved.read(lambda: saved.recording(tiers))


@contextmanager
def held_for_saving(identity: ModelIdentity, recording: Recording) -> Iterator[None]:
    """Let the values of a recording stay where they lie, once it is found to be the model's, and whole.

    Raises:
        ForeignRecordingError, SessionClosedError, PartialRecordingError, IncompleteRecordingError: it is not.
    """
    identity.check_savable(recording)
    with recording.held():
        if recording.writer is not None:
            recording.writer.tiers.finish()  # what another recording sent to the disk, which may not take it
            identity.check_savable(recording)
        if identity.device.type == "cuda":  # other threads read, on streams that do not wait for this one's
            torch.cuda.current_stream(identity.device).synchronize()
        yield


def pack_recording(
    identity: ModelIdentity, recording: Recording, packer: Packer
) -> tuple[dict[str, Any], dict[str, WriteFile]]:
    """A recording, held, as content of a manifest, and what writes its feature maps, a file for each call.

    Raises:
        UnreadableWeightsError.
    """
    signatures: dict[Signature, int] = {}
    kinds: dict[str, int] = {}
    calls: list[dict[str, Any]] = []
    files: dict[str, WriteFile] = {}
    turn = threading.Lock()
    for number, ((timestep, occurrence), call) in enumerate(recording.calls.items()):
        file = f"call-{number:04}.safetensors"
        files[file] = partial(_write_cache, call.cache, turn)
        calls.append({
            "timestep": timestep, "occurrence": occurrence, "file": file, "seconds": call.seconds, "batch": call.batch,
            "signature": signatures.setdefault(call.signature, len(signatures)), "graph": call.graph,
            "kinds": kinds.setdefault(json.dumps(_pack_kinds(call.cache)), len(kinds)),
            "sample": packer.tensor(call.sample, f"sample-{number}"),
            "text": None if call.text is None else packer.tensor(call.text, f"text-{number}"),
            "outputs": [packer.tensor(output, f"output-{number}-{n}") for n, output in enumerate(call.outputs)],
        })  # fmt: skip
    kept = {
        "calls": calls,
        "signatures": [_pack_signature(signature, packer) for signature in signatures],
        "kinds": [json.loads(text) for text in kinds],
        "latents": [packer.tensor(latent, f"latents-{n}") for n, latent in enumerate(recording.latents)],
        "corrections": [packer.tensor(each, f"correction-{n}") for n, each in enumerate(recording.corrections)],
        "device": str(next(iter(recording.calls.values())).sample.device),
    }
    return {"versions": _versions(), "model": identity.facts(recording), "recording": kept}, files


class SavedFolder:
    """A folder as it is read: its content, once it is found whole and found to be the model's.

    Args:
        verify: whether checksums of all files are compared; else only their sizes are.

    Raises:
        SavedBaseNotFoundError, UnfinishedSaveError, SavedFormatError, CacheReadError: see :func:`read_folder`.
        SavedBaseMismatchError: it is another model's.
        UnreadableWeightsError.
    """

    def __init__(self, folder: Path, identity: ModelIdentity, verify: bool) -> None:
        self.folder = folder
        self.identity = identity
        self.content = read_folder(folder)
        self.read(lambda: identity.check(str(folder), self.content["model"]))
        if verify:
            verify_folder(folder, self.content)
        self.unpacker = Unpacker(folder, open_tensors(folder / VALUES), self._moved)

    def read(self, part: Any) -> Any:
        """What ``part()`` reads of the content.

        Raises:
            CacheReadError: the content is not what a save writes.
        """
        try:
            return part()
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, StopIteration) as error:
            reason = f"its content is not what a save writes ({type(error).__name__}: {error})"
            raise CacheReadError(path=str(self.folder / MANIFEST), reason=reason) from error

    def recording(self, tiers: MakeTiers) -> Recording:
        """The recording, as the model's own. Its feature maps are mapped from their files, or copied to where a GPU has
        room for them; its other tensors are copied."""
        kept, device, identity = self.content["recording"], self.identity.device, self.identity
        moved = {kept["device"]: str(device)}
        signatures = [_unpack_signature(packed, moved, self.unpacker) for packed in kept["signatures"]]
        tensor = partial(self.unpacker.tensor, device=device)
        kinds = [_unpack_kinds(packed) for packed in kept["kinds"]]
        writer = Writer(tiers(device))
        recording = Recording(identity.owner, identity.name, identity.state, complete=True, writer=writer)
        for call in kept["calls"]:
            sample = tensor(call["sample"])
            values = writer.adopt(open_tensors(self.folder / call["file"]), kinds[call["kinds"]], len(sample))
            recording.calls[float(call["timestep"]), int(call["occurrence"])] = RecordedCall(
                StepCache(len(sample), values, device=device),
                sample,
                None if call["text"] is None else tensor(call["text"]),
                [tensor(name) for name in call["outputs"]],
                Span.of(call["seconds"]),
                signatures[call["signature"]],
                int(call["batch"]),
                call["graph"],
                self.content["model"]["kv"],
            )
        recording.latents = [tensor(name) for name in kept["latents"]]
        recording.corrections = [tensor(name) for name in kept["corrections"]]
        recording.saved_with = ", ".join(f"{name} {number}" for name, number in self.content["versions"].items())
        return recording

    def _moved(self, device: str) -> torch.device:
        """Where tensors go that were on a device of this name: those of a CPU stay there."""
        return torch.device("cpu") if device == "cpu" else self.identity.device


def _versions() -> dict[str, str]:
    found = {}
    for name in ("fisedit", "torch", "diffusers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its source
            found[name] = "not installed"
    return found


def _write_cache(cache: StepCache, turn: threading.Lock, path: Path) -> str:
    if cache.base is None:
        return write_tensors(path, _stored(cache))
    with turn:  # the values of one call at a time: they are made now
        return write_tensors(path, _computed(cache))


def _stored(cache: StepCache) -> dict[str, Tensor]:
    """What a dense call recorded, as it lies in blocks: values and scales, by slot."""
    found: dict[str, Tensor] = {}
    for value in cache.values.values():
        assert isinstance(value, Kept)
        found |= value.raw()
    return found


def _computed(cache: StepCache) -> dict[str, Tensor]:
    """The whole value of every slot that a call of an edit has: its base's with its own rows in them."""
    on_host = cache.on(torch.device("cpu"))
    slots = dict.fromkeys(slot for step in cache.chain for slot in step.values)
    return {slot: on_host.load(slot) for slot in slots}


def _kinds(cache: StepCache) -> Kinds:
    """What :func:`_write_cache` writes, by kind, that of the dense recording; in the order of its blocks, by which a
    block is told that can be copied in one piece."""
    found: Kinds = {}
    first: dict[str, Value | Overlay] = {}
    for step in cache.chain:
        first |= {slot: value for slot, value in step.values.items() if slot not in first}
    for slot, value in first.items():
        value = value.rows if isinstance(value, Overlay) else value
        assert isinstance(value, Kept)
        of_kind = found.setdefault(value.block.kind, {})
        of_kind[slot] = value.dtype
        if value.quantized and cache.base is None:
            of_kind[SCALE + slot] = value.block.layout.fields[SCALE + slot].dtype
    return found


def _pack_kinds(cache: StepCache) -> dict[str, dict[str, str]]:
    return {kind: {slot: _dtype_name(dtype) for slot, dtype in of.items()} for kind, of in _kinds(cache).items()}


def _unpack_kinds(packed: Mapping[str, Mapping[str, str]]) -> Kinds:
    if unknown := [kind for kind in packed if kind not in get_args(Kind)]:
        raise ValueError(f"{unknown[0]!r} is no kind of values")
    return {cast(Kind, kind): {slot: _dtype(name) for slot, name in of.items()} for kind, of in packed.items()}


def _pack_signature(signature: Signature, packer: Packer) -> dict[str, Any]:
    tensors = [[name, list(shape), _dtype_name(dtype), device] for name, shape, dtype, device in signature.tensors]
    constants = [[name, packer.value(value, name)] for name, value in signature.constants]
    timestep = None if signature.timestep is None else _dtype_name(signature.timestep)
    return {"tensors": tensors, "constants": constants, "timestep": timestep}


def _unpack_signature(packed: Mapping[str, Any], moved: Mapping[str, str], unpacker: Unpacker) -> Signature:
    """The signature of a call that is now made on other devices, by their former names."""
    tensors = tuple(
        (name, tuple(shape), _dtype(dtype), moved.get(device, device))
        for name, shape, dtype, device in packed["tensors"]
    )
    constants = tuple((name, unpacker.value(value)) for name, value in packed["constants"])
    return Signature(tensors, constants, None if packed["timestep"] is None else _dtype(packed["timestep"]))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found
