"""Options of ``compile`` and of an edit, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fisedit.errors import UnknownOptionError
from fisedit.runtime.cost_model import COSTS, Cost


def _check(option: str, given: object, allowed: tuple[object, ...]) -> None:
    if given not in allowed:
        raise UnknownOptionError(option=option, given=given, allowed=allowed)


@dataclass(frozen=True)
class CompileConfig:
    """How the sparse graph is built.

    Args:
        kv: keys and values of self-attention: ``"cached"`` takes the recorded full map with the active rows rewritten
            (accurate), ``"active"`` the active rows alone (the paper's approximation; nothing to load).
        cost: how convolutions are cut, see :class:`~fisedit.runtime.cost_model.CostModel`.
        provider: whose kernels run the graph.

    Raises:
        UnknownOptionError: a value that an option does not take.
    """

    kv: Literal["cached", "active"] = "cached"
    cost: Cost = "halo"
    provider: str = "reference"

    def __post_init__(self) -> None:
        from fisedit.runtime.kernels import PROVIDERS

        _check("kv", self.kv, ("cached", "active"))
        _check("cost", self.cost, COSTS)
        _check("provider", self.provider, tuple(PROVIDERS))


@dataclass(frozen=True)
class DetectConfig:
    """How the region is found that the new words touch.

    The first ``steps`` steps of an edit run dense with cross-attention control, then the accumulated latent differences
    of the ``window`` become the mask. Both scale with the schedule unless given in steps.

    Args:
        steps: dense steps k; ``None`` takes a fifth of the schedule, at least 2.
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
        _at_least("steps", self.steps, 1)
        _at_least("dilation", self.dilation, 0)
        _at_least("min_area", self.min_area, 0)
        _at_least("smooth", self.smooth, 0.0)
        if self.threshold != "otsu" and not (isinstance(self.threshold, (int, float)) and 0 <= self.threshold <= 1):
            raise UnknownOptionError(option="threshold", given=self.threshold, allowed="'otsu' or a number in 0..1")
        if self.window is not None and not 1 <= self.window[0] <= self.window[1]:
            raise UnknownOptionError(option="window", given=self.window, allowed="(first, last), 1 <= first <= last")

    def resolve(self, schedule: int) -> tuple[int, tuple[int, int]]:
        """The dense steps k and the window, for a schedule of that many steps.

        Raises:
            UnknownOptionError: more detect steps than the schedule has, or a window that ends after them.
        """
        steps = self.steps if self.steps is not None else max(2, round(schedule / 5))
        if steps >= schedule:
            allowed = f"at most {schedule - 1}: the schedule has {schedule} steps, and the last must be sparse"
            raise UnknownOptionError(option="DetectConfig.steps", given=steps, allowed=allowed)
        window = self.window or ((steps + 1) // 2, steps)
        if window[1] > steps:
            raise UnknownOptionError(option="window", given=window, allowed=f"steps 1 to {steps}")
        return steps, window


def _at_least(option: str, given: Any, least: float) -> None:
    if given is not None and not given >= least:
        raise UnknownOptionError(option=option, given=given, allowed=f"a number of at least {least}")
