"""A U-Net in the manner of the original Stable Diffusion code (``openaimodel``), narrow; our own code.

What is particular to that family is here: blocks as sequences that hand the embedding and the text to whoever wants
them, GroupNorm through float32, residual blocks that may resample inside, attention by einsum and softmax with float32
upcast, the older attention over ``[B, C, H*W]`` with a width-1 convolution, checkpointing by an autograd function,
class embeddings ``y``, ``forward(x, timesteps, context, y)``. Last layers are not set to zero as that code does: a
block that adds nothing would prove nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

TEXT = 32


@dataclass(frozen=True)
class Options:
    """The choices that configurations of this family make."""

    width: int = 16
    multipliers: tuple[int, ...] = (1, 2)
    heads: int = 4
    depth: int = 1
    scale_shift: bool = False
    resample_blocks: bool = False
    attention: str = "text"  # "text", "legacy" (split heads first) or "new" (split q, k, v first): without text
    linear_projection: bool = False
    classes: int | None = None
    checkpoint: str | None = None  # "function" (a custom autograd function) or "torch"
    slices: int | None = None  # attention in a loop over so many heads at a time
    upcast: bool = False  # scores in float32, autocast switched off around them


class RunUnderAutograd(torch.autograd.Function):
    """Checkpointing as that code does it: forward without a graph, recomputed in backward."""

    @staticmethod
    def forward(context: Any, function: Callable[..., Tensor], length: int, *tensors: Tensor) -> Tensor:
        context.function, context.inputs = function, tensors[:length]
        with torch.no_grad():
            return function(*tensors[:length])

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("these models are not trained")


def run(function: Callable[..., Tensor], inputs: Sequence[Tensor], module: nn.Module, how: str | None) -> Tensor:
    if how == "function":
        return RunUnderAutograd.apply(function, len(inputs), *inputs, *module.parameters())
    if how == "torch":
        return torch_checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def timestep_embedding(timesteps: Tensor, width: int, period: float = 10000.0) -> Tensor:
    half = width // 2
    frequencies = torch.exp(-math.log(period) * torch.arange(0, half, dtype=torch.float32) / half).to(timesteps.device)
    angles = timesteps[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)  # [B, width]


class GroupNorm32(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


def normalization(channels: int) -> nn.Module:
    return GroupNorm32(8, channels)


class EmbeddingBlock(nn.Module):
    """A block that takes the timestep embedding beside its input."""


class TimestepEmbedSequential(nn.Sequential, EmbeddingBlock):
    def forward(self, x: Tensor, emb: Tensor, context: Any = None) -> Tensor:
        for layer in self:
            if isinstance(layer, EmbeddingBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class Upsample(nn.Module):
    def __init__(self, channels: int, convolve: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if convolve else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    def __init__(self, channels: int, convolve: bool = True) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if convolve else nn.AvgPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(EmbeddingBlock):
    def __init__(self, source: int, target: int, emb: int, options: Options, resample: str | None = None) -> None:
        super().__init__()
        self.options = options
        self.in_layers = nn.Sequential(normalization(source), nn.SiLU(), nn.Conv2d(source, target, 3, padding=1))
        steps = {"up": Upsample, "down": Downsample}
        self.resample = resample is not None
        self.h_upd = steps[resample](source, False) if resample else nn.Identity()
        self.x_upd = steps[resample](source, False) if resample else nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * target if options.scale_shift else target))
        last = nn.Conv2d(target, target, 3, padding=1)
        self.out_layers = nn.Sequential(normalization(target), nn.SiLU(), nn.Dropout(p=0.1), last)
        self.skip_connection = nn.Identity() if source == target else nn.Conv2d(source, target, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return run(self._forward, (x, emb), self, self.options.checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample:
            in_rest, in_conv = self.in_layers[:-1], self.in_layers[-1]
            h = in_conv(self.h_upd(in_rest(x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        if self.options.scale_shift:
            out_norm, out_rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = torch.chunk(emb_out, 2, dim=1)
            h = out_rest(out_norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class QKVAttention(nn.Module):
    """Attention over ``[B, 3*C, T]``: heads split first (``legacy``), or queries, keys and values first."""

    def __init__(self, heads: int, legacy: bool) -> None:
        super().__init__()
        self.heads, self.legacy = heads, legacy

    def forward(self, qkv: Tensor) -> Tensor:
        batch, width, length = qkv.shape
        channels = width // (3 * self.heads)
        if self.legacy:
            q, k, v = qkv.reshape(batch * self.heads, channels * 3, length).split(channels, dim=1)
        else:
            parts = qkv.chunk(3, dim=1)
            q, k, v = (part.reshape(batch * self.heads, channels, length) for part in parts)
        scale = 1 / math.sqrt(math.sqrt(channels))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return torch.einsum("bts,bcs->bct", weight, v).reshape(batch, -1, length)


class AttentionBlock(nn.Module):
    """Attention of positions to positions, in ``[B, C, H*W]``."""

    def __init__(self, channels: int, options: Options) -> None:
        super().__init__()
        self.options = options
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.attention = QKVAttention(options.heads, options.attention == "legacy")
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return run(self._forward, (x,), self, self.options.checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        h = self.proj_out(self.attention(self.qkv(self.norm(x))))
        return (x + h).reshape(b, c, *spatial)


class GEGLU(nn.Module):
    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.proj = nn.Linear(source, target * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class CrossAttention(nn.Module):
    """Einsum over ``(b h) n d``, scores in float32; with ``slices`` in a loop over some heads at a time."""

    def __init__(self, channels: int, context: int, options: Options) -> None:
        super().__init__()
        self.options, self.scale = options, (channels // options.heads) ** -0.5
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (self.split(t) for t in (q, k, v))
        if self.options.slices is None:
            out = self.attend(q, k, v)
        else:
            steps = range(0, q.shape[0], self.options.slices)
            parts = [slice(i, i + self.options.slices) for i in steps]
            out = torch.cat([self.attend(q[part], k[part], v[part]) for part in parts])
        b, n, c = x.shape
        out = out.reshape(b, self.options.heads, n, -1).permute(0, 2, 1, 3).reshape(b, n, c)
        return self.to_out(out)

    def split(self, t: Tensor) -> Tensor:
        b, n, c = t.shape
        heads = self.options.heads
        return t.reshape(b, n, heads, c // heads).permute(0, 2, 1, 3).reshape(b * heads, n, c // heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.options.upcast:
            with torch.autocast(enabled=False, device_type=q.device.type):
                sim = torch.einsum("b i d, b j d -> b i j", q.float(), k.float()) * self.scale
        else:
            sim = torch.einsum("b i d, b j d -> b i j", q, k) * self.scale
        return torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1).to(v.dtype), v)


class BasicTransformerBlock(nn.Module):
    def __init__(self, channels: int, options: Options) -> None:
        super().__init__()
        self.options = options
        self.attn1 = CrossAttention(channels, channels, options)
        self.attn2 = CrossAttention(channels, TEXT, options)
        self.ff = nn.Sequential(GEGLU(channels, channels * 4), nn.Dropout(0.0), nn.Linear(channels * 4, channels))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return run(self._forward, (x, context), self, self.options.checkpoint)

    def _forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """``context`` is a tensor, or a list with one for each transformer block."""

    def __init__(self, channels: int, options: Options) -> None:
        super().__init__()
        self.linear = options.linear_projection
        self.norm = normalization(channels)
        layer: Callable[..., nn.Module] = nn.Linear if self.linear else lambda i, o: nn.Conv2d(i, o, 1)
        self.proj_in, self.proj_out = layer(channels, channels), layer(channels, channels)
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(channels, options) for _ in range(options.depth))

    def forward(self, x: Tensor, context: Tensor | list[Tensor]) -> Tensor:
        contexts = context if isinstance(context, list) else [context]
        b, c, h, w = x.shape
        residual = x
        x = self.norm(x)
        if not self.linear:
            x = self.proj_in(x)
        x = x.flatten(2).transpose(1, 2).contiguous()  # [B, H*W, C]
        if self.linear:
            x = self.proj_in(x)
        for i, block in enumerate(self.transformer_blocks):
            x = block(x, context=contexts[i % len(contexts)])
        if self.linear:
            x = self.proj_out(x)
        x = x.transpose(1, 2).reshape(b, c, h, w).contiguous()
        if not self.linear:
            x = self.proj_out(x)
        return x + residual


class OpenAIStyleUNet(nn.Module):
    """``forward(x [B, 4, H, W], timesteps [B], context, y)``; one residual block and one attention a level."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.options = options = options or Options()
        width, emb = options.width, options.width * 4
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if options.classes is not None:
            self.label_emb = nn.Embedding(options.classes, emb)
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(4, width, 3, padding=1))])
        channels, skips = width, [width]
        for level, multiplier in enumerate(options.multipliers):
            self.input_blocks.append(self._block(channels, multiplier * width, emb))
            channels = multiplier * width
            skips.append(channels)
            if level < len(options.multipliers) - 1:
                self.input_blocks.append(TimestepEmbedSequential(self._resample("down", channels, emb)))
                skips.append(channels)
        self.middle_block = TimestepEmbedSequential(
            ResBlock(channels, channels, emb, options),
            self._attention(channels),
            ResBlock(channels, channels, emb, options),
        )
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(options.multipliers))):
            for i in range(2):
                block = self._block(channels + skips.pop(), multiplier * width, emb)
                channels = multiplier * width
                if level and i == 1:
                    block.append(self._resample("up", channels, emb))
                self.output_blocks.append(block)
        self.out = nn.Sequential(normalization(channels), nn.SiLU(), nn.Conv2d(channels, 4, 3, padding=1))

    def _attention(self, channels: int) -> nn.Module:
        kind = SpatialTransformer if self.options.attention == "text" else AttentionBlock
        return kind(channels, self.options)

    def _block(self, source: int, target: int, emb: int) -> TimestepEmbedSequential:
        return TimestepEmbedSequential(ResBlock(source, target, emb, self.options), self._attention(target))

    def _resample(self, way: str, channels: int, emb: int) -> nn.Module:
        if self.options.resample_blocks:
            return ResBlock(channels, channels, emb, self.options, way)
        return Upsample(channels) if way == "up" else Downsample(channels)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Any = None, y: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        assert (y is not None) == (self.options.classes is not None), "y if and only if the model has classes"
        saved = []
        emb = self.time_embed(timestep_embedding(timesteps, self.options.width).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        h = x
        for module in self.input_blocks:
            h = module(h, emb, context)
            saved.append(h)
        h = self.middle_block(h, emb, context)
        for module in self.output_blocks:
            h = torch.cat([h, saved.pop()], dim=1)
            h = module(h, emb, context)
        return self.out(h.type(x.dtype))


def openai_style(size: tuple[int, int] = (6, 10), batch: int = 2, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model and the arguments of one call: ``x``, ``timesteps``, and ``context`` and ``y`` where it takes them."""
    torch.manual_seed(0)
    model = OpenAIStyleUNet(Options(**options)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    call: dict[str, Any] = {
        "x": torch.randn(batch, 4, *size, generator=generator),
        "timesteps": torch.full((batch,), 7),
    }
    if model.options.attention == "text":
        call["context"] = torch.randn(batch, 5, TEXT, generator=generator)
    if model.options.classes is not None:
        call["y"] = torch.arange(batch) % model.options.classes
    return model, call
