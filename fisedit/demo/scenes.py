"""Procedural scenes: what stands where (`Scene`), many of them at once (`SceneBatch`), and their antialiased pictures.

Everything is computed with torch on whatever device the generator or the batch lives on, and is a function of the
scene alone: one scene, one picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import ATTACHMENT_PAINTERS, PAINTERS, TOPS, Canvas
from .vocabulary import ATTACHMENTS, COLORS, GROUNDS, KINDS, POSITIONS, SIZES, SKIES

LAYOUT = 16
"""Uncaptioned numbers in 0..1 per scene: offset right, offset down and scale per position, then the background's."""

_COLORS, _POSITIONS, _SIZES = tuple(COLORS), tuple(POSITIONS), tuple(SIZES)
_ATTACHMENTS, _GROUNDS, _SKIES = tuple(ATTACHMENTS), tuple(GROUNDS), tuple(SKIES)
_SKY_GRADIENTS = {  # color at the top, color at the horizon, light that falls on everything
    "noon": ((0.28, 0.56, 0.92), (0.72, 0.88, 0.98), (1.0, 1.0, 1.0)),
    "sunset": ((0.45, 0.25, 0.50), (1.0, 0.58, 0.28), (1.0, 0.92, 0.84)),
    "night": ((0.03, 0.04, 0.14), (0.14, 0.16, 0.36), (0.86, 0.87, 0.94)),
    "fog": ((0.70, 0.73, 0.75), (0.86, 0.88, 0.88), (0.96, 0.97, 0.97)),
}
_GROUND_LIGHT = {
    "noon": (1.0, 1.0, 1.0),
    "sunset": (0.94, 0.78, 0.68),
    "night": (0.38, 0.42, 0.56),
    "fog": (0.9, 0.92, 0.92),
}
_CLOUD = ((-0.07, 0, 0.04), (0, 0.02, 0.055), (0.075, 0, 0.038))  # offset and radius of its three puffs
_HELD_OUT = 20
"""One scene in this many belongs to the held-out split."""


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene; every field is a word of `fisedit.demo.vocabulary`."""

    kind: str
    color: str
    position: str
    size: str = "large"
    attachment: str | None = None


@dataclass(frozen=True)
class Scene:
    """One to three objects, at different positions, on a ground under a sky.

    `layout` holds `LAYOUT` numbers in 0..1 that no caption mentions (small offsets, where the clouds are).
    """

    objects: tuple[SceneObject, ...]
    ground: str = "grass"
    sky: str = "noon"
    layout: tuple[float, ...] = (0.5,) * LAYOUT


@dataclass
class SceneBatch:
    """B scenes as tensors on one device. The second dimension is the position: left, middle, right.

    `present` `[B, 3]` bool; `kind`, `color`, `size`, `attachment` `[B, 3]` and `ground`, `sky` `[B]` int64 are indices
    into the vocabulary (attachment 0 is none); `layout` `[B, LAYOUT]` float32 in 0..1.
    """

    present: Tensor
    kind: Tensor
    color: Tensor
    size: Tensor
    attachment: Tensor
    ground: Tensor
    sky: Tensor
    layout: Tensor

    def __len__(self) -> int:
        return len(self.ground)

    def __getitem__(self, index: Tensor | slice) -> SceneBatch:
        """Returns the selected scenes: a mask, indices or a slice along the batch."""
        return SceneBatch(**{name: value[index] for name, value in vars(self).items()})

    def to(self, device: torch.device | str) -> SceneBatch:
        """Returns the batch on `device`."""
        return SceneBatch(**{name: value.to(device) for name, value in vars(self).items()})

    def scenes(self) -> list[Scene]:
        """Returns the B scenes as words."""
        table = {name: value.tolist() for name, value in vars(self).items()}
        return [self._scene({name: rows[b] for name, rows in table.items()}) for b in range(len(self))]

    @staticmethod
    def _scene(row: dict) -> Scene:
        objects = tuple(
            SceneObject(
                KINDS[row["kind"][p]],
                _COLORS[row["color"][p]],
                position,
                _SIZES[row["size"][p]],
                _ATTACHMENTS[row["attachment"][p]],
            )
            for p, position in enumerate(_POSITIONS)
            if row["present"][p]
        )
        return Scene(objects, _GROUNDS[row["ground"]], _SKIES[row["sky"]], tuple(row["layout"]))

    @staticmethod
    def from_scenes(scenes: list[Scene]) -> SceneBatch:
        """Returns the scenes as tensors on the CPU.

        Raises ValueError for a word that is not in the vocabulary or two objects at one position.
        """
        count = len(scenes)
        present = torch.zeros(count, 3, dtype=torch.bool)
        kind, color, size, attachment = (torch.zeros(count, 3, dtype=torch.long) for _ in range(4))
        for b, scene in enumerate(scenes):
            if len({item.position for item in scene.objects}) != len(scene.objects):
                raise ValueError(f"two objects of one scene stand at the same position: {scene.objects}")
            for item in scene.objects:
                p = _POSITIONS.index(item.position)
                present[b, p] = True
                kind[b, p], color[b, p] = KINDS.index(item.kind), _COLORS.index(item.color)
                size[b, p], attachment[b, p] = _SIZES.index(item.size), _ATTACHMENTS.index(item.attachment)
        return SceneBatch(
            present, kind, color, size, attachment,
            torch.tensor([_GROUNDS.index(scene.ground) for scene in scenes]),
            torch.tensor([_SKIES.index(scene.sky) for scene in scenes]),
            torch.tensor([scene.layout for scene in scenes], dtype=torch.float32),
        )  # fmt: skip


def held_out(batch: SceneBatch) -> Tensor:
    """Says which scenes training never sees: bool `[B]`, by a hash of kinds, colours, positions, ground and sky."""
    slots = (1 + batch.kind * len(COLORS) + batch.color) * batch.present  # [B, 3]
    weights = torch.tensor([7919, 104729, 1299709], device=slots.device)
    return ((slots * weights).sum(1) + batch.ground * 613 + batch.sky * 4001) % _HELD_OUT == 0


def sample_scenes(batch: int, generator: torch.Generator, split: str = "train") -> SceneBatch:
    """Draws `batch` random scenes on the generator's device; the same generator state gives the same scenes.

    `split` is "train", "held_out" or "all" (see `held_out`).
    """
    kept: list[SceneBatch] = []
    while sum(map(len, kept)) < batch:
        drawn = _draw(batch * _HELD_OUT + 64 if split == "held_out" else batch + batch // 8 + 8, generator)
        if split != "all":
            drawn = drawn[held_out(drawn) == (split == "held_out")]
        kept.append(drawn)
    return SceneBatch(**{name: torch.cat([vars(part)[name] for part in kept])[:batch] for name in vars(kept[0])})


def _draw(batch: int, generator: torch.Generator) -> SceneBatch:
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=device)

    def choice(count: int, *shape: int) -> Tensor:
        return torch.randint(count, (batch, *shape), generator=generator, device=device)

    how_many = 1 + (uniform(1) > 0.5).long() + (uniform(1) > 0.82).long()  # [B, 1]
    order = uniform(3).argsort(1).argsort(1)  # [B, 3]
    return SceneBatch(
        present=order < how_many,
        kind=choice(len(KINDS), 3),
        color=choice(len(COLORS), 3),
        size=choice(len(SIZES), 3),
        attachment=(uniform(3) < 0.45).long() * (1 + choice(len(ATTACHMENTS) - 1, 3)),
        ground=choice(len(GROUNDS)),
        sky=choice(len(SKIES)),
        layout=uniform(LAYOUT),
    )


def render(scenes: SceneBatch | list[Scene], resolution: int = 256) -> Tensor:
    """Draws the scenes: float32 `[B, 3, resolution, resolution]` RGB in 0..1, on the batch's device."""
    batch = SceneBatch.from_scenes(scenes) if isinstance(scenes, list) else scenes
    device = batch.layout.device
    line = (torch.arange(resolution, device=device) + 0.5) / resolution
    y, x = torch.meshgrid(line, line, indexing="ij")  # [R, R] each, 0..1, y downwards
    image = _background(batch, x, y)
    slots = batch.present.nonzero()  # [n, 2] (scene, position)
    if not len(slots):
        return image
    rgb, alpha, shadow = _draw_objects(batch, slots, x, y)
    for position in range(3):
        here = slots[:, 1] == position
        rows = slots[here, 0]
        under = image[rows] * (1 - 0.45 * shadow[here, None])
        image[rows] = torch.lerp(under, torch.zeros_like(under), alpha[here, None]) + rgb[here] * alpha[here, None]
    return image.clamp(0, 1)


def _background(batch: SceneBatch, x: Tensor, y: Tensor) -> Tensor:
    """Draws sky and ground: `[B, 3, R, R]`."""
    pixel = 1.0 / x.shape[-1]
    layout = batch.layout[:, :, None, None]  # [B, LAYOUT, 1, 1]
    horizon = 0.58 + 0.05 * layout[:, 9]  # [B, 1, 1]
    sky = _sky(batch, x, y, horizon, pixel)
    hills = horizon - (0.02 + 0.05 * layout[:, 14]) * (0.6 + torch.sin(x * 7 + 6.28 * layout[:, 13]))
    ground_light = layout.new_tensor([_GROUND_LIGHT[name] for name in _SKIES])[batch.sky][:, :, None, None]
    sky_low = layout.new_tensor([_SKY_GRADIENTS[name][1] for name in _SKIES])[batch.sky][:, :, None, None]
    ground = layout.new_tensor(list(GROUNDS.values()))[batch.ground][:, :, None, None] * ground_light  # [B, 3, 1, 1]
    far = 0.5 * ground + 0.5 * sky_low * 0.8
    image = torch.lerp(sky, far.expand_as(sky), _coverage(hills - y, pixel)[:, None])
    depth = ((y - horizon) / (1 - horizon)).clamp(0, 1)  # [B, R, R]
    textured = ground * (0.82 + 0.26 * depth + _texture(batch, x, depth))[:, None]
    return torch.lerp(image, textured, _coverage(horizon - y, pixel)[:, None]).clamp(0, 1)


def _coverage(distance: Tensor, pixel: float) -> Tensor:
    """Returns how much of a pixel lies inside a signed distance given in image widths."""
    return (0.5 - distance / pixel).clamp(0, 1)


def _sky(batch: SceneBatch, x: Tensor, y: Tensor, horizon: Tensor, pixel: float) -> Tensor:
    """Draws the sky with what hangs in it: `[B, 3, R, R]`."""
    layout = batch.layout[:, :, None, None]
    top, low = (layout.new_tensor([_SKY_GRADIENTS[s][i] for s in _SKIES])[batch.sky][:, :, None, None] for i in (0, 1))
    sky = torch.lerp(top, low, (y / horizon).clamp(0, 1)[:, None] ** 1.3)  # [B, 3, R, R]
    noon, sunset, night = ((batch.sky == _SKIES.index(name))[:, None, None] for name in ("noon", "sunset", "night"))
    cx, cy = 0.12 + 0.76 * layout[:, 10], torch.where(sunset, horizon - 0.05, 0.14)
    away = ((x - cx) ** 2 + (y - cy) ** 2).sqrt()  # [B, R, R]
    radius = torch.where(sunset, 0.11, 0.065)
    disc = _coverage(away - radius, pixel)
    bite = _coverage(((x - cx - 0.035) ** 2 + (y - cy + 0.015) ** 2).sqrt() - 0.058, pixel)
    disc = torch.where(night, disc * (1 - bite), disc) * (noon | sunset | night)
    glow = torch.exp(-((away / 0.2) ** 2)) * 0.5 * sunset
    moonlight, sunlight = (sky.new_tensor(c).view(1, 3, 1, 1) for c in ((0.95, 0.95, 0.82), (1.0, 0.93, 0.55)))
    light = torch.where(night[:, None], moonlight, sunlight)
    sky = torch.lerp(sky, light, torch.maximum(disc, glow)[:, None])
    for i, height in ((11, 0.13), (12, 0.26)):
        u, v = x - (0.1 + 0.8 * layout[:, i]), y - height
        puffs = [((u - du) ** 2 + (1.5 * v + dv) ** 2).sqrt() - radius for du, dv, radius in _CLOUD]
        cloud = _coverage(torch.stack(puffs).amin(0), pixel) * (noon * 0.9 + sunset * 0.35)
        sky = torch.lerp(sky, torch.ones_like(sky), cloud[:, None])
    stars = torch.zeros_like(away)
    for k in range(14):
        sx, sy = (0.37 * k + 0.13 + 0.3 * layout[:, 15]) % 1.0, 0.05 + 0.43 * ((0.618 * k + 0.2) % 1.0)
        stars = torch.maximum(stars, _coverage(((x - sx) ** 2 + (y - sy) ** 2).sqrt() - 0.0075, pixel))
    return torch.lerp(sky, torch.ones_like(sky), (stars * night * 0.9)[:, None])


def _texture(batch: SceneBatch, x: Tensor, depth: Tensor) -> Tensor:
    """Returns the ground's brightness pattern: `[B, R, R]`, around 0."""
    phase = 6.28 * batch.layout[:, 15, None, None]
    rows = (depth + 0.08).log() * 9 + phase  # denser towards the horizon
    spread = (x - 0.5) / (depth + 0.35)
    patterns = torch.stack(
        [
            0.07 * torch.sin(rows * 1.6) * torch.sin(34 * spread + 3 * torch.sin(rows)),  # grass: tufts
            0.05 * torch.sin(rows * 1.2 + 2.5 * torch.sin(5 * spread)),  # sand: dunes
            0.025 * torch.sin(rows * 0.8 + 3 * spread),  # snow: almost even
            0.14 * torch.sin(rows * 2.2 + 1.2 * torch.sin(9 * spread)).clamp(-0.6, 1),  # water: ripples
            -0.17 * torch.maximum(_line(rows * 0.9), _line(9 * spread + 3.14 * ((rows * 0.45 / math.pi) % 1).round())),
        ],
        1,
    )  # [B, 5, R, R]
    return patterns[torch.arange(len(batch), device=x.device), batch.ground]


def _line(phase: Tensor) -> Tensor:
    """Returns narrow soft lines, one per half turn of `phase`."""
    return (1 - 4 * torch.sin(phase).abs()).clamp(0, 1)


def _draw_objects(batch: SceneBatch, slots: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the n objects named by `slots` `[n, 2]`: their colour `[n, 3, R, R]`, alpha and shadow `[n, R, R]`."""
    scene, position = slots.unbind(1)
    offset = batch.layout[:, :9].view(-1, 3, 3)[scene, position] - 0.5  # [n, 3]
    scale = x.new_tensor(list(SIZES.values()))[batch.size[scene, position]] * (1 + 0.10 * offset[:, 2])
    center = x.new_tensor(list(POSITIONS.values()))[position] + 0.05 * offset[:, 0]
    foot = 0.83 + 0.08 * offset[:, 1]
    u = (x - center[:, None, None]) / scale[:, None, None]  # [n, R, R]
    v = (foot[:, None, None] - y) / scale[:, None, None]
    pixel = (1.0 / (x.shape[-1] * scale))[:, None, None]
    color = x.new_tensor(list(COLORS.values()))[batch.color[scene, position]]  # [n, 3]
    kind, attachment = batch.kind[scene, position], batch.attachment[scene, position]
    rgb, alpha = x.new_zeros(len(slots), 3, *x.shape), x.new_zeros(len(slots), *x.shape)
    for k, name in enumerate(KINDS):
        rows = (kind == k).nonzero()[:, 0]
        if not len(rows):
            continue
        canvas = Canvas(u[rows], v[rows], pixel[rows], color[rows])
        PAINTERS[name](canvas)
        rgb[rows], alpha[rows] = canvas.rgb, canvas.alpha
    tops = x.new_tensor([TOPS[name] for name in KINDS])[kind][:, :, None, None]  # [n, 2, 1, 1]
    for a, attached in enumerate(_ATTACHMENTS):
        rows = (attachment == a).nonzero()[:, 0]
        if attached is None or not len(rows):
            continue
        canvas = Canvas(u[rows], v[rows], pixel[rows], color[rows])
        canvas.rgb, canvas.alpha = rgb[rows], alpha[rows]
        ATTACHMENT_PAINTERS[attached](canvas, canvas.u - tops[rows, 0], canvas.v - tops[rows, 1])
        rgb[rows], alpha[rows] = canvas.rgb, canvas.alpha
    light = x.new_tensor([_SKY_GRADIENTS[name][2] for name in _SKIES])[batch.sky[scene]]  # [n, 3]
    shadow = torch.exp(-(((u - 0.06) / 0.42) ** 2 + (v / 0.075) ** 2))  # [n, R, R]
    return rgb * light[:, :, None, None], alpha, shadow
