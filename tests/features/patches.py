"""Stand-ins for what other libraries do to a U-Net, each in the way that it does it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class DeepCache:
    """As DeepCache's helper: ``forward`` of the blocks is replaced by closures that, in most steps, give back what the
    block computed in the last full step; ``forward`` of the U-Net by one that counts the steps."""

    def __init__(self, unet: nn.Module, blocks: list[nn.Module], interval: int = 3) -> None:
        self.unet, self.blocks, self.interval = unet, blocks, interval
        self.step, self.start = -1, 0
        self.cached: dict[int, Any] = {}
        self.originals: dict[int, Any] = {}

    def enable(self) -> None:
        original = self.unet.forward

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.step += 1
            return original(*args, **kwargs)

        self.unet.forward = counting
        for number, block in enumerate(self.blocks):
            self._wrap(number, block)

    def _wrap(self, number: int, block: nn.Module) -> None:
        self.originals[number] = block.forward

        def cached(*args: Any, **kwargs: Any) -> Any:
            if (self.step - self.start) % self.interval == 0:
                self.cached[number] = self.originals[number](*args, **kwargs)
            return self.cached[number]

        block.forward = cached

    def disable(self) -> None:
        del self.unet.forward
        for block in self.blocks:
            del block.forward


GLOBAL_CACHE: dict[str, Tensor] = {}


def cache_globally(module: nn.Module) -> None:
    """A class exchanged for one that keeps its first output in a global variable and gives it back ever after."""

    class Caching(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if "output" not in GLOBAL_CACHE:
                GLOBAL_CACHE["output"] = super().forward(*args, **kwargs)
            return GLOBAL_CACHE["output"]

    module.__class__ = Caching


def merge_tokens(unet: nn.Module, ratio: float = 0.5, random: bool = False) -> None:
    """As ToMe does it: transformer blocks get another class, whose self-attention sees merged tokens; a hook on the
    U-Net keeps the latent's size in a dict that all of them share."""
    info: dict[str, Any] = {"size": None, "ratio": ratio, "random": random}

    def note_size(module: nn.Module, args: Any, kwargs: Any) -> None:
        info["size"] = tuple((args[0] if args else kwargs["sample"]).shape[-2:])

    unet.register_forward_pre_hook(note_size, with_kwargs=True)
    for block in list(unet.modules()):
        if type(block).__name__ == "BasicTransformerBlock":
            block.__class__ = _merging(type(block))
            block.info = info


def _merging(original: type) -> type:
    class Merging(original):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any) -> Tensor:
            normed = self.norm1(hidden_states)
            merge, unmerge = bipartite_matching(normed, self.info)
            hidden_states = unmerge(self.attn1(merge(normed))) + hidden_states
            hidden_states = self.attn2(self.norm2(hidden_states), encoder_hidden_states) + hidden_states
            return self.ff(self.norm3(hidden_states)) + hidden_states

    return Merging


def bipartite_matching(metric: Tensor, info: dict[str, Any]) -> tuple[Any, Any]:
    """Merge ``ratio`` of the tokens into their most similar destination, one destination in every 2x2 square."""
    batch, count, channels = metric.shape
    down = math.isqrt(info["size"][0] * info["size"][1] // count)  # the level's, from the number of its tokens
    height, width = (math.ceil(size / down) for size in info["size"])
    with torch.no_grad():
        choice = torch.zeros(height // 2, width // 2, 1, dtype=torch.int64, device=metric.device)
        if info["random"]:
            choice = torch.randint(4, (height // 2, width // 2, 1), device=metric.device)
        squares = torch.zeros(height // 2, width // 2, 4, dtype=torch.int64, device=metric.device)
        squares = squares.scatter(2, choice, -torch.ones_like(choice))
        marks = squares.view(height // 2, width // 2, 2, 2).transpose(1, 2).reshape(1, -1, 1)
        order = marks.argsort(dim=1, stable=True)
        destinations = count // 4
        b_index, a_index = order[:, :destinations], order[:, destinations:]

        def split(x: Tensor) -> tuple[Tensor, Tensor]:
            c = x.shape[-1]
            source = x.gather(1, a_index.expand(batch, count - destinations, c))
            return source, x.gather(1, b_index.expand(batch, destinations, c))

        normed = metric / metric.norm(dim=-1, keepdim=True)
        a, b = split(normed)
        removed = min(a.shape[1], int(count * info["ratio"]))
        best, best_index = (a @ b.transpose(-1, -2)).max(dim=-1)
        edges = best.argsort(dim=-1, descending=True)[..., None]
        kept, merged = edges[:, removed:], edges[:, :removed]
        target = best_index[..., None].gather(1, merged)

    def merge(x: Tensor) -> Tensor:
        source, destination = split(x)
        c = x.shape[-1]
        left = source.gather(1, kept.expand(-1, -1, c))
        moved = source.gather(1, merged.expand(-1, -1, c))
        return torch.cat([left, destination.scatter_reduce(1, target.expand(-1, -1, c), moved, reduce="mean")], 1)

    def unmerge(x: Tensor) -> Tensor:
        c, left = x.shape[-1], kept.shape[1]
        alone, destination = x[:, :left], x[:, left:]
        moved = destination.gather(1, target.expand(-1, -1, c))
        out = torch.zeros(batch, count, c, dtype=x.dtype, device=x.device)
        sources = a_index.expand(batch, count - destinations, 1)
        out.scatter_(1, b_index.expand(batch, destinations, c), destination)
        out.scatter_(1, sources.gather(1, kept).expand(-1, -1, c), alone)
        out.scatter_(1, sources.gather(1, merged).expand(-1, -1, c), moved)
        return out

    return merge, unmerge


class OutsideLoRA(nn.Module):
    """As sd-scripts does it: a low-rank update that is no submodule; it takes the place of a linear's ``forward``."""

    def __init__(self, original: nn.Linear, multiplier: float = 1.0) -> None:
        super().__init__()
        self.lora_down = nn.Linear(original.in_features, 2, bias=False)
        self.lora_up = nn.Linear(2, original.out_features, bias=False)
        self.multiplier = multiplier
        self.requires_grad_(False)
        self.org_forward = original.forward
        original.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.org_forward(x) + self.lora_up(self.lora_down(x)) * self.multiplier


class ScaledProcessor:
    """A custom attention processor without state: written-out attention with a temperature."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = map(attn.head_to_batch_dim, (query, key, value))
        weights = (query @ key.transpose(-1, -2) * attn.scale * self.scale).softmax(-1)
        return attn.to_out[0](attn.batch_to_head_dim(weights @ value))


class StoringProcessor(ScaledProcessor):
    """One that keeps each call's output, as the attention stores of prompt-to-prompt do."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.store: list[Tensor] = []

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        out = super().__call__(attn, hidden_states, encoder_hidden_states)
        self.store.append(out.mean())
        return out
