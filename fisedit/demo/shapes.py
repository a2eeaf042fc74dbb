"""Signed distance functions and the painters that draw objects and their attachments from them.

An object lives in its own coordinates: `u` to the right with 0 at its center, `v` upwards with 0 on the ground and 1 at
the top of its body, both in units of the body's height. A painter works on n objects of one kind at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

OUTLINE = 0.022
"""Width of the dark line around every part, in body heights."""

CREAM, BROWN, GOLD, SNOW = (0.96, 0.90, 0.78), (0.45, 0.28, 0.14), (1.0, 0.80, 0.12), (0.97, 0.98, 1.0)
DARK, METAL, GLASS = (0.13, 0.12, 0.15), (0.60, 0.62, 0.66), (0.72, 0.90, 1.0)


def box(u: Tensor, v: Tensor, cu: float, cv: float, half_width: float, half_height: float) -> Tensor:
    """Distance to an axis-aligned box, negative inside; same shape as `u`."""
    return torch.maximum((u - cu).abs() - half_width, (v - cv).abs() - half_height)


def ellipse(u: Tensor, v: Tensor, cu: float, cv: float, ru: float, rv: float) -> Tensor:
    """First-order distance to an ellipse (exact for a circle), negative inside; same shape as `u`."""
    a, b = (u - cu) / ru, (v - cv) / rv
    if ru == rv:
        return ((a * a + b * b).sqrt() - 1) * ru
    value, gradient = (a * a + b * b).sqrt(), ((a / ru) ** 2 + (b / rv) ** 2).sqrt()
    return (value - 1) * value / gradient.clamp(min=1e-4)


def polygon(u: Tensor, v: Tensor, *corners: tuple[float, float]) -> Tensor:
    """Distance to a convex polygon given by its corners counter-clockwise, negative inside; same shape as `u`."""
    edges = []
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
        du, dv = u1 - u0, v1 - v0
        length = math.hypot(du, dv)
        edges.append(((u - u0) * dv - (v - v0) * du) / length)
    return torch.stack(edges).amax(0)


def star(u: Tensor, v: Tensor, cu: float, cv: float, radius: float) -> Tensor:
    """Approximate distance to a five-pointed star, one point up, negative inside; same shape as `u`."""
    x, y = u - cu, v - cv
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, y)
    angle = (angle - sector * torch.round(angle / sector)).abs()
    r = (x * x + y * y).sqrt()
    px, py = r * torch.sin(angle), r * torch.cos(angle)  # folded into half a point: tip at (0, radius)
    inner = radius * 0.46
    ix, iy = inner * math.sin(sector / 2), inner * math.cos(sector / 2)
    du, dv = ix, iy - radius
    length = math.hypot(du, dv)
    return (px * -dv + (py - radius) * du) / length


class Canvas:
    """Paints parts of n objects, one over the other, onto n transparent layers.

    `u`, `v` `[n, H, W]` are the pixels' object coordinates, `pixel` `[n, 1, 1]` a pixel's width in them, `color`
    `[n, 3]` each object's own colour. `rgb` `[n, 3, H, W]` (premultiplied by alpha) and `alpha` `[n, H, W]` hold the
    result.
    """

    def __init__(self, u: Tensor, v: Tensor, pixel: Tensor, color: Tensor) -> None:
        self.u, self.v, self.pixel, self.color = u, v, pixel, color
        self.rgb = u.new_zeros(len(u), 3, *u.shape[1:])  # [n, 3, H, W]
        self.alpha = torch.zeros_like(u)  # [n, H, W]
        self.light = (1.06 - 0.42 * u + 0.16 * (v - 0.5)).clamp(0.62, 1.22)  # lit from the upper left

    def paint(
        self, distance: Tensor, color: tuple[float, ...] | None = None, shade: float = 1.0, outline: float = OUTLINE
    ) -> None:
        """Draws the part inside `distance` `[n, H, W]` in `color` (the object's own when None) times `shade`."""
        base = self.color if color is None else self.color.new_tensor(color).expand(len(self.color), 3)
        coverage = (0.5 - distance / self.pixel).clamp(0, 1)  # [n, H, W]
        light = self.light * shade
        if outline:
            light = light * (1 - 0.6 * (0.5 + (distance + outline) / self.pixel).clamp(0, 1))
        lit = (base[:, :, None, None] * light[:, None]).clamp(0, 1)  # [n, 3, H, W]
        self.rgb = torch.lerp(self.rgb, lit, coverage[:, None])
        self.alpha = torch.lerp(self.alpha, torch.ones_like(coverage), coverage)


def _house(c: Canvas) -> None:
    u, v = c.u, c.v
    c.paint(box(u, v, 0.22, 0.80, 0.06, 0.16), BROWN)
    c.paint(box(u, v, 0, 0.29, 0.38, 0.29))
    c.paint(polygon(u, v, (-0.48, 0.54), (0.48, 0.54), (0.0, 1.0)), shade=0.66)
    c.paint(box(u, v, -0.14, 0.18, 0.09, 0.18), DARK)
    c.paint(box(u, v, 0.17, 0.32, 0.10, 0.10), GLASS)
    c.paint(torch.minimum(box(u, v, 0.17, 0.32, 0.012, 0.10), box(u, v, 0.17, 0.32, 0.10, 0.012)), DARK, outline=0)


def _tower(c: Canvas) -> None:
    u, v = c.u, c.v
    c.paint(polygon(u, v, (-0.25, 0.0), (0.25, 0.0), (0.19, 0.82), (-0.19, 0.82)))
    for center in (-0.21, 0.0, 0.21):
        c.paint(box(u, v, center, 0.93, 0.06, 0.07))
    c.paint(box(u, v, 0, 0.82, 0.27, 0.06), shade=0.8)
    for height in (0.32, 0.58):
        c.paint(torch.minimum(box(u, v, 0, height, 0.05, 0.06), ellipse(u, v, 0, height + 0.06, 0.05, 0.05)), DARK)
    c.paint(torch.minimum(box(u, v, 0, 0.07, 0.08, 0.07), ellipse(u, v, 0, 0.14, 0.08, 0.08)), DARK)


def _tree(c: Canvas) -> None:
    u, v = c.u, c.v
    c.paint(polygon(u, v, (-0.10, 0.0), (0.10, 0.0), (0.06, 0.45), (-0.06, 0.45)), BROWN)
    crown = torch.minimum(ellipse(u, v, -0.20, 0.52, 0.20, 0.20), ellipse(u, v, 0.20, 0.52, 0.20, 0.20))
    crown = torch.minimum(crown, ellipse(u, v, 0.0, 0.72, 0.28, 0.28))
    c.paint(torch.minimum(crown, ellipse(u, v, 0.0, 0.52, 0.20, 0.20)))
    for cu, cv in ((-0.14, 0.56), (0.15, 0.60), (0.0, 0.80)):
        c.paint(ellipse(u, v, cu, cv, 0.06, 0.035), shade=0.75, outline=0)


def _mushroom(c: Canvas) -> None:
    u, v = c.u, c.v
    c.paint(polygon(u, v, (-0.17, 0.0), (0.17, 0.0), (0.12, 0.55), (-0.12, 0.55)), CREAM)
    c.paint(torch.maximum(ellipse(u, v, 0, 0.46, 0.46, 0.54), 0.46 - v))
    for cu, cv, radius in ((-0.22, 0.62, 0.07), (0.04, 0.80, 0.08), (0.24, 0.60, 0.06)):
        c.paint(ellipse(u, v, cu, cv, radius, radius), CREAM, outline=0)


def _car(c: Canvas) -> None:
    u, v = c.u, c.v
    c.paint(polygon(u, v, (-0.34, 0.40), (0.32, 0.40), (0.20, 0.72), (-0.22, 0.72)))
    c.paint(polygon(u, v, (-0.25, 0.42), (-0.02, 0.42), (-0.02, 0.65), (-0.17, 0.65)), GLASS)
    c.paint(polygon(u, v, (0.04, 0.42), (0.24, 0.42), (0.16, 0.65), (0.04, 0.65)), GLASS)
    c.paint(box(u, v, 0, 0.29, 0.50, 0.14))
    for center in (-0.27, 0.27):
        c.paint(ellipse(u, v, center, 0.14, 0.14, 0.14), DARK)
        c.paint(ellipse(u, v, center, 0.14, 0.06, 0.06), METAL)
    c.paint(ellipse(u, v, 0.45, 0.32, 0.04, 0.04), GOLD, outline=0)


def _boat(c: Canvas) -> None:
    u, v = c.u, c.v
    c.paint(box(u, v, -0.02, 0.60, 0.025, 0.38), BROWN)
    c.paint(polygon(u, v, (0.02, 0.36), (0.42, 0.36), (0.02, 0.96)), CREAM)
    c.paint(polygon(u, v, (-0.06, 0.36), (-0.06, 0.82), (-0.34, 0.36)))
    c.paint(polygon(u, v, (-0.32, 0.0), (0.32, 0.0), (0.50, 0.29), (-0.50, 0.29)))
    c.paint(box(u, v, 0, 0.235, 0.42, 0.02), CREAM, outline=0)


def _ball(c: Canvas) -> None:
    u, v = c.u, c.v
    body = ellipse(u, v, 0, 0.40, 0.40, 0.40)
    c.paint(body)
    band = torch.maximum(((v - 0.40) - 0.35 * u + 0.5 * u * u).abs() - 0.06, body + OUTLINE)
    c.paint(band, CREAM, outline=0)
    c.paint(ellipse(u, v, -0.16, 0.60, 0.07, 0.045), (1.0, 1.0, 1.0), outline=0)


def _star(c: Canvas) -> None:
    c.paint(star(c.u, c.v, 0, 0.45, 0.53))
    c.paint(star(c.u, c.v, 0, 0.45, 0.27), shade=1.22, outline=0)


def _cup(c: Canvas) -> None:
    u, v = c.u, c.v
    c.paint((ellipse(u, v, 0.31, 0.42, 0.15, 0.19)).abs() - 0.04)
    c.paint(polygon(u, v, (-0.24, 0.0), (0.24, 0.0), (0.32, 0.74), (-0.32, 0.74)))
    c.paint(ellipse(u, v, 0, 0.74, 0.32, 0.09), shade=0.8)
    c.paint(ellipse(u, v, 0, 0.73, 0.25, 0.055), BROWN, outline=0)
    c.paint(box(u, v, 0, 0.30, 0.262, 0.035), CREAM, outline=0)


def _rocket(c: Canvas) -> None:
    u, v = c.u, c.v
    c.paint(polygon(u, v, (-0.12, 0.02), (0.12, 0.02), (0.08, 0.2), (-0.08, 0.2)), METAL)
    c.paint(polygon(u, v, (-0.34, 0.0), (-0.10, 0.16), (-0.10, 0.44), (-0.24, 0.32)), shade=0.66)
    c.paint(polygon(u, v, (0.10, 0.16), (0.34, 0.0), (0.24, 0.32), (0.10, 0.44)), shade=0.66)
    c.paint(torch.maximum(ellipse(u, v, 0, 0.42, 0.20, 0.58), 0.12 - v))
    c.paint(torch.maximum(ellipse(u, v, 0, 0.42, 0.20, 0.58), 0.78 - v), shade=0.66)
    c.paint(ellipse(u, v, 0, 0.56, 0.095, 0.095), METAL)
    c.paint(ellipse(u, v, 0, 0.56, 0.06, 0.06), GLASS, outline=0)


def _robot(c: Canvas) -> None:
    u, v = c.u, c.v
    for side in (-1, 1):
        c.paint(box(u, v, 0.12 * side, 0.08, 0.07, 0.08), METAL)
        c.paint(box(u, v, 0.33 * side, 0.38, 0.06, 0.16), METAL)
    c.paint(box(u, v, 0, 0.36, 0.26, 0.22))
    c.paint(box(u, v, 0, 0.36, 0.14, 0.10), METAL)
    c.paint(box(u, v, 0, 0.62, 0.08, 0.05), METAL)
    c.paint(box(u, v, 0, 0.82, 0.24, 0.17))
    for side in (-1, 1):
        c.paint(ellipse(u, v, 0.10 * side, 0.86, 0.065, 0.065), CREAM)
        c.paint(ellipse(u, v, 0.10 * side, 0.86, 0.028, 0.028), DARK, outline=0)
    c.paint(box(u, v, 0, 0.73, 0.11, 0.02), DARK, outline=0)


def _cat(c: Canvas) -> None:
    u, v = c.u, c.v
    tail = torch.maximum(ellipse(u, v, 0.30, 0.26, 0.17, 0.22).abs() - 0.04, 0.2 - u)
    c.paint(tail)
    c.paint(ellipse(u, v, 0, 0.25, 0.27, 0.26))
    c.paint(polygon(u, v, (-0.27, 0.70), (-0.06, 0.80), (-0.25, 1.0)))
    c.paint(polygon(u, v, (0.06, 0.80), (0.27, 0.70), (0.25, 1.0)))
    c.paint(ellipse(u, v, 0, 0.64, 0.29, 0.25))
    for side in (-1, 1):
        c.paint(ellipse(u, v, 0.12 * side, 0.69, 0.05, 0.07), (0.75, 0.95, 0.35))
        c.paint(ellipse(u, v, 0.12 * side, 0.69, 0.02, 0.05), DARK, outline=0)
        c.paint(ellipse(u, v, 0.10 * side, 0.05, 0.09, 0.05), shade=1.15)
    c.paint(polygon(u, v, (0.0, 0.555), (0.05, 0.605), (-0.05, 0.605)), (0.95, 0.45, 0.50), outline=0)


PAINTERS: dict[str, Callable[[Canvas], None]] = {
    "house": _house,
    "tower": _tower,
    "tree": _tree,
    "mushroom": _mushroom,
    "car": _car,
    "boat": _boat,
    "ball": _ball,
    "star": _star,
    "cup": _cup,
    "rocket": _rocket,
    "robot": _robot,
    "cat": _cat,
}

TOPS: dict[str, tuple[float, float]] = {
    "house": (0.0, 0.95),
    "tower": (0.0, 0.97),
    "tree": (0.0, 0.97),
    "mushroom": (0.0, 0.97),
    "car": (-0.01, 0.71),
    "boat": (-0.02, 0.96),
    "ball": (0.0, 0.78),
    "star": (0.0, 0.86),
    "cup": (0.0, 0.77),
    "rocket": (0.0, 0.95),
    "robot": (0.0, 0.98),
    "cat": (0.0, 0.86),
}
"""Where an attachment stands on a body of each kind: `(u, v)`."""


def paint_flag(c: Canvas, u: Tensor, v: Tensor) -> None:
    """Draws a pole with a waving flag; `u`, `v` `[n, H, W]` are relative to the body's top."""
    wave = 0.02 * torch.sin(14 * u)
    c.paint(box(u, v, 0, 0.18, 0.022, 0.24), METAL)
    cloth = box(u, v - wave, 0.19, 0.29, 0.17, 0.115)
    c.paint(cloth, (0.90, 0.10, 0.45))
    c.paint(torch.maximum(cloth + OUTLINE, (v - wave - 0.29).abs() - 0.035), (1.0, 1.0, 1.0), outline=0)


def paint_hat(c: Canvas, u: Tensor, v: Tensor) -> None:
    """Draws a black top hat with a light band; `u`, `v` `[n, H, W]` are relative to the body's top."""
    c.paint(polygon(u, v, (-0.15, 0.04), (0.15, 0.04), (0.18, 0.33), (-0.18, 0.33)), (0.20, 0.19, 0.22))
    c.paint(box(u, v, 0, 0.105, 0.155, 0.04), (0.92, 0.92, 0.85), outline=0)
    c.paint(ellipse(u, v, 0, 0.03, 0.30, 0.055), (0.20, 0.19, 0.22))


def paint_crown(c: Canvas, u: Tensor, v: Tensor) -> None:
    """Draws a golden crown with three jewels; `u`, `v` `[n, H, W]` are relative to the body's top."""
    spikes = torch.stack(
        [polygon(u, v, (x - 0.09, 0.05), (x + 0.09, 0.05), (x * 1.25, 0.30)) for x in (-0.16, 0.0, 0.16)]
    ).amin(0)
    c.paint(torch.minimum(spikes, box(u, v, 0, 0.04, 0.24, 0.07)), GOLD)
    for x, jewel in ((-0.14, (0.9, 0.1, 0.2)), (0.0, (0.1, 0.5, 0.95)), (0.14, (0.9, 0.1, 0.2))):
        c.paint(ellipse(u, v, x, 0.04, 0.035, 0.035), jewel, outline=0)


def paint_snow(c: Canvas, u: Tensor, v: Tensor) -> None:
    """Draws a thick cap of snow with drips; `u`, `v` `[n, H, W]` are relative to the body's top."""
    drips = 0.045 * torch.cos(24 * u)
    cap = torch.maximum(ellipse(u, v, 0, -0.10, 0.31, 0.24), (-0.11 + drips) - v)
    c.paint(cap, SNOW)


ATTACHMENT_PAINTERS: dict[str, Callable[[Canvas, Tensor, Tensor], None]] = {
    "flag": paint_flag,
    "hat": paint_hat,
    "crown": paint_crown,
    "snow": paint_snow,
}
