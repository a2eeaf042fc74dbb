"""Trains the demo model from nothing: `python -m fisedit.demo.train`.

Each stage writes its part under the output folder and reads what it needs of the earlier ones from there, so the
stages can run one by one, and the first two side by side on two GPUs. The denoiser trains on several GPUs under
`torchrun --nproc-per-node=N -m fisedit.demo.train --stage unet`.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from .architectures import build_scheduler
from .clip import DemoClip
from .tokenizer import build_tokenizer
from .train_clip import train_clip, train_judge
from .train_unet import UNetOptions, train_unet
from .train_vae import train_vae


class Stage(StrEnum):
    """What to train."""

    CLIP = "clip"
    JUDGE = "judge"
    VAE = "vae"
    UNET = "unet"
    ALL = "all"


def run_clip(
    model: Path, clip: Path, device: torch.device, minutes: float, batch: int, workers: int, max_steps: int | None
) -> None:
    """Trains the encoders and writes `model/tokenizer`, `model/text_encoder` and `image_encoder`."""
    tokenizer = build_tokenizer(model / "tokenizer")
    trained = train_clip(tokenizer, device, minutes, batch=batch, workers=workers, max_steps=max_steps)
    trained.save_image_side(clip)
    trained.text_encoder.half().save_pretrained(model / "text_encoder")


def run_judge(
    model: Path, clip: Path, device: torch.device, minutes: float, batch: int, workers: int, max_steps: int | None
) -> None:
    """Trains the image encoder further, against the text encoder in `model` as it is."""
    trained = train_judge(
        DemoClip.load(model, clip, device), minutes, batch=batch, workers=workers, max_steps=max_steps
    )
    trained.save_image_side(clip)


def run_vae(model: Path, device: torch.device, minutes: float, batch: int, max_steps: int | None) -> None:
    """Trains the autoencoder and writes `model/vae`."""
    vae = train_vae(device, minutes, scenes=6 * batch, batch=batch, max_steps=max_steps)
    vae.to(memory_format=torch.contiguous_format).half().save_pretrained(model / "vae")


def run_unet(model: Path, device: torch.device, options: UNetOptions) -> None:
    """Trains the denoiser on the parts in `model` and writes `model/unet` and the pipeline's index."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer", local_files_only=True)
    text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder", local_files_only=True, dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(model / "vae", local_files_only=True, dtype=torch.float32)
    vae.requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    train_unet(vae, text_encoder.to(device).eval(), tokenizer, options, model / "unet")


def write_index(model: Path) -> None:
    """Writes the scheduler's configuration and `model_index.json`, which make the folder a diffusers pipeline."""
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(model / "vae", local_files_only=True),
        text_encoder=CLIPTextModel.from_pretrained(model / "text_encoder", local_files_only=True),
        tokenizer=CLIPTokenizer.from_pretrained(model / "tokenizer", local_files_only=True),
        unet=UNet2DConditionModel.from_pretrained(model / "unet", local_files_only=True),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.scheduler.save_pretrained(model / "scheduler")
    pipe.save_config(model)


def main(
    stage: Annotated[Stage, typer.Option(help="What to train; `all` is one after the other.")] = Stage.ALL,
    output: Annotated[Path, typer.Option(help="Folder for `model` and `image_encoder`.")] = Path("demo-training"),
    clip_minutes: Annotated[float, typer.Option(help="Time for the text and image encoders.")] = 2.5,
    judge_minutes: Annotated[float, typer.Option(help="More time for the image encoder alone.")] = 2.5,
    vae_minutes: Annotated[float, typer.Option(help="Time for the autoencoder.")] = 2.5,
    unet_minutes: Annotated[
        float, typer.Option(help="Time for the denoiser, drawing scenes and compiling not counted.")
    ] = 12.5,
    device: Annotated[str, typer.Option(help="Where to train; under torchrun, each rank takes its own GPU.")] = "cuda",
    resume: Annotated[Path | None, typer.Option(help="Averaged U-Net weights (.safetensors) to go on from.")] = None,
    clip_batch: int = 512,
    vae_batch: int = 64,
    unet_batch: Annotated[int, typer.Option(help="Per GPU.")] = 128,
    pool: Annotated[int, typer.Option(help="Encoded scenes per GPU that the denoiser trains on.")] = 120_000,
    workers: Annotated[int, typer.Option(help="Processes that make captions, per GPU.")] = 8,
    compile_unet: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the denoiser.")] = True,
    max_steps: Annotated[int | None, typer.Option(help="Stop every stage after this many steps.")] = None,
) -> None:
    """Trains the demo model: encoders contrastively, then the autoencoder, then the denoiser."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    where = torch.device(device)
    if "LOCAL_RANK" in os.environ:
        if where.type == "cuda":
            where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(where)
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    model, clip = output / "model", output / "image_encoder"
    if stage in (Stage.CLIP, Stage.ALL):
        run_clip(model, clip, where, clip_minutes, clip_batch, workers, max_steps)
    if stage in (Stage.JUDGE, Stage.ALL):
        run_judge(model, clip, where, judge_minutes, clip_batch, workers, max_steps)
    if stage in (Stage.VAE, Stage.ALL):
        run_vae(model, where, vae_minutes, vae_batch, max_steps)
    if stage in (Stage.UNET, Stage.ALL):
        options = UNetOptions(
            unet_minutes, unet_batch, pool, workers, compile=compile_unet, resume=resume, max_steps=max_steps
        )
        run_unet(model, where, options)
        if int(os.environ.get("RANK", 0)) == 0:
            write_index(model)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
