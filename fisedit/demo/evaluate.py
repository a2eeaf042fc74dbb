"""Measures the demo model on held-out captions: `python -m fisedit.demo.evaluate`."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from . import image_encoder_path, load_pipeline, model_path
from .captions import PHRASINGS, caption
from .clip import DemoClip
from .scenes import Scene, render, sample_scenes
from .train_unet import DenoisingLoss, build_pool, validation_loss
from .train_vae import reconstruction_psnr

ATTRIBUTES = ("kind", "color", "position", "attachment", "size", "ground", "sky")


def confirmed(clip: DemoClip, images: Tensor, scenes: list[Scene], phrasings: list[int]) -> dict[str, float]:
    """Returns for each attribute the share of questions about it that the pictures `[B, 3, H, W]` confirm.

    Only scenes whose phrasing names sizes are asked about sizes; what is never asked is left out.
    """
    shares = {}
    for attribute in ATTRIBUTES:
        asked = [b for b, p in enumerate(phrasings) if attribute != "size" or p >= PHRASINGS // 2]
        if not asked:
            continue
        answers = clip.confirms(images[asked], [scenes[b] for b in asked], attribute)
        shares[attribute] = sum(answers) / len(answers)
    return shares


@torch.no_grad()
def retrieval_accuracy(clip: DemoClip, images: Tensor, captions: list[str]) -> float:
    """Share of pictures whose own caption is the most similar among all of them."""
    similarity = clip.embed_images(images) @ clip.embed_text(captions).T  # [B, B]
    return float((similarity.argmax(1) == torch.arange(len(images), device=similarity.device)).float().mean())


def generate(
    pipe: StableDiffusionPipeline, captions: list[str], steps: int, guidance: float, seed: int = 0, batch: int = 64
) -> Tensor:
    """Generates one picture per caption, each from its own seed: `[len(captions), 3, 256, 256]` in 0..1 on the CPU."""
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(captions), batch):
        prompts = captions[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(prompts))]
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
        parts.append(pipe(prompts, output_type="pt", **options).images.float().cpu())
    return torch.cat(parts)


def picture_grid(images: Tensor, columns: int) -> Image.Image:
    """Lays pictures `[B, 3, H, W]` in 0..1 out in rows."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    padded = torch.cat([images, images.new_zeros(rows * columns - count, channels, height, width)])
    sheet = padded.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return Image.fromarray((sheet.reshape(rows * height, columns * width, channels) * 255).round().byte().cpu().numpy())


def main(
    output: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path("demo-evaluation.json"),
    folder: Annotated[
        Path | None, typer.Option(help="A training's output folder; the shipped model when left out.")
    ] = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    scenes: Annotated[int, typer.Option(help="Held-out scenes for encoders, autoencoder and loss.")] = 256,
    generated: Annotated[int, typer.Option(help="Pictures to generate from held-out captions.")] = 256,
    steps: int = 30,
    guidance: float = 4.0,
    sheet: Annotated[Path | None, typer.Option(help="Where to write some of the pictures, as PNG.")] = None,
) -> None:
    """Prints and writes the held-out figures of the demo model."""
    where = torch.device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model, encoders = (folder / "model", folder / "image_encoder") if folder else (model_path(), image_encoder_path())
    pipe = load_pipeline(device=where, folder=model)
    clip = DemoClip.load(model, encoders, where)
    drawn = sample_scenes(max(scenes, generated), torch.Generator().manual_seed(2026), "held_out")
    listed = drawn.scenes()
    phrasings = [i % PHRASINGS for i in range(len(listed))]
    captions = [caption(scene, phrasing) for scene, phrasing in zip(listed, phrasings, strict=True)]
    rendered = torch.cat([render(drawn[i : i + 32]) for i in range(0, scenes, 32)])[:scenes].to(where)
    with torch.no_grad():
        pool = build_pool(pipe.vae, pipe.tokenizer, scenes, 99, 0, "held_out", batch=min(scenes, 32))
        objective = DenoisingLoss(pipe.unet, pipe.text_encoder, pipe.tokenizer).to(where)
        figures: dict[str, object] = {
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "held_out_scenes": scenes,
            "retrieval_accuracy": retrieval_accuracy(clip, rendered, captions[:scenes]),
            "rendered_confirmed": confirmed(clip, rendered, listed[:scenes], phrasings[:scenes]),
            "reconstruction_psnr_db": reconstruction_psnr(pipe.vae, rendered),
            "validation_loss": validation_loss(objective, pool),
        }
    if generated:
        images = generate(pipe, captions[:generated], steps, guidance)
        figures |= {"generated": generated, "steps": steps, "guidance": guidance}
        figures["generated_confirmed"] = confirmed(clip, images, listed[:generated], phrasings[:generated])
        if sheet:
            picture_grid(images[:48], 8).save(sheet)
    text = json.dumps(figures, indent=2)
    output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    typer.run(main)
