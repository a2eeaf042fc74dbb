"""Small U-Nets with the habits of other people's code; nothing of diffusers in them.

``LinearAttentionUNet``  normalization over channels, weight-standardized convolutions, attention over ``h`` heads by
    einsum and linear attention, downsampling by rearranged pixels;
``SongStyleUNet``  resampling by grouped (transposed) convolutions with a fixed filter, attention with ``ncq,nck->nqk``;
``TutorialUNet``  batch norm, max pooling, transposed convolutions, bilinear upsampling;
``FunctionalUNet``  functions of ``torch.nn.functional`` and ``@`` over plain parameters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def embed(timesteps: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(torch.arange(width // 2, device=timesteps.device) * (-math.log(10000) / (width // 2 - 1)))
    angles = timesteps[:, None] * frequencies[None, :]
    return torch.cat((angles.sin(), angles.cos()), dim=-1)  # [B, width]


class ChannelRMSNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * (x.shape[1] ** 0.5)


class ChannelLayerNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        variance = torch.var(x, dim=1, unbiased=False, keepdim=True)
        return (x - torch.mean(x, dim=1, keepdim=True)) * (variance + 1e-5).rsqrt() * self.g


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = self.weight.var(dim=(1, 2, 3), unbiased=False, keepdim=True)
        weight = (self.weight - mean) * (variance + 1e-5).rsqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FullAttention(nn.Module):
    def __init__(self, channels: int, heads: int = 2, head_width: int = 8) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_width**-0.5
        self.norm = ChannelRMSNorm(channels)
        self.to_qkv = nn.Conv2d(channels, heads * head_width * 3, 1, bias=False)
        self.to_out = nn.Conv2d(heads * head_width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = (t.reshape(b, self.heads, -1, h * w) for t in self.to_qkv(self.norm(x)).chunk(3, dim=1))
        weights = torch.einsum("b h d i, b h d j -> b h i j", q * self.scale, k).softmax(dim=-1)
        out = torch.einsum("b h i j, b h d j -> b h i d", weights, v)
        return self.to_out(out.permute(0, 1, 3, 2).reshape(b, -1, h, w)) + x


class LinearAttention(FullAttention):
    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = (t.reshape(b, self.heads, -1, h * w) for t in self.to_qkv(self.norm(x)).chunk(3, dim=1))
        q, k = q.softmax(dim=-2) * self.scale, k.softmax(dim=-1)
        context = torch.einsum("b h d n, b h e n -> b h d e", k, v)
        out = torch.einsum("b h d e, b h d n -> b h e n", context, q)
        return self.to_out(out.reshape(b, -1, h, w)) + x


class Block(nn.Module):
    def __init__(self, source: int, target: int, emb: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(emb, target * 2))
        self.first, self.second = (StandardizedConv(c, target, 3, padding=1) for c in (source, target))
        self.norm1, self.norm2 = nn.GroupNorm(4, target), ChannelLayerNorm(target)
        self.res = nn.Conv2d(source, target, 1) if source != target else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.mlp(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm1(self.first(x)) * (scale + 1) + shift)
        return F.silu(self.norm2(self.second(h))) + self.res(x)


class LinearAttentionUNet(nn.Module):
    def __init__(self, width: int = 16, linear: bool = False) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width * 2), nn.GELU(), nn.Linear(width * 2, width * 2))
        self.stem = nn.Conv2d(3, width, 7, padding="same")
        self.down_block = Block(width, width, width * 2)
        self.down_attention = LinearAttention(width) if linear else FullAttention(width)
        self.down = nn.Conv2d(width * 4, width * 2, 1)
        self.middle, self.attention = Block(width * 2, width * 2, width * 2), FullAttention(width * 2)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width * 2, width, 3, padding=1))
        self.up_block = Block(width * 2, width, width * 2)
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        emb = self.time(embed(time, self.width))
        skip = self.down_attention(self.down_block(self.stem(x), emb))
        b, c, h, w = skip.shape
        pixels = skip.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)
        h = self.attention(self.middle(self.down(pixels), emb))
        return self.last(self.up_block(torch.cat((self.up(h), skip), dim=1), emb))


class SongConv(nn.Module):
    """A convolution that may resample before or after with a fixed filter, one group a channel."""

    def __init__(
        self, source: int, target: int, kernel: int, resample: str = "", taps: tuple[int, ...] = (1, 1)
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(target, source, kernel, kernel) / (source * kernel**2) ** 0.5)
        self.bias = nn.Parameter(torch.randn(target) / 4)
        taps_1d = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("filter", (taps_1d.ger(taps_1d) / taps_1d.sum().square())[None, None])
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        taps, channels = self.filter.to(x.dtype), x.shape[1]
        padding = (taps.shape[-1] - 1) // 2
        if self.resample == "up":
            x = F.conv_transpose2d(x, taps.mul(4).tile([channels, 1, 1, 1]), groups=channels, stride=2, padding=padding)
        if self.resample == "down":
            x = F.conv2d(x, taps.tile([channels, 1, 1, 1]), groups=channels, stride=2, padding=padding)
        x = F.conv2d(x, self.weight.to(x.dtype), padding=self.weight.shape[-1] // 2)
        return x.add_(self.bias.reshape(1, -1, 1, 1).to(x.dtype))


class SongNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 4, self.weight.to(x.dtype), self.bias.to(x.dtype), 1e-6)


class SongBlock(nn.Module):
    def __init__(self, source: int, target: int, emb: int, resample: str = "", attention: bool = False) -> None:
        super().__init__()
        self.norm0, self.norm1 = SongNorm(source), SongNorm(target)
        self.conv0, self.conv1 = SongConv(source, target, 3, resample), SongConv(target, target, 3)
        self.skip = SongConv(source, target, 1, resample)
        self.affine, self.heads = nn.Linear(emb, target * 2), 2
        if attention:
            self.norm2, self.qkv = SongNorm(target), SongConv(target, target * 3, 1)
            self.proj = SongConv(target, target, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        skip = self.skip(x)
        x = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(emb).unsqueeze(2).unsqueeze(3).to(x.dtype).chunk(chunks=2, dim=1)
        x = F.silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        x = self.conv1(F.dropout(x, p=0.1, training=self.training)).add_(skip) * 0.5**0.5
        if not hasattr(self, "qkv"):
            return x
        qkv = self.qkv(self.norm2(x)).reshape(x.shape[0] * self.heads, x.shape[1] // self.heads, 3, -1)
        q, k, v = qkv.unbind(2)
        weights = torch.einsum("ncq,nck->nqk", q.to(torch.float32), (k / k.shape[1] ** 0.5).to(torch.float32))
        out = torch.einsum("nqk,nck->ncq", weights.softmax(dim=2).to(q.dtype), v)
        return self.proj(out.reshape(*x.shape)).add_(x) * 0.5**0.5


class SongStyleUNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width, emb = width, width * 2
        self.map = nn.Linear(width, emb)
        self.first = SongConv(3, width, 3)
        self.enc = nn.ModuleList([SongBlock(width, width, emb), SongBlock(width, width * 2, emb, "down", True)])
        self.dec = nn.ModuleList([SongBlock(width * 2, width, emb, "up"), SongBlock(width * 3, width, emb, "", True)])
        self.norm, self.last = SongNorm(width), SongConv(width, 3, 3)

    def forward(self, x: Tensor, noise_labels: Tensor) -> Tensor:
        emb = F.silu(self.map(embed(noise_labels, self.width)))
        x = self.first(x)
        skips = [x, self.enc[0](x, emb)]
        x = self.dec[0](self.enc[1](skips[1], emb), emb)
        x = self.dec[1](torch.cat([x, *skips], dim=1), emb)
        return self.last(F.silu(self.norm(x)))


def double_conv(source: int, target: int) -> nn.Sequential:
    layers = [nn.Conv2d(source, target, 3, padding=1, bias=False), nn.BatchNorm2d(target), nn.ReLU(inplace=True)]
    return nn.Sequential(
        *layers, nn.Conv2d(target, target, 3, padding=1), nn.BatchNorm2d(target), nn.ReLU(inplace=True)
    )


class TutorialUNet(nn.Module):
    """``bilinear``: upsample by interpolation, else by a transposed convolution."""

    def __init__(self, bilinear: bool, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Linear(width, width * 2)
        self.inc, self.pool = double_conv(3, width), nn.MaxPool2d(2)
        self.down = double_conv(width, width * 2)
        self.up: nn.Module = nn.ConvTranspose2d(width * 2, width * 2, 2, stride=2)
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv, self.outc = double_conv(width * 3, width), nn.Conv2d(width, 3, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down(self.pool(x1)) + self.time(embed(t, self.width))[:, :, None, None]
        up = self.up(x2)
        dy, dx = x1.size(2) - up.size(2), x1.size(3) - up.size(3)
        up = F.pad(up, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.outc(self.conv(torch.cat([x1, up], dim=1)))


class FunctionalUNet(nn.Module):
    """Tokens throughout, ``@`` for every product, a softmax written out, statistics by hand, reflected borders."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        maps = {"stem": (width, 4), "down": (width, width), "up": (width, width), "last": (4, width)}
        shapes = {name: (*channels, 3, 3) for name, channels in maps.items()}
        shapes |= dict.fromkeys(("q", "k", "v", "nin", "time"), (width, width))
        self.width = width
        weights = {name: torch.randn(shape) / math.prod(shape[1:]) ** 0.5 for name, shape in shapes.items()}
        self.w = nn.ParameterDict({name: nn.Parameter(weight) for name, weight in weights.items()})

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        b, _, height, width = x.shape
        skip = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.w["stem"])
        skip = skip + (embed(t, self.width) @ self.w["time"]).view(b, -1, 1, 1)
        h = F.conv2d(F.pad(F.gelu(skip), (0, 1, 0, 1)), self.w["down"], stride=2)
        h = F.instance_norm(h)
        tokens = h.flatten(2).mT
        scores = (tokens @ self.w["q"]) @ (tokens @ self.w["k"]).mT / self.width**0.5
        tokens = tokens + F.softmax(scores, -1) @ (tokens @ self.w["v"])
        h = torch.einsum("bnc,cd->bnd", tokens, self.w["nin"]).mT.view_as(h)
        h = F.interpolate(h, size=(height, width), mode="nearest")
        h = F.conv2d(h, self.w["up"], padding=1) + skip
        h = h * torch.sigmoid(h.mean(dim=(2, 3), keepdim=True))  # squeeze and excite: of all positions
        return F.conv2d(F.leaky_relu(h), self.w["last"], padding=1)


def built(model: nn.Module, channels: int = 3, size: tuple[int, int] = (6, 10)) -> tuple[nn.Module, dict[str, Any]]:
    """``model`` in eval mode and the arguments of one call, by the names of its forward."""
    names = list(model.forward.__annotations__)[:2]
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(2, channels, *size, generator=generator), torch.tensor([7.0, 7.0]))
    return model.eval().requires_grad_(False), dict(zip(names, values, strict=True))
