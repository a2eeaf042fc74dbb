"""Training data: endless streams of captioned scenes, made by worker processes and rendered on the training device."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import CLIPTokenizer

from .captions import PHRASINGS, alternatives, caption, hard_negatives
from .scenes import SceneBatch, sample_scenes
from .tokenizer import WordEncoder

CAPTION_LENGTH = 48
"""Tokens kept of a caption where nothing after its end is looked at; the longest caption has 45."""


class CaptionedScenes(IterableDataset):
    """Endless batches of `(SceneBatch, ids)` from the training split.

    `ids` is int64 `[B, 1 + K, CAPTION_LENGTH]`: the true caption in a random phrasing, then captions in the
    same phrasing that are wrong in one attribute. With `all_kinds`, 11 more of those follow: one object as every other
    kind in turn.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        batch: int,
        seed: int,
        negatives: int = 0,
        split: str = "train",
        all_kinds: bool = False,
    ) -> None:
        self.encode = WordEncoder(tokenizer)
        self.batch, self.seed, self.negatives, self.split, self.all_kinds = batch, seed, negatives, split, all_kinds

    def __iter__(self) -> Iterator[tuple[SceneBatch, Tensor]]:
        info = get_worker_info()
        torch.set_num_threads(1)
        seed = self.seed * 1000 + (info.id if info else 0)
        generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        while True:
            batch = sample_scenes(self.batch, generator, self.split)
            texts = []
            for scene in batch.scenes():
                phrasing = rng.randrange(PHRASINGS)
                wrong = hard_negatives(scene, self.negatives, rng, sized=phrasing >= PHRASINGS // 2)
                if self.all_kinds:
                    wrong += alternatives(scene, "kind", rng.randrange(len(scene.objects)))[1:]
                texts += [caption(each, phrasing) for each in (scene, *wrong)]
            yield batch, self.encode(texts, CAPTION_LENGTH).view(self.batch, -1, CAPTION_LENGTH)

    def stream(self, workers: int) -> Iterator[tuple[SceneBatch, Tensor]]:
        """Iterates with `workers` processes."""
        return iter(DataLoader(self, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None))


def full_length(ids: Tensor, length: int) -> Tensor:
    """Pads token ids `[..., CAPTION_LENGTH]` with their last one (the end token) to `[..., length]`."""
    return torch.cat([ids, ids[..., -1:].expand(*ids.shape[:-1], length - ids.shape[-1])], -1)
