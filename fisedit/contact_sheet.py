"""Draw images side by side with captions, and a mask over an image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, LINE, SIZE = 12, 17, 14
INK, PAPER = (32, 33, 36), (255, 255, 255)
EDGE = (226, 55, 68)

Panel = tuple[str, Image.Image]


def draw_contact_sheet(rows: Sequence[Sequence[Panel]], titles: Sequence[str] = ()) -> Image.Image:
    """Rows of captioned images on one sheet.

    Args:
        rows: for each row its panels (caption, image); images of a sheet may differ in size.
        titles: one line above each row, or none.
    Returns:
        an RGB image.
    """
    font = ImageFont.load_default(SIZE)
    width = max(image.width for row in rows for _, image in row)
    height = max(image.height for row in rows for _, image in row)
    characters = max(12, int(width / font.getlength("n")))
    captions = [[textwrap.wrap(caption, characters) or [""] for caption, _ in row] for row in rows]
    head = LINE + MARGIN // 2 if titles else 0
    heights = [head + height + MARGIN // 2 + LINE * max(map(len, row)) + MARGIN for row in captions]
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for number, row in enumerate(rows):
        if titles:
            draw.text((MARGIN, top), titles[number], INK, font)
        for column, (_, image) in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            sheet.paste(image.convert("RGB"), (left, top + head))
            for i, line in enumerate(captions[number][column]):
                draw.text((left, top + head + height + MARGIN // 2 + i * LINE), line, INK, font)
        top += heights[number]
    return sheet


def overlay_mask(image: Image.Image, mask: Tensor) -> Image.Image:
    """``image`` with everything outside ``mask`` (bool ``[H, W]``, any resolution) dimmed and the edge drawn."""
    image = image.convert("RGB")
    grid = Image.fromarray(mask.cpu().numpy().astype("uint8") * 255)
    inside = grid.resize(image.size, Image.Resampling.NEAREST)
    dimmed = Image.blend(image, Image.new("RGB", image.size, PAPER), 0.72)
    out = Image.composite(image, dimmed, inside)
    scale = max(1, image.width // mask.shape[1])
    shrunk = Image.fromarray((_shrink(mask) * 255).astype("uint8")).resize(image.size, Image.Resampling.NEAREST)
    edge = Image.composite(Image.new("L", image.size, 0), inside, shrunk) if scale > 1 else Image.new("L", image.size)
    return Image.composite(Image.blend(out, Image.new("RGB", image.size, EDGE), 0.6), out, edge)


def _shrink(mask: Tensor):
    """The mask without its outermost pixels, as an array."""
    import torch.nn.functional as F

    padded = F.pad((~mask.cpu()).float()[None, None], (1, 1, 1, 1), value=0.0)
    return (F.max_pool2d(padded, 3, 1)[0, 0] == 0).numpy()
