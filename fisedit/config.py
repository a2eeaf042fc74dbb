"""Options of ``compile`` and of an edit, checked when they are made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fisedit.errors import ScheduleTooShortError, UnknownOptionError
from fisedit.mask import check_mask_options, is_whole
from fisedit.runtime.cache.block import Kind
from fisedit.runtime.cache.tiers import Budgets
from fisedit.runtime.cost_model import COSTS, Cost


def _check(option: str, given: object, allowed: tuple[object, ...]) -> None:
    # Types first: 1 equals True, and an array compared with anything is an array.
    if not any(isinstance(given, type(value)) and given == value for value in allowed):
        raise UnknownOptionError(option=option, given=given, allowed=allowed)


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(option: str, given: str | int | None) -> int | None:
    """Bytes of a size such as ``"8GiB"``, ``"500 MB"`` or a number of bytes; ``None`` stays ``None``.

    Raises:
        UnknownOptionError: it is no size.
    """
    if given is None or (isinstance(given, int) and not isinstance(given, bool) and given >= 0):
        return given
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", given) if isinstance(given, str) else None
    if match is None or match[2].upper() not in UNITS:
        raise UnknownOptionError(option=option, given=given, allowed="a size such as '8GiB', '500MB' or bytes")
    return round(float(match[1]) * UNITS[match[2].upper()])


@dataclass(frozen=True)
class CacheConfig:
    """Where recorded feature maps lie, and which are kept.

    Args:
        gpu, host: the most that recordings of a model may take of the GPU's and the host's memory (``"8GiB"``, or
            bytes); ``None``: 60 % and 50 % of what is free, or holds recordings of it, when one begins.
        disk: a folder for what finds no room there; ``None``: none.
        storage: ``"exact"``, or ``"int8"``: feature maps in 8 bits with a scale for each row, half the memory and half
            the traffic, and edits a little less exact.
        steps: first and last step (1-based, inclusive; ``None``: the last one of the run) whose feature maps are kept.
            Edits run dense in the others. ``None`` keeps all: edits with a given mask are then sparse from the start.
        detect_steps: how many first steps can be detect steps of an edit, for which the queries of cross-attention
            are kept; ``None``: those at 45 % and more of the first timestep, or those before ``steps``.

    Raises:
        UnknownOptionError: a value that an option does not take.
    """

    gpu: str | int | None = None
    host: str | int | None = None
    disk: str | Path | None = None
    storage: Literal["exact", "int8"] = "exact"
    steps: tuple[int, int | None] | None = None
    detect_steps: int | None = None

    def __post_init__(self) -> None:
        _check("storage", self.storage, ("exact", "int8"))
        parse_size("gpu", self.gpu)
        parse_size("host", self.host)
        if self.disk is not None and not isinstance(self.disk, (str, Path)):
            raise UnknownOptionError(option="disk", given=self.disk, allowed="a folder, or None")
        if self.detect_steps is not None and not is_whole(self.detect_steps, 0):
            raise UnknownOptionError(option="detect_steps", given=self.detect_steps, allowed="None or a whole number")
        if self.steps is not None and not _is_selection(self.steps):
            allowed = "None, or (first, last), whole numbers with 1 <= first <= last; last may be None"
            raise UnknownOptionError(option="steps", given=self.steps, allowed=allowed)

    @property
    def budgets(self) -> Budgets:
        folder = None if self.disk is None else Path(self.disk)
        return Budgets(parse_size("gpu", self.gpu), parse_size("host", self.host), folder)

    def kinds(self, step: int, share: float) -> frozenset[Kind]:
        """What is kept of a step.

        Args:
            step: its number, 1-based. share: its timestep over the run's first one.
        """
        first, last = self.steps or (1, None)
        kept: set[Kind] = {"small"}
        if first <= step <= (last or step):
            kept |= {"maps", "keys"}
        detect = self.detect_steps
        if detect is None and self.steps is not None and first > 1:
            detect = first - 1
        if step <= detect if detect is not None else share >= DETECTABLE:
            kept |= {"queries"}
        return frozenset(kept)


def _is_selection(steps: object) -> bool:
    if not isinstance(steps, (tuple, list)) or len(steps) != 2 or not is_whole(steps[0], 1):
        return False
    return steps[1] is None or (is_whole(steps[1], 1) and steps[0] <= steps[1])


DETECTABLE = 0.45
"""Of the first timestep of a run: an edit can seek its mask down to there."""


@dataclass(frozen=True)
class CompileConfig:
    """How the sparse graph is built.

    Args:
        kv: keys and values of self-attention: ``"cached"`` takes the recorded full map with the active rows rewritten
            (accurate), ``"int8"`` the same, recorded in 8 bits, ``"active"`` the active rows alone (the paper's
            approximation; nothing to load). ``"auto"`` plans it by budget and measured bandwidth: the most exact of
            these that no call waits for (:func:`~fisedit.runtime.cache.keys.plan_keys`).
        cost: how convolutions are cut, see :class:`~fisedit.runtime.cost_model.CostModel`.
        provider: whose kernels run the edit: ``"triton"`` (fused, in CUDA graphs), ``"reference"`` (plain PyTorch), or
            ``"auto"``: Triton on a GPU where it can launch kernels, which takes a C compiler.
        dense: what runs dense on a GPU (calls outside sessions, recording, seeking a mask, edits of most of the image):
            ``"inductor"`` compiles it at the first such call, for a minute or two; ``"eager"`` never does. A CPU never
            compiles.
        cache: where recorded feature maps lie, and which are kept.

    Raises:
        UnknownOptionError: a value that an option does not take.
    """

    kv: Literal["cached", "int8", "active", "auto"] = "cached"
    cost: Cost = "halo"
    provider: str = "auto"
    dense: Literal["inductor", "eager"] = "inductor"
    cache: CacheConfig = CacheConfig()

    def __post_init__(self) -> None:
        from fisedit.runtime.kernels import PROVIDERS

        _check("kv", self.kv, ("cached", "int8", "active", "auto"))
        _check("cost", self.cost, COSTS)
        _check("provider", self.provider, ("auto", *PROVIDERS))
        _check("dense", self.dense, ("inductor", "eager"))
        if not isinstance(self.cache, CacheConfig):
            raise UnknownOptionError(option="cache", given=self.cache, allowed="a CacheConfig")


@dataclass(frozen=True)
class DetectConfig:
    """How the region is found that the new words touch.

    The first ``steps`` steps of an edit run dense with cross-attention control, then the accumulated latent differences
    of the ``window`` become the mask. Both scale with the schedule unless given in steps.

    Args:
        steps: dense steps k; ``None`` takes a fifth of the schedule, at least 2; 1 if the schedule has 2 or 3 steps.
        window: first and last step (1-based, inclusive) whose latents are compared; ``None`` takes the later half of
            the k steps, as the paper does (steps 5 to 10 of 50).
        threshold: ``"otsu"``, or a fixed level in 0..1 of the normalized difference map.
        smooth: sigma, in latent pixels, of the Gaussian that smooths the difference map.
        dilation: latent pixels by which the mask grows.
        min_area: regions and holes of fewer latent pixels are dropped and filled; ``None`` takes a thousandth of all.
        control: whether kept words keep their recorded attention maps while detecting.
        method: ``"automatic"`` as described, ``"paper"`` for the paper's exact mask.

    Raises:
        UnknownOptionError: a value that an option does not take.
    """

    steps: int | None = None
    window: tuple[int, int] | None = None
    threshold: Literal["otsu"] | float = "otsu"
    smooth: float = 1.0
    dilation: int = 2
    min_area: int | None = None
    control: bool = True
    method: Literal["automatic", "paper"] = "automatic"

    def __post_init__(self) -> None:
        _check("method", self.method, ("automatic", "paper"))
        _check("control", self.control, (True, False))
        check_mask_options(self.threshold, self.smooth, self.dilation, self.min_area)
        if self.steps is not None and not is_whole(self.steps, 1):
            raise UnknownOptionError(option="steps", given=self.steps, allowed="None or a whole number >= 1")
        if self.window is not None and not _is_window(self.window):
            allowed = "(first, last), two whole numbers with 1 <= first <= last"
            raise UnknownOptionError(option="window", given=self.window, allowed=allowed)

    def resolve(self, schedule: int) -> tuple[int, tuple[int, int]]:
        """The dense steps k and the window, for a schedule of that many steps.

        Raises:
            ScheduleTooShortError: a schedule of one step, which leaves none to be sparse.
            UnknownOptionError: ``steps`` that leave no sparse step, or a window that ends after them.
        """
        if schedule < 2:
            raise ScheduleTooShortError(steps=schedule)
        steps = self.steps
        if steps is None:
            steps = 1 if schedule < 4 else max(2, round(schedule / 5))
        if steps >= schedule:
            allowed = f"at most {schedule - 1}: the schedule has {schedule} steps, and the last must be sparse"
            raise UnknownOptionError(option="DetectConfig.steps", given=steps, allowed=allowed)
        window = self.window or ((steps + 1) // 2, steps)
        if window[1] > steps:
            raise UnknownOptionError(option="window", given=window, allowed=f"steps 1 to {steps}")
        return steps, window


def _is_window(window: object) -> bool:
    return (
        isinstance(window, (tuple, list))
        and len(window) == 2
        and all(is_whole(step, 1) for step in window)
        and window[0] <= window[1]
    )
