"""Stage 3: the denoiser, on latents encoded beforehand and frozen text features, on one GPU or several."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from .architectures import build_scheduler, build_unet
from .data import CaptionedScenes, full_length
from .scenes import render
from .schedule import Clock, autocast, update_average
from .tokenizer import MAX_LENGTH

CAPTION_DROPOUT = 0.1


@dataclass
class LatentPool:
    """N encoded scenes on the GPU: `latents` `[N, 4, 64, 64]` half, `ids` `[N, 77]` int16."""

    latents: Tensor
    ids: Tensor

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Returns random latents `[batch, 4, 64, 64]` float32 and their token ids `[batch, 77]` int64."""
        rows = torch.randint(len(self.latents), (batch,), device=self.latents.device)
        return self.latents[rows].float(), self.ids[rows].long()


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Returns sampled, scaled latents `[B, 4, H/4, W/4]` float32 of pictures `[B, 3, H, W]` in 0..1."""
    with autocast(images.device):
        sample = vae.encode((images * 2 - 1).to(memory_format=torch.channels_last)).latent_dist.sample()
    return sample.float() * vae.config.scaling_factor


def build_pool(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    size: int,
    seed: int,
    workers: int,
    split: str = "train",
    batch: int = 128,
) -> LatentPool:
    """Draws, renders and encodes `size` captioned scenes on the autoencoder's device."""
    device = vae.device
    latents = torch.empty(size, 4, 64, 64, dtype=torch.float16, device=device)
    ids = torch.empty(size, MAX_LENGTH, dtype=torch.int16, device=device)
    stream = CaptionedScenes(tokenizer, batch, seed, split=split).stream(workers)
    for start in range(0, size, batch):
        scenes, captions = next(stream)
        stop = min(start + batch, size)
        scenes = scenes.to(device)[: stop - start]
        latents[start:stop] = encode_images(vae, render(scenes)).half()
        ids[start:stop] = full_length(captions[: stop - start, 0], MAX_LENGTH).to(device, torch.int16)
    return LatentPool(latents, ids)


class DenoisingLoss(nn.Module):
    """The v-prediction objective (Salimans and Ho 2022, appendix D) on the demo's noise schedule."""

    empty: Tensor
    alphas_cumprod: Tensor

    def __init__(self, unet: Callable, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        empty = tokenizer("", padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
        self.register_buffer("empty", empty)
        self.register_buffer("alphas_cumprod", build_scheduler().alphas_cumprod)

    def forward(self, latents: Tensor, ids: Tensor, dropout: float = CAPTION_DROPOUT) -> Tensor:
        """Returns the mean squared error of v, float32 scalar, for latents `[B, 4, 64, 64]` and ids `[B, 77]`.

        Timesteps are spread evenly over the batch; a share `dropout` of the captions becomes the empty one.
        """
        count, device = len(latents), latents.device
        dropped = torch.rand(count, 1, device=device) < dropout
        spread = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
        timesteps = (spread * len(self.alphas_cumprod)).long().clamp(max=len(self.alphas_cumprod) - 1)
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        with autocast(device):
            with torch.no_grad():
                features = self.text_encoder(torch.where(dropped, self.empty, ids)).last_hidden_state
            noisy = noisy.to(memory_format=torch.channels_last)
            predicted = self.unet(noisy, timesteps, features, return_dict=False)[0]
        return F.mse_loss(predicted.float(), velocity)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Averages the gradients over all ranks in one all-reduce; does nothing without a process group."""
    if not dist.is_initialized():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)])


@dataclass
class UNetOptions:
    """How stage 3 runs; `save_every` is in seconds, `resume` a `.safetensors` file of averaged weights."""

    minutes: float
    batch: int = 128
    pool: int = 100_000
    workers: int = 8
    seed: int = 3
    learning_rate: float = 8e-4
    compile: bool = True
    save_every: float = 120.0
    resume: Path | None = None
    max_steps: int | None = None


def train_unet(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, options: UNetOptions, output: Path
) -> UNet2DConditionModel:
    """Trains the denoiser and returns the average of its weights; rank 0 also saves that under `output` now and then.

    `minutes` counts from the first step: drawing the pool and compiling come on top.
    """
    device, rank = vae.device, int(os.environ.get("RANK", 0))
    torch.manual_seed(options.seed)
    unet = build_unet().to(device).to(memory_format=torch.channels_last)
    if options.resume:
        unet.load_state_dict({name: value.float() for name, value in load_file(options.resume).items()})
    average = copy.deepcopy(unet).requires_grad_(False)
    torch.manual_seed(options.seed * 100 + rank)
    started = time.monotonic()
    pool = build_pool(vae, tokenizer, options.pool, options.seed * 100 + rank, options.workers)
    print(f"[unet] rank {rank}: {options.pool} scenes encoded in {time.monotonic() - started:.0f} s", flush=True)
    denoiser = torch.compile(unet) if options.compile else unet
    objective = DenoisingLoss(denoiser, text_encoder.requires_grad_(False), tokenizer).to(device)
    objective(*pool.draw(options.batch)).backward()  # compiles before the clock starts
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda")
    clock = Clock(options.minutes, options.learning_rate, warmup_steps=300, max_steps=options.max_steps)
    recent, saved = torch.zeros((), device=device), 0.0
    while clock.steps % 20 or _agree(clock.running(), device):
        clock.step(optimizer)
        loss = objective(*pool.draw(options.batch))
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.999, (clock.steps + 1) / (clock.steps + 10))
        update_average(average, unet, decay)
        recent.lerp_(loss.detach(), 0.01 if clock.steps > 100 else 1.0 / clock.steps)
        if rank == 0 and clock.steps % 200 == 1:
            clock.report("unet", options.batch * _world(), loss=recent)
        if rank == 0 and clock.elapsed - saved > options.save_every:
            saved = clock.elapsed
            save_half(average, output)
    if rank == 0:
        save_half(average, output)
    return average.eval()


def save_half(unet: UNet2DConditionModel, folder: Path) -> None:
    """Saves a half-precision copy in files of at most 16 MB."""
    copy.deepcopy(unet).to(memory_format=torch.contiguous_format).half().save_pretrained(folder, max_shard_size="16MB")


@torch.no_grad()
def validation_loss(objective: DenoisingLoss, pool: LatentPool, batch: int = 64, rounds: int = 4) -> float:
    """Mean v-prediction error over a held-out pool, with captions; noise and timesteps are drawn from a fixed seed."""
    with torch.random.fork_rng(devices=[pool.latents.device] if pool.latents.is_cuda else []):
        torch.manual_seed(0)
        parts = [
            objective(pool.latents[i : i + batch].float(), pool.ids[i : i + batch].long(), dropout=0.0)
            for _ in range(rounds)
            for i in range(0, len(pool.latents), batch)
        ]
    return float(torch.stack(parts).mean())


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _agree(running: bool, device: torch.device) -> bool:
    """Rank 0's answer, on every rank, so that all stop at the same step; costs a synchronisation."""
    if not dist.is_initialized():
        return running
    answer = torch.tensor(int(running), device=device)
    dist.broadcast(answer, 0)
    return bool(answer)
