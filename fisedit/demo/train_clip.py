"""Stage 1: text and image encoders, contrastively, with captions that are wrong in one attribute as hard negatives.

`train_clip` trains both; `train_judge` goes on with the image side alone, so that the text features, which the
denoiser is trained on, stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from .architectures import build_clip
from .clip import IMAGE_SIZE, DemoClip
from .data import CaptionedScenes
from .scenes import render
from .schedule import Clock, autocast

NEGATIVES = 6


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's symmetric loss (Radford et al. 2021, figure 3), each picture also against its own hard negatives.

    `images` `[B, D]` and `texts` `[B, 1 + K, D]` have unit length; `texts[:, 0]` are the true captions. Returns the
    loss and the share of pictures that prefer their own caption over all its hard negatives, both scalars.
    """
    target = torch.arange(len(images), device=images.device)
    across = scale * images @ texts[:, 0].T  # [B, B]
    own = scale * torch.einsum("bd,bkd->bk", images, texts)  # [B, 1 + K]
    image_loss = F.cross_entropy(torch.cat([across, own[:, 1:]], 1), target)
    hard_loss = F.cross_entropy(own, torch.zeros_like(target))
    loss = 0.5 * image_loss + 0.5 * F.cross_entropy(across.T, target) + hard_loss
    return loss, (own.argmax(1) == 0).float().mean()


def train_clip(
    tokenizer: CLIPTokenizer, device: torch.device, minutes: float, batch: int = 512, workers: int = 8, seed: int = 1,
    max_steps: int | None = None,
) -> DemoClip:  # fmt: skip
    """Trains both encoders for `minutes` and returns them."""
    torch.manual_seed(seed)
    model = build_clip(tokenizer).to(device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=device.type == "cuda")
    stream = CaptionedScenes(tokenizer, batch, seed, NEGATIVES).stream(workers)
    clock = Clock(minutes, 1e-3, warmup_steps=300, max_steps=max_steps)
    while clock.running():
        scenes, ids = next(stream)
        images = augment(render(scenes.to(device), IMAGE_SIZE))
        clock.step(optimizer)
        with autocast(device):
            image_embeds, text_embeds = _embed(model, images, ids.to(device))
        loss, accuracy = contrastive_loss(image_embeds, text_embeds, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)
        if clock.steps % 200 == 1:
            clock.report("clip", batch, loss=loss.detach(), hard_accuracy=accuracy)
    return DemoClip.from_model(model.eval(), tokenizer)


def train_judge(
    clip: DemoClip, minutes: float, batch: int = 512, workers: int = 8, seed: int = 4, max_steps: int | None = None
) -> DemoClip:
    """Trains image encoder and text projection for `minutes` more, the text encoder frozen; changes `clip` in place."""
    torch.manual_seed(seed)
    device = clip.device
    projection = nn.Parameter(clip.text_projection.float())
    log_scale = nn.Parameter(torch.tensor(3.4, device=device))
    parameters = [*clip.image_encoder.train().parameters(), projection, log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda")
    stream = CaptionedScenes(clip.tokenizer, batch, seed, NEGATIVES, all_kinds=True).stream(workers)
    clock = Clock(minutes, 6e-4, warmup_steps=200, max_steps=max_steps)
    while clock.running():
        scenes, ids = next(stream)
        images = augment(render(scenes.to(device), IMAGE_SIZE))
        clock.step(optimizer)
        with autocast(device):
            with torch.no_grad():
                pooled = clip.text_encoder(ids.to(device).flatten(0, 1)).pooler_output  # [B * (1 + K), 192]
            image_embeds = F.normalize(clip.image_encoder(images).image_embeds.float(), dim=-1)
        text_embeds = F.normalize(pooled.float() @ projection.T, dim=-1).view(*ids.shape[:2], -1)
        loss, accuracy = contrastive_loss(image_embeds, text_embeds, log_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if clock.steps % 200 == 1:
            clock.report("judge", batch, loss=loss.detach(), hard_accuracy=accuracy)
    clip.text_projection = projection.detach()
    clip.image_encoder.eval()
    return clip


def augment(images: Tensor) -> Tensor:
    """Turns pictures in 0..1 into the encoder's -1..1 with noise and changes of brightness that no caption names."""
    shape = (len(images), 1, 1, 1)
    noise = torch.randn_like(images) * (0.08 * torch.rand(shape, device=images.device))
    gain = 0.92 + 0.16 * torch.rand(shape, device=images.device)
    return (images * gain + noise).clamp(0, 1) * 2 - 1


def _embed(model: CLIPModel, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    pooled = model.vision_model(images).pooler_output  # [B, 192]
    image_embeds = F.normalize(model.visual_projection(pooled).float(), dim=-1)
    texts = model.text_model(ids.flatten(0, 1)).pooler_output  # [B * (1 + K), 192]
    text_embeds = F.normalize(model.text_projection(texts).float(), dim=-1)
    return image_embeds, text_embeds.view(*ids.shape[:2], -1)
