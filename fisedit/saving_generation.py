"""Generations in folders: a recording, and all that an edit of it needs of its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from fisedit.errors import NotRecordedError, RecordingMismatchError, SavedBaseMismatchError, UnsavableSettingError
from fisedit.identity import ModelIdentity
from fisedit.inversion import leading_back
from fisedit.manifest import write_folder
from fisedit.packing import Packer, Unpacker
from fisedit.results import Editor, Generation
from fisedit.sampling import Run, same, scheduler_differences
from fisedit.saving import MakeTiers, SavedFolder, held_for_saving, pack_recording


def save_generation(identity: ModelIdentity, base: Generation, folder: Path | str, overwrite: bool) -> None:
    """Write a generation, or an edit, to a folder; see :meth:`EditPipeline.save`."""
    if base.recording is None:
        raise NotRecordedError
    packer = Packer()
    with held_for_saving(identity, base.recording):
        content, files = pack_recording(identity, base.recording, packer)
        content["generation"] = {
            "prompt": base.prompt,
            "images": [packer.value(image, f"images[{number}]") for number, image in enumerate(base.images)],
            "seconds": base.seconds,
            "run": _pack_run(base.run, packer),
            "pipeline": _describe(base.pipeline.pipe),
        }
        write_folder(Path(folder), content, files | packer.files(), overwrite)


def load_generation(
    identity: ModelIdentity, tiers: MakeTiers, editor: Editor, folder: Path | str, *, verify: bool,
    any_scheduler: bool, settings: Mapping[str, Any],
) -> Generation:  # fmt: skip
    """A generation that was saved; see :meth:`EditPipeline.load`."""
    saved = SavedFolder(Path(folder), identity, verify)
    if "generation" not in saved.content:
        differences = {"what": ("recording.save(), for unet.load_recording()", "what generation.save() wrote")}
        raise SavedBaseMismatchError(folder=str(folder), differences=differences)
    kept = saved.content["generation"]
    run = saved.read(lambda: _unpack_run(kept["run"], saved.unpacker, identity.device))
    differences = saved.read(lambda: _differences(kept["pipeline"], run, editor.pipe, identity.device, any_scheduler))
    try:
        run.with_settings(editor.pipe, settings)
    except RecordingMismatchError as error:
        differences |= error.differences
    if differences:
        raise SavedBaseMismatchError(folder=str(folder), differences=differences)
    recording = saved.read(lambda: saved.recording(tiers))
    images = saved.read(lambda: [saved.unpacker.value(image) for image in kept["images"]])
    return saved.read(lambda: Generation(str(kept["prompt"]), images, recording, run, float(kept["seconds"]), editor))


def _pack_run(run: Run, packer: Packer) -> dict[str, Any]:
    return {
        "settings": {name: packer.value(value, name) for name, value in run.settings.items()},
        "state": packer.tensor(run.state, "state of the generator"),
        "device": str(run.device),
        "scheduler": _pack_scheduler(run.scheduler, packer),
        "latents": None if run.latents is None else packer.tensor(run.latents, "first latents"),
    }


def _unpack_run(packed: Mapping[str, Any], unpacker: Unpacker, device: torch.device) -> Run:
    latents, drawn = packed["latents"], torch.device(packed["device"])
    return Run(
        {name: unpacker.value(value) for name, value in packed["settings"].items()},
        unpacker.tensor(packed["state"], torch.device("cpu")),
        device if drawn.type == device.type else drawn,
        _unpack_scheduler(packed["scheduler"], unpacker),
        None if latents is None else unpacker.tensor(latents, device),
    )


def _pack_scheduler(scheduler: Any, packer: Packer) -> dict[str, Any]:
    """A scheduler's class name and config, from which it is made again.

    Raises:
        UnsavableSettingError: it is no class of diffusers, or its noise schedule was changed after it was made.
    """
    kind = type(scheduler)
    allowed = "a scheduler of diffusers, as its config makes it"
    if getattr(diffusers, kind.__name__, None) is not kind:
        raise UnsavableSettingError(setting="scheduler", given=f"a {kind.__name__} of your own", allowed=allowed)
    again = kind.from_config(scheduler.config)
    for name in ("betas", "alphas_cumprod"):
        if not same(getattr(scheduler, name, None), getattr(again, name, None)):
            given = f"a {kind.__name__} whose {name} were changed"
            raise UnsavableSettingError(setting="scheduler", given=given, allowed=allowed)
    return {"class": kind.__name__, "config": packer.value(dict(scheduler.config), "scheduler.config")}


def _unpack_scheduler(packed: Mapping[str, Any], unpacker: Unpacker) -> Any:
    kind = getattr(diffusers, str(packed["class"]), None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise ValueError(f"{packed['class']!r} is no scheduler of diffusers")
    return kind.from_config(unpacker.value(packed["config"]))  # type: ignore[attr-defined]


def _describe(pipe: Any) -> dict[str, Any]:
    return {"pipeline": type(pipe).__name__, "vae_scale_factor": getattr(pipe, "vae_scale_factor", None)}


def _differences(
    saved: Mapping[str, Any], run: Run, pipe: Any, device: torch.device, any_scheduler: bool
) -> dict[str, tuple[Any, Any]]:
    """What of a pipeline is not as it was when a run was saved: name -> (as saved, here)."""
    here = _describe(pipe)
    differences = {name: (saved[name], here[name]) for name in here if saved[name] != here[name]}
    if run.device.type not in ("cpu", device.type):
        differences["device of the generator"] = (str(run.device), f"a model on {device}")
    if not any_scheduler:
        # An inverted picture has a DDIM of its own, over the noise schedule of the pipeline's.
        inverted = run.latents is not None and "beta_schedule" in pipe.scheduler.config
        differences |= scheduler_differences(run.scheduler, leading_back(pipe) if inverted else pipe.scheduler)
    return differences
