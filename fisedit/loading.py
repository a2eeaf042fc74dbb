"""Load pipelines from local folders, with no network and no noise from the libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fisedit.config import CompileConfig
from fisedit.errors import ModelNotFoundError, UnavailableDeviceError, UnreadableModelError, UnsupportedDtypeError
from fisedit.pipeline import EditPipeline


def load_editor(
    model: Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    config: CompileConfig | None = None,
) -> EditPipeline:
    """An :class:`EditPipeline` over the pipeline in a diffusers folder.

    Args:
        model: the folder; ``None`` takes the demo model.
        device: ``None`` takes a GPU if there is one.
        dtype: ``None`` takes float16 on a GPU and float32 on a CPU.

    Raises:
        ModelNotFoundError: the folder holds no diffusers pipeline.
        UnreadableModelError: its pipeline cannot be loaded.
        UnsupportedPipelineError: it has no U-Net or no tokenizer.
        UnavailableDeviceError: there is no such device.
        UnsupportedDtypeError: float16 on a CPU.
    """
    from fisedit.demo import model_path

    folder = model or model_path()
    if not (folder / "model_index.json").is_file():
        raise ModelNotFoundError(folder=str(folder))
    where = _device(device)
    if where.type == "cpu" and dtype == torch.float16:
        raise UnsupportedDtypeError(dtype="float16", device="cpu", supported=("float32", "bfloat16"))
    pipe = _load_pipeline(folder).to(where, dtype or (torch.float32 if where.type == "cpu" else torch.float16))
    pipe.set_progress_bar_config(disable=None)  # no bar where the output is no terminal
    return EditPipeline(pipe, config)


def available_devices() -> list[str]:
    """The devices that torch can compute on here, such as ``["cpu", "cuda:0", "cuda:1"]``."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu", *(f"{found.type}:{i}" for i in range(torch.accelerator.device_count()))] if found else ["cpu"]


def _device(name: str | None) -> torch.device:
    """The device of that name; without one, a GPU if there is one."""
    available = available_devices()
    if name is None:
        return torch.device(available[-1].split(":")[0])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnavailableDeviceError(device=name, available=available) from error
    index = "" if device.type == "cpu" else f":{device.index or 0}"
    if f"{device.type}{index}" not in available:
        raise UnavailableDeviceError(device=name, available=available)
    return device


def _load_pipeline(folder: Path) -> Any:
    hush_libraries()
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged folder fails in as many ways as it has files
        reason = f"{type(error).__name__}: {error}".strip(" .")
        raise UnreadableModelError(folder=str(folder), reason=reason) from error


def hush_libraries() -> None:
    """Only errors from diffusers and transformers, and no bars while they load."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
