"""Edit masks: where an image may change, as booleans on the latent grid.

A mask is found from the latents that two runs have in common (`difference_map`, `automatic_mask`, `paper_mask`) or
given by the user (`user_mask`). `runtime/plan.py` carries it to the coarser levels of a U-Net.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fisedit.errors import InvalidMaskError, MaskBatchError, UnknownOptionError

BINS = 256
ARRAY, PICTURE = "a dense array of bool, integer or real values", "a readable picture, grey, colored or with alpha"
WHOLE_PIXELS = "a whole number of latent pixels >= 0"
# Two runs that differ by less than this share of their largest value differ by rounding alone.
ROUNDING = 1e-3


def paper_mask(recorded: Sequence[Tensor], edited: Sequence[Tensor], window: tuple[int, int] = (5, 10)) -> Tensor:
    """The mask of the FISEdit paper and its released code, exactly.

    Per step, |X_t - Y_t| is summed over channels and min-max normalised; the steps of the window are summed, min-max
    normalised again and cut to 8 bit; Otsu's threshold; then a 2x2 erosion and a 2x2 dilation, both anchored at the
    lower right cell as OpenCV does for even kernels. Computed in float64. (Section "Fine-Grained Mask Generation"; the
    paper names steps 5 to 10, its code sums steps 1 to 10.)

    Args:
        recorded: latents after each step of the recorded run, step 1 first, each `[1, C, H, W]`.
        edited: the same of the edited run.
        window: first and last step, counted from 1, both included: the paper's t1 and t2.

    Returns:
        bool `[H, W]`. All false where the runs do not differ.

    Raises:
        MaskBatchError: more than one sample.
        UnknownOptionError: a window outside the given steps.
    """
    steps = _step_differences(recorded, edited, window)  # [B, T, H, W]
    if steps.shape[0] != 1:
        raise MaskBatchError(given=steps.shape[0], what="samples")
    total = _min_max(torch.stack([_min_max(step) for step in steps[0]]).sum(0))  # [H, W]
    levels = (total * 255).to(torch.uint8)
    counts = torch.bincount(levels.flatten(), minlength=BINS)
    return _even_dilate(~_even_dilate(~(levels > _otsu_level(counts))))


def difference_map(
    recorded: Sequence[Tensor], edited: Sequence[Tensor], window: tuple[int, int] = (5, 10), *, quantile: float = 0.99
) -> Tensor:
    """How much two runs differ at each latent pixel, averaged over the steps of a window.

    Per step and sample, |X_t - Y_t| is summed over channels and divided by its white level: its `quantile`, so that no
    single pixel sets the scale, but at least a quarter of its peak, so that a change of a few pixels does. Steps that
    differ by rounding alone count as zero.

    Args:
        recorded: latents after each step of the recorded run, step 1 first, each `[B, C, H, W]`.
        edited: the same of the edited run.
        window: first and last step, counted from 1, both included.
        quantile: the share of pixels below the white level, in 0..1.

    Returns:
        float32 `[B, H, W]` in 0..1; zero where the runs are equal, one where every pixel differs alike.

    Raises:
        UnknownOptionError: a window outside the given steps.
    """
    steps = _step_differences(recorded, edited, window)  # [B, T, H, W]
    size = _step_differences(recorded, [torch.zeros_like(x) for x in recorded], window).amax((-2, -1))  # [B, T]
    peak = steps.amax((-2, -1))  # [B, T]
    white = torch.quantile(steps.flatten(2), quantile, dim=-1)  # [B, T]
    white = torch.maximum(white, peak / 4).clamp_min(torch.finfo(steps.dtype).tiny)
    scaled = (steps / white[..., None, None]).clamp_max(1)
    differs = peak > ROUNDING * size  # [B, T]
    return torch.where(differs[..., None, None], scaled, 0).mean(1).float()  # [B, H, W]


def automatic_mask(
    recorded: Sequence[Tensor],
    edited: Sequence[Tensor],
    *,
    window: tuple[int, int] = (5, 10),
    threshold: Literal["otsu"] | float = "otsu",
    smooth: float = 1.0,
    dilation: int = 1,
    min_area: int | None = None,
) -> Tensor:
    """The region that an edit changes, found from the first steps of both runs: the default mask.

    `difference_map`, smoothed, thresholded, without specks and pinholes, dilated.

    Args:
        recorded: latents after each step of the recorded run, step 1 first, each `[B, C, H, W]`.
        edited: the same of the edited run.
        window: first and last step, counted from 1, both included.
        threshold: "otsu", or the value in 0..1 above which a pixel of the smoothed map is active.
        smooth: standard deviation of the Gaussian, in latent pixels; 0 for none.
        dilation: how far the region grows to all sides, in latent pixels.
        min_area: regions and holes of fewer latent pixels are dropped and filled; the largest region always stays.
            By default a thousandth of the picture.

    Returns:
        bool `[B, H, W]`; empty for a sample whose runs are equal, full for one that differs alike everywhere.

    Raises:
        UnknownOptionError: a window outside the given steps, a threshold or a size out of its range.
    """
    check_mask_options(threshold, smooth, dilation, min_area)
    maps = difference_map(recorded, edited, window)  # [B, H, W]
    if min_area is None:
        min_area = round(maps[0].numel() / 1000)
    masks = [_region(values, threshold, smooth, min_area) for values in maps]
    return dilate(torch.stack(masks), dilation)


def _region(values: Tensor, threshold: Literal["otsu"] | float, smooth: float, min_area: int) -> Tensor:
    """The active region `[H, W]` of one difference map."""
    if values.amin() == values.amax():  # no pixel stands out: nothing changed, or everything did alike
        return values > (0 if threshold == "otsu" else threshold)
    values = _gaussian(values, smooth)
    active = values > (otsu_threshold(values) if threshold == "otsu" else threshold)
    kept = _drop_small(active, min_area, diagonal=True, keep_largest=True)
    return ~_drop_small(~kept, min_area, diagonal=False, keep_largest=False)


def otsu_threshold(values: Tensor) -> float:
    """Otsu's threshold over 256 bins between the least and the largest value.

    The split into `values <= threshold` and `values > threshold` has the largest variance between its two classes
    (paper, section "Fine-Grained Mask Generation"), each value counted as its bin.

    Args:
        values: real, any shape, finite, not empty.

    Returns:
        The largest value of the lower class; for constant values that constant, so that none lies above.
    """
    low, high = values.amin(), values.amax()
    if low == high:
        return low.item()
    bins = ((values.double() - low) / (high.double() - low) * BINS).long().clamp_max(BINS - 1)
    level = _otsu_level(torch.bincount(bins.flatten(), minlength=BINS))
    return values[bins <= level].amax().item()


def user_mask(mask: Tensor | np.ndarray | Image.Image | str | Path, size: tuple[int, int]) -> Tensor:
    """A mask as people give it, on the latent grid.

    - Tensors and arrays `[H, W]`, `[1, H, W]`, `[1, 1, H, W]` or `[H, W, 1]`: bool; floats in 0..1, active above one
      half; integers 0 and 1; uint8 also 0..255, active above 127 if any value is above 1.
    - Pictures, or the path of one: the alpha channel if there is one that is not opaque throughout, else the
      luminance; then as uint8.

    A latent pixel is active if any active part of the mask lies in it, whatever the two sizes are.

    Args:
        mask: the mask, of any size.
        size: (H, W) of the latents.

    Returns:
        bool `[H, W]` on the CPU, or on the device of a tensor that was given.

    Raises:
        InvalidMaskError: wrong type, shape, dtype or values, NaN, or a file that is no picture.
        MaskBatchError: several masks in one array `[B, 1, H, W]`.
    """
    if isinstance(mask, str | Path):
        mask = _open_image(mask)
    if isinstance(mask, Image.Image):
        mask = _image_values(mask)
    active = _as_bool(mask if isinstance(mask, Tensor) else _as_tensor(mask))  # [H, W]
    return F.adaptive_max_pool2d(active[None].float(), size)[0].bool()


def dilate(mask: Tensor, pixels: int) -> Tensor:
    """Grows a mask by `pixels` to all sides, diagonals included.

    Args:
        mask: bool `[..., H, W]`.
        pixels: how far, >= 0.

    Returns:
        bool `[..., H, W]`.

    Raises:
        UnknownOptionError: `pixels` is negative or no whole number.
    """
    if not is_whole(pixels, 0):
        raise UnknownOptionError(option="dilation", given=pixels, allowed=WHOLE_PIXELS)
    pixels = min(int(pixels), max(mask.shape[-2:]))
    maps = mask.float().reshape(-1, 1, *mask.shape[-2:])  # [N, 1, H, W]
    return F.max_pool2d(maps, 2 * pixels + 1, stride=1, padding=pixels).reshape(mask.shape).bool()


def check_mask_options(threshold: object, smooth: object, dilation: object, min_area: object) -> None:
    """Raise unless the options of :func:`automatic_mask` are what it takes.

    Raises:
        UnknownOptionError: names the option, its value and what it takes.
    """
    if not (isinstance(threshold, str) and threshold == "otsu") and not _is_number(threshold, 1):
        raise UnknownOptionError(option="threshold", given=threshold, allowed="'otsu' or a number in 0..1")
    if not _is_number(smooth, math.inf):
        raise UnknownOptionError(option="smooth", given=smooth, allowed="a number of latent pixels >= 0")
    if not is_whole(dilation, 0):
        raise UnknownOptionError(option="dilation", given=dilation, allowed=WHOLE_PIXELS)
    if min_area is not None and not is_whole(min_area, 0):
        raise UnknownOptionError(option="min_area", given=min_area, allowed=f"None or {WHOLE_PIXELS}")


def is_whole(value: object, least: int) -> bool:
    """Whether ``value`` is a whole number of at least ``least``; true and false are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= least


def _is_number(value: object, most: float) -> bool:
    """Whether ``value`` is a finite number in 0..most."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    return bool(0 <= value <= most and value != math.inf)


def _step_differences(recorded: Sequence[Tensor], edited: Sequence[Tensor], window: tuple[int, int]) -> Tensor:
    """Sum over channels of |X_t - Y_t| for the steps of the window: float64 `[B, T, H, W]`."""
    first, last = window
    available = min(len(recorded), len(edited))
    if not 1 <= first <= last <= available:
        allowed = f"a first and a last step, 1 <= first <= last <= {available}, the steps that were given"
        raise UnknownOptionError(option="window", given=window, allowed=allowed)
    pairs = zip(recorded[first - 1 : last], edited[first - 1 : last], strict=True)
    return torch.stack([(x.double() - y.double()).abs().sum(1) for x, y in pairs], dim=1)


def _min_max(values: Tensor) -> Tensor:
    """Scaled to 0..1; zero if constant."""
    span = values.amax() - values.amin()
    return (values - values.amin()) / span if span > 0 else torch.zeros_like(values)


def _otsu_level(counts: Tensor) -> int:
    """The level t of a histogram `[K]` whose split into `<= t` and `> t` has the largest variance between classes.

    The first such level; 0 if only one level is taken.
    """
    weights = counts.double().cpu()
    below = weights.cumsum(0)
    above = below[-1] - below
    mass = (weights * torch.arange(len(weights))).cumsum(0)
    # With n1, n2 and s1, s2 the counts and sums of the classes: n1 n2 (s1/n1 - s2/n2)^2 = (N s1 - n1 S)^2 / (n1 n2).
    spread = (below[-1] * mass - below * mass[-1]) ** 2
    variance = torch.where((below > 0) & (above > 0), spread / (below * above).clamp_min(1), 0)
    return int(variance.argmax())


def _even_dilate(mask: Tensor) -> Tensor:
    """Dilation `[H, W]` by OpenCV's 2x2 kernel: a pixel takes the largest of itself and its upper and left neighbors.

    The erosion is the same of the complement.
    """
    return F.max_pool2d(F.pad(mask[None].float(), (1, 0, 1, 0)), 2, stride=1)[0].bool()


def _gaussian(values: Tensor, sigma: float) -> Tensor:
    """`[H, W]` smoothed by a Gaussian cut at three standard deviations, or the map's size; the border is repeated."""
    if sigma == 0:
        return values
    radius = max(1, round(min(3 * sigma, max(values.shape))))
    offsets = torch.arange(-radius, radius + 1, device=values.device, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    smooth = F.pad(values.double()[None, None], [radius] * 4, mode="replicate")
    smooth = F.conv2d(F.conv2d(smooth, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return smooth[0, 0].float()


def _components(mask: Tensor, diagonal: bool) -> Tensor:
    """Connected components of a mask `[H, W]`: int64 `[H, W]`, 0 outside, else a number that only its component has.

    Each pixel takes the largest number among its neighbors, then the number that stands at that place, so numbers
    travel in leaps.
    """
    height, width = mask.shape
    place = torch.arange(1, height * width + 1, device=mask.device).view(height, width)
    labels = torch.where(mask, place, 0)
    while True:
        near = F.pad(labels, (1, 1, 1, 1))
        shifts = [(dy, dx) for dy in range(3) for dx in range(3) if diagonal or dy == 1 or dx == 1]
        grown = torch.stack([near[dy : dy + height, dx : dx + width] for dy, dx in shifts]).amax(0)
        grown = torch.where(mask, grown, 0)
        grown = F.pad(grown.flatten(), (1, 0))[grown]
        if torch.equal(grown, labels):
            return labels
        labels = grown


def _drop_small(mask: Tensor, min_area: int, *, diagonal: bool, keep_largest: bool) -> Tensor:
    """The mask `[H, W]` without its components of fewer than `min_area` pixels."""
    labels = _components(mask, diagonal)
    areas = torch.bincount(labels.flatten(), minlength=2)
    areas[0] = 0
    least = min(min_area, int(areas.amax())) if keep_largest else min_area
    return mask & (areas[labels] >= least)


def _open_image(path: str | Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidMaskError(given=f"the file {str(path)!r} ({error})", expected=PICTURE) from error
    return image


def _image_values(image: Image.Image) -> np.ndarray:
    """Alpha if it says anything, else luminance: uint8 `[H, W]`; as they are for pictures of floats.

    Raises:
        InvalidMaskError: a file cut short, which is noticed when its pixels are read, or a mode without luminance.
    """
    try:
        return _alpha_or_luminance(image)
    except (OSError, ValueError) as error:
        raise InvalidMaskError(given=f"a picture of mode {image.mode}: {error}", expected=PICTURE) from error


def _alpha_or_luminance(image: Image.Image) -> np.ndarray:
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if alpha.min() < 255:
            return alpha
    if image.mode.startswith("I;16"):
        return (np.asarray(image) >> 8).astype(np.uint8)
    return np.array(image if image.mode in ("F", "I") else image.convert("L"))


def _as_tensor(mask: object) -> Tensor:
    try:
        return torch.from_numpy(np.array(mask))
    except (TypeError, ValueError) as error:
        dtype = getattr(mask, "dtype", type(mask).__name__)
        raise InvalidMaskError(given=f"of type {dtype}", expected=ARRAY) from error


def _as_bool(mask: Tensor) -> Tensor:
    """The values of a mask checked and decided: bool `[H, W]`."""
    shape = list(mask.shape)
    if mask.ndim == 4:
        if shape[0] > 1:
            raise MaskBatchError(given=shape[0])
        mask = mask[0]
    if mask.ndim == 3 and mask.shape[0] == 1:
        mask = mask[0]
    elif mask.ndim == 3 and mask.shape[-1] == 1:
        mask = mask[..., 0]
    if mask.ndim != 2 or mask.numel() == 0:
        raise InvalidMaskError(given=f"of shape {shape}", expected="[H, W], [1, H, W], [1, 1, H, W] or [H, W, 1]")
    if mask.is_complex() or mask.is_quantized:
        raise InvalidMaskError(given=f"of dtype {mask.dtype}", expected=ARRAY)
    if mask.layout != torch.strided or mask.is_meta:
        raise InvalidMaskError(given=f"{mask.layout} on {mask.device}", expected=ARRAY)
    if mask.dtype == torch.bool:
        return mask
    if mask.dtype == torch.uint8:
        return mask > (127 if mask.amax() > 1 else 0)
    mask = mask.double()
    if not mask.isfinite().all():
        raise InvalidMaskError(given="not finite: it holds NaN or infinity", expected="values in 0..1")
    low, high = mask.amin().item(), mask.amax().item()
    if low < 0 or high > 1:
        raise InvalidMaskError(given=f"in {low:g}..{high:g}", expected="values in 0..1, or 0..255 as uint8")
    return mask > 0.5
