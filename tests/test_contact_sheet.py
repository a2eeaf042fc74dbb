"""Contact sheets: what is drawn where, checked on the pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from fisedit.contact_sheet import ACCENT, SIDES, Panel, changed_words, draw_contact_sheet, fit, mask_image, overlay_mask

RED, BLUE = (200, 10, 10), (10, 10, 200)


def solid(color, size=(256, 256)):
    return Image.new("RGB", size, color)


def counted(image, color):
    """How many pixels of an image have exactly this color."""
    return int((np.asarray(image.convert("RGB")) == color).all(-1).sum())


@pytest.mark.parametrize(
    ("before", "after", "gone", "new"),
    [
        ("a red house, on grass", "a blue house, on grass", ["red"], ["blue"]),
        ("a cat, on snow", "a cat with a hat, on snow", [], ["with", "a", "hat,"]),
        ("a cat with a hat", "a cat", ["with", "a", "hat"], []),
        ("A Cat", "a cat.", [], []),
        ("", "a cat", [], ["a", "cat"]),
    ],
)
def test_words_that_the_other_prompt_lacks_stand_out(before, after, gone, new):
    old_words, new_words = changed_words(before, after)
    assert " ".join(word for word, _ in old_words) == before
    assert " ".join(word for word, _ in new_words) == after
    assert [word for word, stands_out in old_words if stands_out] == gone
    assert [word for word, stands_out in new_words if stands_out] == new


@pytest.mark.parametrize(
    ("given", "drawn"),
    [((32, 32), (256, 256)), ((64, 128), (256, 512)), ((300, 300), (300, 300)), ((1024, 768), (512, 384))],
)
def test_images_are_drawn_neither_tiny_nor_huge(given, drawn):
    assert fit(solid(RED, given)).size == drawn
    assert SIDES[0] <= min(drawn) <= SIDES[1]


def test_every_panel_is_on_the_sheet_in_its_place():
    sheet = draw_contact_sheet([[Panel(solid(RED)), Panel(solid(BLUE))], [Panel(solid(BLUE))]])
    assert counted(sheet, RED) == 256 * 256 and counted(sheet, BLUE) == 2 * 256 * 256
    middle = sheet.height // 4
    assert sheet.getpixel((sheet.width // 4, middle)) == RED
    assert sheet.getpixel((3 * sheet.width // 4, middle)) == BLUE
    assert sheet.getpixel((sheet.width // 4, 3 * middle)) == BLUE


def test_changed_words_are_drawn_in_the_accent_color():
    words = [("a", False), ("cat", False)]
    assert counted(draw_contact_sheet([[Panel(solid(RED), words)]]), ACCENT) == 0
    assert counted(draw_contact_sheet([[Panel(solid(RED), [*words, ("hat", True)])]]), ACCENT) > 40


def test_a_long_caption_makes_the_sheet_higher_and_not_wider():
    short = draw_contact_sheet([[Panel.plain(solid(RED), "a cat")]])
    long = draw_contact_sheet([[Panel.plain(solid(RED), "a cat " * 30)]])
    assert long.width == short.width and long.height > short.height + 60
    right = np.asarray(long)[:, -8:]
    assert (right == 255).all()  # nothing runs off the sheet


def test_headings_take_a_line_above():
    bare = draw_contact_sheet([[Panel(solid(RED))]])
    headed = draw_contact_sheet([[Panel(solid(RED))]], ["before"])
    assert headed.height > bare.height and headed.width == bare.width


def test_the_overlay_keeps_the_inside_and_pales_the_outside():
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:8, 4:8] = True  # pixels 64..128 of 256
    overlay = overlay_mask(solid(RED), mask)
    assert overlay.size == (256, 256)
    assert (np.asarray(overlay)[64:128, 64:128] == RED).all()
    red, green, blue = overlay.getpixel((200, 200))
    assert red == green == blue > 150
    assert overlay.getpixel((63, 96)) == ACCENT and overlay.getpixel((128, 96)) == ACCENT
    assert overlay.getpixel((20, 20)) != ACCENT


@pytest.mark.parametrize("fill", [True, False])
def test_a_full_and_an_empty_mask_have_no_edge(fill):
    assert counted(overlay_mask(solid(RED), torch.full((8, 8), fill)), ACCENT) == 0


def test_a_mask_as_a_picture_can_be_given_back_as_a_mask():
    from fisedit.mask import user_mask

    mask = torch.rand(16, 12, generator=torch.Generator().manual_seed(0)) > 0.6
    picture = mask_image(mask, (96, 128))
    assert picture.size == (96, 128)
    assert torch.equal(user_mask(picture, (16, 12)), mask)
