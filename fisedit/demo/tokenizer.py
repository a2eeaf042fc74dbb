"""The demo model's tokenizer: CLIP's byte-level BPE, with merges that make every scene word one token."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from .vocabulary import scene_words

MAX_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
_WORD = re.compile(r"[a-z]+|,")


def byte_alphabet() -> list[str]:
    """Returns the 256 printable characters that stand for the bytes, in CLIP's (GPT-2's) order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Returns BPE merges, in rank order, under which each of `words` becomes one token.

    A merge added for a later word never changes an earlier one: BPE takes the lowest rank first, and the earlier word
    always has one of its own left until it is whole.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        while len(pieces := segment(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    return merges


def segment(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Returns the BPE pieces of a word of ASCII letters (the last one carries `</w>`)."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    pieces = [*word[:-1], word[-1] + "</w>"]
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False)) if pair in ranks]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes the tokenizer's files into `folder` and returns it loaded from there."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = byte_alphabet()
    merges = learn_merges(scene_words())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        unk_token=END, bos_token=START, eos_token=END, pad_token=END, model_max_length=MAX_LENGTH,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


class WordEncoder:
    """Encodes captions by looking their words up, many times faster than the tokenizer and equal to it on them."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        vocab = tokenizer.get_vocab()
        self.ids = {word: vocab[word + "</w>"] for word in scene_words()}
        self.start, self.end = vocab[START], vocab[END]

    def __call__(self, captions: list[str], length: int = MAX_LENGTH) -> Tensor:
        """Returns the padded token ids: int64 `[len(captions), length]`.

        Raises KeyError for a word that no scene caption contains, ValueError for a caption that does not fit.
        """
        rows = []
        for text in captions:
            ids = [self.start, *(self.ids[word] for word in _WORD.findall(text)), self.end]
            if len(ids) > length:
                raise ValueError(f"caption has {len(ids)} tokens, expected at most {length}: {text!r}")
            rows.append(ids + [self.end] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.long)
