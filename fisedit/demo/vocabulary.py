"""The words that the demo scenes are made of, and the colours that belong to them."""

KINDS = ("house", "tower", "tree", "mushroom", "car", "boat", "ball", "star", "cup", "rocket", "robot", "cat")

COLORS = {
    "red": (0.86, 0.12, 0.10),
    "orange": (0.98, 0.52, 0.08),
    "yellow": (0.98, 0.87, 0.15),
    "green": (0.13, 0.62, 0.20),
    "blue": (0.14, 0.32, 0.90),
    "purple": (0.50, 0.16, 0.72),
    "pink": (1.00, 0.55, 0.76),
    "white": (0.96, 0.96, 0.96),
}

POSITIONS = {"left": 0.21, "middle": 0.50, "right": 0.79}
"""Position to the horizontal center of the object, in image widths."""

SIZES = {"small": 0.285, "large": 0.41}
"""Size to the height of the object's body, in image heights."""

ATTACHMENTS: dict[str | None, str] = {
    None: "",
    "flag": "with a flag",
    "hat": "with a hat",
    "crown": "with a crown",
    "snow": "with snow on top",
}
"""Attachment to the words that ask for it."""

GROUNDS = {
    "grass": (0.38, 0.66, 0.27),
    "sand": (0.88, 0.76, 0.48),
    "snow": (0.90, 0.94, 0.98),
    "water": (0.16, 0.50, 0.66),
    "stone": (0.50, 0.49, 0.49),
}

SKIES = {"noon": "at noon", "sunset": "at sunset", "night": "at night", "fog": "in fog"}
"""Time of day or weather to the words that ask for it."""

FUNCTION_WORDS = ("a", "and", "on", "in", "at", "the", "with", "top", "of", "picture", "there", "is", ",")
"""Every word of the caption templates that names no attribute."""


def scene_words() -> tuple[str, ...]:
    """Returns every word (and the comma) that a caption can contain, without repeats."""
    attachments = tuple(name for name in ATTACHMENTS if name)
    words = (*FUNCTION_WORDS, *KINDS, *COLORS, *POSITIONS, *SIZES, *attachments, *GROUNDS, *SKIES)
    return tuple(dict.fromkeys(words))
