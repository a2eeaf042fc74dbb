"""Stage 2: the autoencoder, on random crops, with a pixel loss, a multi-scale edge loss and a very small KL term."""

from __future__ import annotations

import copy

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from .architectures import build_vae
from .scenes import render, sample_scenes
from .schedule import Clock, autocast, update_average

CROP = 128
KL_WEIGHT = 2e-4


def edge_loss(output: Tensor, target: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute error of neighbor differences, at several scales of pictures `[B, 3, H, W]`: scalar."""
    total = output.new_zeros(())
    for scale in range(scales):
        if scale:
            output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
        error = output - target
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return total / scales


def train_vae(
    device: torch.device,
    minutes: float,
    scenes: int = 384,
    batch: int = 64,
    seed: int = 2,
    max_steps: int | None = None,
) -> AutoencoderKL:
    """Trains the autoencoder for `minutes` and returns the average of its weights, with its scaling factor set.

    Every `scenes` new scenes give two rounds of crops, `batch` at a time.
    """
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    vae = build_vae().to(device).to(memory_format=torch.channels_last)
    average = copy.deepcopy(vae).requires_grad_(False)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4, fused=fused)
    clock = Clock(minutes, 1.5e-3, max_steps=max_steps)
    while clock.running():
        images = render(sample_scenes(scenes, generator))  # [scenes, 3, 256, 256]
        for crops in _crops(images, batch, generator):
            if not clock.running():
                break
            clock.step(optimizer)
            loss, error = _loss(vae, crops)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
            optimizer.step()
            decay = min(0.998, (clock.steps + 1) / (clock.steps + 10))
            update_average(average, vae, decay)
            if clock.steps % 300 == 1:
                clock.report("vae", batch, loss=loss.detach(), psnr=-10 * torch.log10(error / 4))
    measured = render(sample_scenes(min(scenes, 256), generator))
    average.register_to_config(scaling_factor=_scaling_factor(average, measured))
    return average.eval()


def _crops(images: Tensor, batch: int, generator: torch.Generator) -> list[Tensor]:
    """Cuts two random `CROP`-sided crops from every picture, in batches, in -1..1."""
    last = images.shape[-1] - CROP
    corners = torch.randint(last + 1, (2 * len(images), 2), generator=generator, device=images.device)
    doubled = torch.cat([images, images])
    crops = torch.stack([doubled[i, :, y : y + CROP, x : x + CROP] for i, (y, x) in enumerate(corners.tolist())])
    shuffled = crops[torch.randperm(len(crops), generator=generator, device=images.device)] * 2 - 1
    return list(shuffled.to(memory_format=torch.channels_last).split(batch))


def _loss(vae: AutoencoderKL, target: Tensor) -> tuple[Tensor, Tensor]:
    with autocast(target.device):
        posterior = vae.encode(target).latent_dist
        output = vae.decode(posterior.sample()).sample.float()
    squared = F.mse_loss(output, target)
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    loss = F.l1_loss(output, target) + 2 * squared + edge_loss(output, target) + KL_WEIGHT * kl
    return loss, squared.detach()


@torch.no_grad()
def _scaling_factor(vae: AutoencoderKL, images: Tensor) -> float:
    """One over the standard deviation of the latents, as `StableDiffusionPipeline` wants it."""
    latents = torch.cat([vae.encode(part * 2 - 1).latent_dist.sample() for part in images.split(32)])
    return 1.0 / float(latents.std())


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean over pictures `[B, 3, H, W]` in 0..1 of the peak signal-to-noise ratio of their reconstruction, in dB."""
    ratios = []
    for part in images.split(16):
        output = vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample.clamp(-1, 1) / 2 + 0.5
        ratios.append(-10 * torch.log10((output - part).square().mean((1, 2, 3))))
    return float(torch.cat(ratios).mean())
