"""The small CLIP of the demo model: embeds pictures and captions, and tells which caption a picture confirms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from .captions import alternatives, caption
from .scenes import Scene

IMAGE_SIZE = 128
"""Side of the pictures that the image encoder looks at; larger ones are averaged down to it."""


def prepare_images(images: Tensor) -> Tensor:
    """Turns pictures `[B, 3, H, W]` in 0..1 into the image encoder's input: `[B, 3, 128, 128]` in -1..1."""
    if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
        images = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="area")
    return images * 2 - 1


@dataclass
class DemoClip:
    """Text and image encoders with a shared embedding space.

    `text_projection` is `[128, 192]`, `text_encoder` the one that the U-Net reads.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    text_projection: Tensor
    image_encoder: CLIPVisionModelWithProjection

    @staticmethod
    def from_model(model: CLIPModel, tokenizer: CLIPTokenizer) -> DemoClip:
        """Takes a trained `CLIPModel` apart; the parts share its weights."""
        vision = CLIPVisionModelWithProjection(model.config.vision_config)
        vision.vision_model.load_state_dict(model.vision_model.state_dict())
        vision.visual_projection.load_state_dict(model.visual_projection.state_dict())
        projection = model.text_projection.weight.detach()
        return DemoClip(tokenizer, model.text_model.eval(), projection, vision.to(projection.device).eval())

    def save_image_side(self, folder: Path) -> None:
        """Writes the image encoder and the text projection into `folder`, in half precision."""
        self.image_encoder.half().save_pretrained(folder)
        save_file({"weight": self.text_projection.half().cpu().contiguous()}, folder / "text_projection.safetensors")

    @staticmethod
    def load(model_folder: Path, image_encoder_folder: Path, device: str | torch.device = "cpu") -> DemoClip:
        """Loads the encoders in float32 from the pipeline's folder and the image side's folder; no network."""
        tokenizer = CLIPTokenizer.from_pretrained(model_folder / "tokenizer", local_files_only=True)
        text = CLIPTextModel.from_pretrained(model_folder / "text_encoder", local_files_only=True, dtype=torch.float32)
        vision = CLIPVisionModelWithProjection.from_pretrained(
            image_encoder_folder, local_files_only=True, dtype=torch.float32
        )
        projection = load_file(image_encoder_folder / "text_projection.safetensors")["weight"].float()
        return DemoClip(tokenizer, text.to(device).eval(), projection.to(device), vision.to(device).eval())

    @property
    def device(self) -> torch.device:
        """Where the encoders live."""
        return self.text_projection.device

    @torch.no_grad()
    def embed_text(self, captions: list[str]) -> Tensor:
        """Returns unit-length embeddings of captions: float32 `[len(captions), 128]`."""
        ids = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt").input_ids.to(self.device)
        pooled = self.text_encoder(ids).pooler_output  # [N, 192]
        return F.normalize(pooled.float() @ self.text_projection.T.float(), dim=-1)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Returns unit-length embeddings of pictures `[B, 3, H, W]` in 0..1: float32 `[B, 128]`."""
        return F.normalize(self.image_encoder(prepare_images(images.to(self.device))).image_embeds.float(), dim=-1)

    def confirms(self, images: Tensor, scenes: list[Scene], attribute: str) -> list[bool]:
        """Says for every object of every picture whether its `attribute` is seen as the scene has it.

        The scene's caption competes with the same caption in which that attribute has every other value in turn; the
        picture confirms it when the true caption is the most similar one. "ground" and "sky" give one answer a scene.
        """
        embedded = self.embed_images(images)  # [B, 128]
        questions: list[tuple[int, list[str]]] = []
        for b, scene in enumerate(scenes):
            for index in range(1 if attribute in ("ground", "sky") else len(scene.objects)):
                questions.append((b, [caption(s, 6) for s in alternatives(scene, attribute, index)]))
        texts = self.embed_text([text for _, options in questions for text in options])
        answers, start = [], 0
        for b, options in questions:
            similarity = texts[start : start + len(options)] @ embedded[b]
            answers.append(bool(similarity.argmax() == 0))
            start += len(options)
        return answers
