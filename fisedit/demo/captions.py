"""Captions of scenes, and the scenes that differ from a scene in one attribute."""

from __future__ import annotations

import random
from dataclasses import replace

from .scenes import Scene, SceneObject
from .vocabulary import ATTACHMENTS, COLORS, GROUNDS, KINDS, POSITIONS, SIZES, SKIES

_TEMPLATES = 6
PHRASINGS = 2 * _TEMPLATES
"""How many ways there are to say one scene; the second half of them names the sizes."""

_PLACES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}


def caption(scene: Scene, phrasing: int = 0) -> str:
    """Says what a scene shows, in way `phrasing` (0..PHRASINGS-1) of saying it.

    Raises ValueError for a phrasing that does not exist.
    """
    if not 0 <= phrasing < PHRASINGS:
        raise ValueError(f"phrasing must be in 0..{PHRASINGS - 1}, got {phrasing}")
    template, sized = phrasing % _TEMPLATES, phrasing >= _TEMPLATES
    objects = [(_noun_phrase(item, sized), _PLACES[item.position]) for item in scene.objects]
    ground, sky = f"on {scene.ground}", SKIES[scene.sky]
    if template == 3:
        objects.reverse()
    placed = [f"{noun} {place}" for noun, place in objects]
    if template == 0:
        return f"{_join(placed)}, {ground}, {sky}"
    if template == 1:
        return f"{ground} {sky}, {_join(placed)}"
    if template == 2:
        return f"a picture of {_join(placed)}, {sky}, {ground}"
    if template == 3:
        return f"{sky}, {_join(placed)}, {ground}"
    if template == 4:
        return ", ".join([*(f"{place} {noun}" for noun, place in objects), f"{ground} {sky}"])
    return f"{sky} there is {_join(placed)} {ground}"


def _noun_phrase(item: SceneObject, sized: bool) -> str:
    words = ["a", item.size if sized else "", item.color, item.kind, ATTACHMENTS[item.attachment]]
    return " ".join(word for word in words if word)


def _join(parts: list[str]) -> str:
    return " and ".join(parts) if len(parts) < 3 else f"{parts[0]}, {parts[1]} and {parts[2]}"


def with_object(scene: Scene, index: int, **changes: str | None) -> Scene:
    """Returns the scene with fields of object `index` replaced, objects ordered from left to right."""
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **changes)  # type: ignore[arg-type]
    return replace(scene, objects=_ordered(objects))


def moved(scene: Scene, index: int, position: str) -> Scene:
    """Returns the scene with object `index` at `position`; whatever stood there takes its old place."""
    old = scene.objects[index].position
    objects = [replace(item, position=old) if item.position == position else item for item in scene.objects]
    objects[index] = replace(scene.objects[index], position=position)
    return replace(scene, objects=_ordered(objects))


def swapped(scene: Scene, first: int, second: int, field: str) -> Scene:
    """Returns the scene in which two objects have exchanged one field (for example their colours)."""
    a, b = getattr(scene.objects[first], field), getattr(scene.objects[second], field)
    return with_object(with_object(scene, first, **{field: b}), second, **{field: a})


def _ordered(objects: list[SceneObject]) -> tuple[SceneObject, ...]:
    return tuple(sorted(objects, key=lambda item: list(POSITIONS).index(item.position)))


def alternatives(scene: Scene, attribute: str, index: int = 0) -> list[Scene]:
    """Returns the scene and every scene that differs from it in one attribute only; the true one comes first.

    `attribute` is a field of object `index` ("kind", "color", "position", "size", "attachment"), or "ground" or "sky".
    """
    choices = _CHOICES[attribute]
    if attribute in ("ground", "sky"):
        return [scene, *(replace(scene, **{attribute: c}) for c in choices if c != getattr(scene, attribute))]
    others = [c for c in choices if c != getattr(scene.objects[index], attribute)]
    if attribute == "position":
        return [scene, *(moved(scene, index, c) for c in others)]
    return [scene, *(with_object(scene, index, **{attribute: c}) for c in others)]


_CHOICES: dict[str, tuple] = {
    "kind": KINDS,
    "color": tuple(COLORS),
    "position": tuple(POSITIONS),
    "size": tuple(SIZES),
    "attachment": tuple(ATTACHMENTS),
    "ground": tuple(GROUNDS),
    "sky": tuple(SKIES),
}


def hard_negatives(scene: Scene, count: int, rng: random.Random, sized: bool) -> list[Scene]:
    """Draws scenes that are almost `scene`: one attribute replaced, or exchanged between two of its objects.

    Sizes change only if `sized`, because other phrasings do not name them.
    """
    found: list[Scene] = []
    while len(found) < count:
        index = rng.randrange(len(scene.objects))
        other = rng.randrange(len(scene.objects))
        if other != index and rng.random() < 0.6:
            candidate = swapped(scene, index, other, rng.choice(("color", "color", "kind", "attachment", "position")))
        else:
            fields = ("kind", "kind", "color", "color", "position", "attachment", "attachment", "ground", "sky")
            attribute = rng.choice((*fields, "size") if sized else fields)
            candidate = rng.choice(alternatives(scene, attribute, index)[1:])
        if candidate != scene and (sized or other == index or caption(candidate) != caption(scene)):
            found.append(candidate)
    return found
