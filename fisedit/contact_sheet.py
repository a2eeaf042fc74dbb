"""Draw images side by side with captions whose changed words stand out, and a mask over an image."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

SIDES = (256, 384)
"""Images are drawn with their shorter side within this range, in pixels."""
MARGIN, LINE, TEXT = 14, 22, 16
INK, FAINT, PAPER, ACCENT = (32, 33, 36), (110, 113, 118), (255, 255, 255), (205, 28, 50)

Word = tuple[str, bool]
"""A word of a caption, and whether it stands out."""


@dataclass(frozen=True)
class Panel:
    """An image of a sheet; ``caption`` stands under it, one :data:`Word` after another."""

    image: Image.Image
    caption: Sequence[Word] = field(default=())

    @staticmethod
    def plain(image: Image.Image, caption: str) -> Panel:
        return Panel(image, [(word, False) for word in caption.split()])


def changed_words(before: str, after: str) -> tuple[list[Word], list[Word]]:
    """Both prompts as words; those that the other lacks stand out."""
    words = before.split(), after.split()
    bare = [[word.strip(",.;:!?").lower() for word in prompt] for prompt in words]
    kept = difflib.SequenceMatcher(None, bare[0], bare[1], autojunk=False).get_matching_blocks()
    kept_old = {block.a + i for block in kept for i in range(block.size)}
    kept_new = {block.b + i for block in kept for i in range(block.size)}
    old = [(word, i not in kept_old) for i, word in enumerate(words[0])]
    return old, [(word, i not in kept_new) for i, word in enumerate(words[1])]


def draw_contact_sheet(rows: Sequence[Sequence[Panel]], headings: Sequence[str] = ()) -> Image.Image:
    """Rows of captioned images on one sheet.

    Args:
        rows: for each row its panels; small images are enlarged and large ones reduced, see :data:`SIDES`.
        headings: one above each column, or none.
    Returns:
        an RGB image.
    """
    font = ImageFont.load_default(TEXT)
    rows = [[Panel(fit(panel.image), panel.caption) for panel in row] for row in rows]
    cell = max(panel.image.width for row in rows for panel in row)
    captions = [[_wrap(panel.caption, font, cell) for panel in row] for row in rows]
    pictures = [max(panel.image.height for panel in row) for row in rows]
    texts = [max(map(len, row)) * LINE for row in captions]
    head = LINE + MARGIN // 2 if headings else 0
    width = max(map(len, rows)) * (cell + MARGIN) + MARGIN
    height = head + MARGIN + sum(a + b + MARGIN + MARGIN // 2 for a, b in zip(pictures, texts, strict=True))
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        draw.text((MARGIN + column * (cell + MARGIN), MARGIN), heading, FAINT, font)
    top = head + MARGIN
    for row, lines, picture, text in zip(rows, captions, pictures, texts, strict=True):
        for column, panel in enumerate(row):
            left = MARGIN + column * (cell + MARGIN)
            sheet.paste(panel.image, (left, top))
            for number, line in enumerate(lines[column]):
                _draw_words(draw, (left, top + picture + MARGIN // 2 + number * LINE), line, font)
        top += picture + text + MARGIN + MARGIN // 2
    return sheet


def overlay_mask(image: Image.Image, mask: Tensor) -> Image.Image:
    """``image`` in full color inside ``mask`` (bool ``[H, W]``, any resolution), grey and pale outside, edge drawn.

    Returns:
        an RGB image of a size that a contact sheet draws as it is.
    """
    image = fit(image)
    inside = mask_image(mask, image.size)
    grey = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, PAPER), 0.6)
    out = Image.composite(image, grey, inside)
    edge = ImageChops.difference(inside.filter(ImageFilter.MaxFilter(5)), inside)
    out.paste(ACCENT, mask=edge)
    return out


def mask_image(mask: Tensor, size: tuple[int, int]) -> Image.Image:
    """A mask (bool ``[H, W]``) as a picture of (width, height): white where the image may change."""
    pixels = Image.fromarray(mask.cpu().numpy().astype("uint8") * 255)
    return pixels.resize(size, Image.Resampling.NEAREST)


def fit(image: Image.Image) -> Image.Image:
    """An RGB copy whose shorter side lies within :data:`SIDES`."""
    short = min(image.size)
    factor = min(max(short, SIDES[0]), SIDES[1]) / short
    size = (round(image.width * factor), round(image.height * factor))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _wrap(words: Sequence[Word], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[list[Word]]:
    """The words in lines of at most ``width`` pixels; a word that is longer has a line of its own."""
    lines: list[list[Word]] = []
    for word in words:
        if lines and font.getlength(" ".join(w for w, _ in [*lines[-1], word])) <= width:
            lines[-1].append(word)
        else:
            lines.append([word])
    return lines


def _draw_words(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    words: Sequence[Word],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    left, top = float(place[0]), place[1]
    for word, stands_out in words:
        draw.text((left, top), word, ACCENT if stands_out else INK, font)
        if stands_out:  # underlined too, for those who cannot tell the color
            draw.line((left, top + LINE - 3, left + font.getlength(word), top + LINE - 3), ACCENT, 2)
        left += font.getlength(word + " ")
