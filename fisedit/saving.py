"""Recordings in folders: JSON and safetensors, read by mapping, so that an edit reads only what it needs.

A recorded edit is written whole, by value, as if it had no base: a folder depends on no other, and what its base holds
besides is not kept. Feature maps take the disk space that a dense recording of the run takes in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisedit.capture import Signature
from fisedit.errors import CacheReadError
from fisedit.identity import ModelIdentity
from fisedit.manifest import MANIFEST, WriteFile, read_folder, verify_folder, write_folder
from fisedit.packing import VALUES, Packer, Unpacker
from fisedit.recording import RecordedCall, Recording
from fisedit.runtime.cache.disk import open_tensors, write_tensors
from fisedit.runtime.cache.store import StepCache
from fisedit.runtime.timing import Span


def save_recording(identity: ModelIdentity, recording: Recording, folder: Path | str, overwrite: bool = False) -> None:
    """Write a recording; see :meth:`Recording.save`."""
    packer = Packer()
    content, files = pack_recording(identity, recording, packer)
    write_folder(Path(folder), content, files | packer.files(), overwrite)


def load_recording(identity: ModelIdentity, folder: Path | str, verify: bool = True) -> Recording:
    """A recording that was saved, alone or with a generation; see :meth:`CompiledUNet.load_recording`."""
    saved = SavedFolder(Path(folder), identity, verify)
    return saved.read(saved.recording)


def pack_recording(
    identity: ModelIdentity, recording: Recording, packer: Packer
) -> tuple[dict[str, Any], dict[str, WriteFile]]:
    """A recording as content of a manifest, and what writes its feature maps, a file for each call.

    Raises:
        ForeignRecordingError, SessionClosedError, IncompleteRecordingError: it is not the model's, or not whole.
        UnreadableWeightsError.
    """
    identity.check_savable(recording)
    signatures: dict[Signature, int] = {}
    calls: list[dict[str, Any]] = []
    files: dict[str, WriteFile] = {}
    for number, ((timestep, occurrence), call) in enumerate(recording.calls.items()):
        file = f"call-{number:04}.safetensors"
        files[file] = partial(_write_cache, call.cache)
        calls.append({
            "timestep": timestep, "occurrence": occurrence, "file": file, "seconds": call.seconds, "batch": call.batch,
            "signature": signatures.setdefault(call.signature, len(signatures)), "graph": call.graph,
            "sample": packer.tensor(call.sample, f"sample-{number}"),
            "text": None if call.text is None else packer.tensor(call.text, f"text-{number}"),
            "outputs": [packer.tensor(output, f"output-{number}-{n}") for n, output in enumerate(call.outputs)],
        })  # fmt: skip
    kept = {
        "calls": calls,
        "signatures": [_pack_signature(signature, packer) for signature in signatures],
        "latents": [packer.tensor(latent, f"latents-{n}") for n, latent in enumerate(recording.latents)],
        "corrections": [packer.tensor(each, f"correction-{n}") for n, each in enumerate(recording.corrections)],
        "device": str(next(iter(recording.calls.values())).sample.device),
    }
    return {"versions": _versions(), "model": identity.facts(), "recording": kept}, files


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

    def recording(self) -> Recording:
        """The recording, as the model's own. Its feature maps are mapped from their files, its other tensors copied."""
        kept, device, identity = self.content["recording"], self.identity.device, self.identity
        moved = {kept["device"]: str(device)}
        signatures = [_unpack_signature(packed, moved, self.unpacker) for packed in kept["signatures"]]
        tensor = partial(self.unpacker.tensor, device=device)
        recording = Recording(identity.owner, identity.name, identity.state, complete=True)
        for call in kept["calls"]:
            sample = tensor(call["sample"])
            recording.calls[float(call["timestep"]), int(call["occurrence"])] = RecordedCall(
                _restore_cache(len(sample), open_tensors(self.folder / call["file"]), device),
                sample,
                None if call["text"] is None else tensor(call["text"]),
                [tensor(name) for name in call["outputs"]],
                Span.of(call["seconds"]),
                signatures[call["signature"]],
                int(call["batch"]),
                call["graph"],
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


def _write_cache(cache: StepCache, path: Path) -> str:
    return write_tensors(path, _cache_values(cache))


def _cache_values(cache: StepCache) -> dict[str, Tensor]:
    """The whole value of every slot that a call recorded, on the CPU: those of its base with its own rows in them."""
    steps = [cache]
    while steps[-1].base is not None:
        steps.append(steps[-1].base)
    slots = dict.fromkeys(slot for step in steps for slot in step.values)
    return {slot: cache.load(slot).detach().cpu() for slot in slots}


def _restore_cache(batch: int, tensors: Mapping[str, Tensor], device: torch.device) -> StepCache:
    """A cache of these whole values. On a CPU they stay mapped, elsewhere they are moved there now."""
    return StepCache(batch, {slot: tensor.to(device) for slot, tensor in tensors.items()})


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
