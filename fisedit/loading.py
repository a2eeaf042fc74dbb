"""Load pipelines from local folders, with no network and no noise from the libraries."""

from __future__ import annotations

from pathlib import Path

import torch

from fisedit.config import CompileConfig
from fisedit.errors import ModelNotFoundError
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
    """
    from fisedit.demo import model_path

    folder = model or model_path()
    if not (folder / "model_index.json").is_file():
        raise ModelNotFoundError(folder=str(folder))
    hush_libraries()
    from diffusers import DiffusionPipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.float16)
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=None)  # no bar where the output is no terminal
    return EditPipeline(pipe.to(device, dtype), config)


def hush_libraries() -> None:
    """Only errors from diffusers and transformers, and no bars while they load."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
