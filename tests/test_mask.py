"""Masks against OpenCV, against loops, and on pictures whose answer is known."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fisedit.errors import FISEditError, InvalidMaskError, MaskBatchError, UnknownOptionError
from fisedit.mask import (
    _components,
    _otsu_level,
    automatic_mask,
    difference_map,
    dilate,
    otsu_threshold,
    paper_mask,
    user_mask,
)


def random_runs(seed, steps=10, batch=1, size=(24, 30)):
    """Two runs `[B, 4, H, W]` a step that drift apart, most of all in a rectangle."""
    generator = torch.Generator().manual_seed(seed)
    recorded = [torch.randn(batch, 4, *size, generator=generator) for _ in range(steps)]
    where = torch.zeros(batch, 1, *size)
    for sample in range(batch):
        y, x = (int(torch.randint(0, n // 2, (), generator=generator)) for n in size)
        where[sample, :, y : y + size[0] // 3, x : x + size[1] // 3] = 1
    noise = [torch.randn(batch, 4, *size, generator=generator) for _ in range(steps)]
    return recorded, [x + 0.02 * t * n * (0.1 + where) for t, (x, n) in enumerate(zip(recorded, noise, strict=True), 1)]


def opencv_paper_mask(recorded, edited, window):
    """The paper's mask in numpy and OpenCV."""
    total = 0
    for x, y in zip(recorded[window[0] - 1 : window[1]], edited[window[0] - 1 : window[1]], strict=True):
        diff = np.abs(x[0].double().numpy() - y[0].double().numpy()).sum(axis=0)
        total = total + (diff - diff.min()) / (diff.max() - diff.min())
    levels = ((total - total.min()) / (total.max() - total.min()) * 255).astype(np.uint8)
    _, mask = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    kernel = np.ones((2, 2), np.uint8)
    return cv2.dilate(cv2.erode(mask, kernel), kernel) == 255


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("window", [(1, 10), (5, 10), (3, 3)])
def test_paper_mask_is_opencvs(seed, window):
    recorded, edited = random_runs(seed, size=(9 + seed, 31 - seed // 2))
    mask = paper_mask(recorded, edited, window)
    expected = opencv_paper_mask(recorded, edited, window)
    assert mask.dtype == torch.bool and np.array_equal(mask.numpy(), expected)
    assert 0 < expected.mean() < 1


def test_paper_mask_of_equal_runs_is_empty():
    recorded, _ = random_runs(0)
    assert not paper_mask(recorded, recorded).any()


def test_paper_mask_takes_one_sample():
    with pytest.raises(MaskBatchError, match="2 samples"):
        paper_mask(*random_runs(0, batch=2))


@pytest.mark.parametrize("seed", range(30))
def test_otsu_level_is_opencvs(seed):
    levels = np.random.default_rng(seed).integers(0, 2 + 8 * seed, (20, 20)).astype(np.uint8)
    levels[5:9, 5:9] = np.minimum(levels[5:9, 5:9] + 90, 255)
    threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    ours = _otsu_level(torch.from_numpy(np.bincount(levels.ravel(), minlength=256)))
    assert np.array_equal(levels > ours, levels > threshold)


def brute_force_otsu(values):
    """The best variance between two classes over all splits at the edges of 256 bins, each value at its bin."""
    scaled = (values.astype(np.float64) - values.min()) / (float(values.max()) - float(values.min())) * 256
    bins = np.minimum(np.floor(scaled), 255)
    best = 0.0
    for edge in range(255):
        low, high = bins[bins <= edge], bins[bins > edge]
        if len(low) and len(high):
            best = max(best, len(low) * len(high) / len(bins) ** 2 * (low.mean() - high.mean()) ** 2)
    return best, bins


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=60))
def test_otsu_threshold_splits_best(numbers):
    values = np.array(numbers, np.float32)
    threshold = otsu_threshold(torch.from_numpy(values))
    if values.min() == values.max():
        assert threshold == values[0]
        return
    best, bins = brute_force_otsu(values)
    low, high = bins[values <= threshold], bins[values > threshold]
    assert len(low) and len(high)
    variance = len(low) * len(high) / len(bins) ** 2 * (low.mean() - high.mean()) ** 2
    assert variance == pytest.approx(best, rel=1e-9)


def rectangle_runs(box, size=(40, 48), change=0.5, noise=0.02, batch=1):
    """Ten steps in which only a box differs, but for a little noise everywhere."""
    generator = torch.Generator().manual_seed(1)
    recorded = [torch.randn(batch, 4, *size, generator=generator) for _ in range(10)]
    top, bottom, left, right = box
    edited = []
    for x in recorded:
        y = x + noise * torch.randn(x.shape, generator=generator)
        y[..., top:bottom, left:right] += change
        edited.append(y)
    return recorded, edited


@pytest.mark.parametrize("box", [(5, 20, 8, 30), (0, 10, 0, 10), (18, 22, 30, 34), (0, 40, 20, 48)])
def test_automatic_mask_is_the_changed_box(box):
    top, bottom, left, right = box
    expected = torch.zeros(40, 48, dtype=torch.bool)
    expected[top:bottom, left:right] = True
    mask = automatic_mask(*rectangle_runs(box), dilation=0)[0]
    # Smoothing may round the corners and move an edge by one pixel.
    assert torch.equal(dilate(mask, 1) & expected, expected)
    assert not (mask & ~dilate(expected, 1)).any()


def test_automatic_mask_grows_by_dilation():
    runs = rectangle_runs((10, 20, 10, 20))
    assert torch.equal(automatic_mask(*runs, dilation=3), dilate(automatic_mask(*runs, dilation=0), 3))


def test_automatic_mask_is_steadier_than_the_papers_under_an_outlier():
    recorded, edited = rectangle_runs((10, 25, 10, 25))
    for y in edited:
        y[:, :, 35, 40] += 50.0
    box = torch.zeros(40, 48, dtype=torch.bool)
    box[10:25, 10:25] = True
    ours, papers = automatic_mask(recorded, edited, dilation=0)[0], paper_mask(recorded, edited)
    assert (ours & box).sum() > 0.9 * box.sum()
    assert not (papers & box).any()


def test_automatic_mask_of_equal_runs_is_empty_and_of_rounding_too():
    recorded, _ = random_runs(0, batch=2)
    assert not automatic_mask(recorded, recorded).any()
    assert not automatic_mask(recorded, [x * (1 + 1e-6) for x in recorded]).any()


def test_automatic_mask_of_a_change_alike_everywhere_is_full():
    recorded = [torch.zeros(1, 4, 8, 8)] * 10
    assert automatic_mask(recorded, [x + 0.25 for x in recorded]).all()


def test_automatic_mask_is_made_for_each_sample_alone():
    recorded, edited = random_runs(3, batch=3)
    edited = [torch.cat([y[:2], x[2:]]) for x, y in zip(recorded, edited, strict=True)]
    together = automatic_mask(recorded, edited)
    for sample in range(3):
        alone = automatic_mask([x[sample : sample + 1] for x in recorded], [y[sample : sample + 1] for y in edited])
        assert torch.equal(together[sample : sample + 1], alone)
    assert together[0].any() and together[1].any() and not together[2].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3, 1)])
def test_automatic_mask_of_tiny_latents(size):
    recorded = [torch.zeros(1, 4, *size)] * 10
    edited = [x.clone() for x in recorded]
    for y in edited:
        y[..., 0, 0] = 1.0
    assert automatic_mask(recorded, edited)[0, 0, 0]


def test_automatic_mask_drops_specks_and_fills_pinholes():
    recorded, edited = rectangle_runs((10, 30, 10, 30), noise=0.0)
    for x, y in zip(recorded, edited, strict=True):
        y[..., 2, 40] += 0.5  # a speck
        y[..., 20, 20] = x[..., 20, 20]  # a pinhole
    options = {"smooth": 0.0, "dilation": 0}
    expected = torch.zeros(1, 40, 48, dtype=torch.bool)
    expected[:, 10:30, 10:30] = True
    assert torch.equal(automatic_mask(recorded, edited, **options, min_area=2), expected)
    raw = automatic_mask(recorded, edited, **options, min_area=0)
    assert raw[0, 2, 40] and not raw[0, 20, 20]


def test_pixels_that_touch_at_corners_are_one_region_but_not_one_hole():
    recorded, edited = rectangle_runs((10, 30, 10, 30), noise=0.0)
    for x, y in zip(recorded, edited, strict=True):
        for step in range(2):
            y[..., 2 + step, 40 + step] += 0.5
            y[..., 20 + step, 20 + step] = x[..., 20 + step, 20 + step]
    mask = automatic_mask(recorded, edited, smooth=0.0, dilation=0, min_area=2)[0]
    assert mask[2, 40] and mask[3, 41] and mask[20, 20] and mask[21, 21]


def test_by_default_regions_below_a_thousandth_are_dropped():
    recorded, edited = rectangle_runs((10, 30, 10, 30), size=(50, 60), noise=0.0)
    for y in edited:
        y[..., 2, 40:42] += 0.5
        y[..., 2, 50:53] += 0.5
    mask = automatic_mask(recorded, edited, smooth=0.0, dilation=0)[0]
    assert not mask[2, 40:42].any() and mask[2, 50:53].all()


def test_the_largest_region_always_stays():
    recorded, edited = rectangle_runs((10, 11, 10, 11), noise=0.0)
    mask = automatic_mask(recorded, edited, smooth=0.0, dilation=0, min_area=50)
    assert mask.nonzero().tolist() == [[0, 10, 10]]


def test_a_threshold_of_ones_own():
    recorded, edited = rectangle_runs((10, 20, 10, 20), noise=0.0)
    values = difference_map(recorded, edited)
    for threshold in (0.2, 0.9):
        mask = automatic_mask(recorded, edited, threshold=threshold, smooth=0.0, dilation=0, min_area=0)
        assert torch.equal(mask, values > threshold)
    assert not automatic_mask(recorded, edited, threshold=1.0).any()


def test_difference_map_reads_only_its_window():
    recorded, edited = random_runs(5)
    blank = [torch.full_like(x, float("nan")) for x in recorded]
    expected = difference_map(recorded, edited, (5, 10))
    assert torch.equal(difference_map(blank[:4] + recorded[4:], edited, (5, 10)), expected)
    assert expected.shape == (1, 24, 30) and expected.dtype == torch.float32
    assert expected.amin() >= 0 and expected.amax() <= 1


def test_difference_map_weighs_steps_alike():
    recorded, edited = random_runs(6)
    louder = [x + (y - x) * (1 + t) for t, (x, y) in enumerate(zip(recorded, edited, strict=True))]
    torch.testing.assert_close(difference_map(recorded, louder), difference_map(recorded, edited))


def test_difference_map_of_a_few_pixels_stays_dark_elsewhere():
    recorded, edited = rectangle_runs((18, 22, 30, 34), size=(64, 64))  # 0.4 % of the picture
    values = difference_map(recorded, edited)[0]
    assert values[18:22, 30:34].amin() > 0.9
    assert values.mean() < 0.2


@pytest.mark.parametrize(
    "options",
    [{"window": (0, 5)}, {"window": (5, 11)}, {"window": (6, 5)}, {"threshold": 1.5}, {"threshold": "otus"}]
    + [{"threshold": float("nan")}, {"threshold": True}, {"threshold": torch.tensor([0.2, 0.3])}]
    + [{"smooth": -1.0}, {"smooth": float("nan")}, {"smooth": float("inf")}, {"smooth": "1"}]
    + [{"dilation": -1}, {"dilation": 0.5}, {"dilation": True}, {"min_area": -1}, {"min_area": 2.5}],
)
def test_automatic_mask_refuses_options_out_of_range(options):
    with pytest.raises(UnknownOptionError, match=next(iter(options))):
        automatic_mask(*random_runs(0), **options)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_components_are_opencvs(seed, diagonal):
    mask = torch.from_numpy(np.random.default_rng(seed).random((17, 23)) < 0.3 + 0.04 * seed)
    labels = _components(mask, diagonal).numpy()
    count, expected = cv2.connectedComponents(mask.numpy().astype(np.uint8), connectivity=8 if diagonal else 4)
    assert np.array_equal(labels > 0, expected > 0)
    assert len(set(zip(labels.ravel(), expected.ravel(), strict=True))) == count == len(np.unique(labels))


@pytest.mark.parametrize("pixels", [0, 1, 2, 7])
def test_dilate_is_opencvs(pixels):
    mask = np.random.default_rng(pixels).random((13, 9)) < 0.05
    kernel = np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)
    expected = cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)
    grown = dilate(torch.from_numpy(mask)[None, None].repeat(2, 3, 1, 1), pixels)
    assert grown.shape == (2, 3, 13, 9) and np.array_equal(grown[1, 2].numpy(), expected)
    assert np.array_equal(dilate(torch.from_numpy(mask), pixels).numpy(), expected)


def test_radii_far_beyond_the_picture_cost_no_more_than_its_size():
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[0, 0] = True
    assert dilate(mask, 10**12).all()
    recorded, edited = random_runs(0)
    assert automatic_mask(recorded, edited, smooth=1e12).shape == (1, 24, 30)


masks = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32)).map(
    lambda t: torch.rand(t[0], t[1], generator=torch.Generator().manual_seed(t[2])) < 0.2
)


@given(masks, st.integers(1, 12), st.integers(1, 12))
def test_user_mask_is_active_where_anything_active_lies(mask, height, width):
    expected = torch.zeros(height, width, dtype=torch.bool)
    for y, x in mask.nonzero().tolist():
        for i in range(height):
            for j in range(width):
                # Pixel y covers [y, y + 1) / rows of the picture, pixel i covers [i, i + 1) / height.
                rows, columns = mask.shape
                expected[i, j] |= (y * height < (i + 1) * rows and i * rows < (y + 1) * height) and (
                    x * width < (j + 1) * columns and j * columns < (x + 1) * width
                )
    assert torch.equal(user_mask(mask, (height, width)), expected)


SQUARE = np.zeros((32, 48), bool)
SQUARE[8:16, 8:16] = True
ON_GRID = torch.zeros(4, 6, dtype=torch.bool)
ON_GRID[1, 1] = True


def rgba(alpha):
    white = np.where(SQUARE[..., None], 255, 0).astype(np.uint8).repeat(3, axis=-1)
    return Image.fromarray(np.concatenate([white, alpha[..., None].astype(np.uint8)], axis=-1), "RGBA")


@pytest.mark.parametrize(
    "given_mask",
    {
        "bool": SQUARE,
        "float": SQUARE.astype(np.float64),
        "half": torch.from_numpy(SQUARE).half(),
        "bfloat16": torch.from_numpy(SQUARE).bfloat16() * 0.75,
        "int64": SQUARE.astype(np.int64),
        "uint8, 0 and 1": SQUARE.astype(np.uint8),
        "uint8, 0 and 255": SQUARE.astype(np.uint8) * 255,
        "uint8, grey": np.where(SQUARE, 128, 127).astype(np.uint8),
        "soft": np.where(SQUARE, 0.51, 0.5),
        "[1, H, W]": SQUARE[None],
        "[1, 1, H, W]": torch.from_numpy(SQUARE)[None, None],
        "[H, W, 1]": SQUARE[..., None],
        "tensor with gradient": torch.from_numpy(SQUARE).float().requires_grad_(),
        "not contiguous": np.asfortranarray(SQUARE),
        "L": Image.fromarray(SQUARE.astype(np.uint8) * 255),
        "1": Image.fromarray(SQUARE),
        "P": Image.fromarray(SQUARE.astype(np.uint8) * 255).convert("P"),
        "F": Image.fromarray(SQUARE.astype(np.float32)),
        "I;16": Image.fromarray(SQUARE.astype(np.uint16) * 65535),
        "RGB": Image.fromarray(SQUARE.astype(np.uint8) * 255).convert("RGB"),
        "RGBA, opaque: luminance": rgba(np.full_like(SQUARE, 255, np.uint8)),
        "RGBA: alpha": Image.merge("RGBA", [Image.new("L", (48, 32))] * 3 + [Image.fromarray(np.uint8(SQUARE * 255))]),
    }.items(),
    ids=lambda item: item[0],
)
def test_user_mask_takes_what_people_have(given_mask):
    assert torch.equal(user_mask(given_mask[1], (4, 6)), ON_GRID)


def test_user_mask_opens_files(tmp_path):
    Image.fromarray(SQUARE).save(tmp_path / "mask.png")
    assert torch.equal(user_mask(tmp_path / "mask.png", (4, 6)), ON_GRID)
    assert torch.equal(user_mask(str(tmp_path / "mask.png"), (4, 6)), ON_GRID)
    (tmp_path / "note.txt").write_text("no picture")
    whole = (tmp_path / "mask.png").read_bytes()
    (tmp_path / "cut short.png").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "folder.png").mkdir()
    for name in ("note.txt", "missing.png", "cut short.png", "folder.png"):
        with pytest.raises(InvalidMaskError, match=name):
            user_mask(tmp_path / name, (4, 6))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros(7), r"of shape \[7\]"),
        (np.zeros((3, 8, 9)), r"of shape \[3, 8, 9\]"),
        (np.zeros((0, 4)), r"of shape \[0, 4\]"),
        (np.float64(1), r"of shape \[\]"),
        (np.zeros((4, 4), complex), "complex"),
        (np.full((4, 4), "a"), "of type <U1"),
        ([[1], [1, 0]], "of type list"),
        (b"mask", "of type bytes"),
        (object(), "of type object"),
        (np.zeros((4, 4), "datetime64[D]"), "datetime64"),
        (torch.zeros(4, 4).to_sparse(), "sparse_coo"),
        (torch.zeros(4, 4, device="meta"), "on meta"),
        ("name\0with a null byte.png", "embedded null byte"),
        (Image.new("LAB", (4, 4)), "a picture of mode LAB"),
        (Image.new("F", (4, 4), float("nan")), "NaN"),
        (np.full((4, 4), None), "object"),
        (None, "NoneType"),
        (np.full((4, 4), np.nan), "NaN"),
        (np.where(SQUARE, np.inf, 0), "infinity"),
        (np.where(SQUARE, 1.5, 0), r"0\.\.1\.5"),
        (np.where(SQUARE, -0.5, 0), r"-0\.5\.\.0"),
        (np.where(SQUARE, 255, 0), r"0\.\.255"),
        (torch.zeros(2, 1, 4, 4), "2 masks"),
    ],
)
def test_user_mask_refuses_what_is_no_mask(bad, message):
    with pytest.raises(FISEditError, match=message) as caught:
        user_mask(bad, (4, 6))
    assert isinstance(caught.value, InvalidMaskError | MaskBatchError)


def test_a_picture_that_was_opened_and_is_cut_short_is_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(tmp_path / "mask.jpg")
    whole = (tmp_path / "mask.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidMaskError, match="truncated"):
        user_mask(Image.open(tmp_path / "cut.jpg"), (4, 6))
