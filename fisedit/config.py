"""Options of ``compile`` and of an edit, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fisedit.errors import ScheduleTooShortError, UnknownOptionError
from fisedit.mask import check_mask_options, is_whole
from fisedit.runtime.cost_model import COSTS, Cost


def _check(option: str, given: object, allowed: tuple[object, ...]) -> None:
    # Types first: 1 equals True, and an array compared with anything is an array.
    if not any(isinstance(given, type(value)) and given == value for value in allowed):
        raise UnknownOptionError(option=option, given=given, allowed=allowed)


@dataclass(frozen=True)
class CompileConfig:
    """How the sparse graph is built.

    Args:
        kv: keys and values of self-attention: ``"cached"`` takes the recorded full map with the active rows rewritten
            (accurate), ``"active"`` the active rows alone (the paper's approximation; nothing to load).
        cost: how convolutions are cut, see :class:`~fisedit.runtime.cost_model.CostModel`.
        provider: whose kernels run the edit: ``"triton"`` (fused, in CUDA graphs), ``"reference"`` (plain PyTorch), or
            ``"auto"``: Triton on a GPU that has it.
        dense: what runs dense on a GPU (calls outside sessions, recording, seeking a mask, edits of most of the image):
            ``"inductor"`` compiles it at the first such call, for a minute or two; ``"eager"`` never does. A CPU never
            compiles.

    Raises:
        UnknownOptionError: a value that an option does not take.
    """

    kv: Literal["cached", "active"] = "cached"
    cost: Cost = "halo"
    provider: str = "auto"
    dense: Literal["inductor", "eager"] = "inductor"

    def __post_init__(self) -> None:
        from fisedit.runtime.kernels import PROVIDERS

        _check("kv", self.kv, ("cached", "active"))
        _check("cost", self.cost, COSTS)
        _check("provider", self.provider, ("auto", *PROVIDERS))
        _check("dense", self.dense, ("inductor", "eager"))


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
