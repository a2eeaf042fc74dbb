"""What an edit saved: its figures beside those of the dense rerun of the same prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table
from torch import nn

from fisedit.results import EditResult
from fisedit.runtime.timing import wait_for


@dataclass(frozen=True)
class Comparison:
    """Figures of one edit; ``None`` where it had no such part (no sparse call under an empty or a full mask).

    Attributes:
        active_share: share of the latent that was computed, 0..1.
        detect_steps: dense steps that found the mask.
        dense_step: median seconds of a plain call of the U-Net in the dense rerun.
        sparse_step: median seconds of a sparse call in the edit.
        recorded_step: median seconds of a call that recorded the base: dense, and storing its feature maps. ``None``
            in a later round, whose base is an edit: its calls were sparse.
        macs_dense, macs_sparse: multiply-accumulates of one U-Net call.
        edit_seconds: the whole edit: text encoder, detection, sparse steps, decoder.
        rerun_seconds: the whole dense rerun, measured in the same way.
        background_identical: whether the final latents outside the mask equal the base's bit for bit.
    """

    before: str
    after: str
    active_share: float
    detect_steps: int
    recorded_step: float | None
    sparse_step: float | None
    macs_dense: int | None
    macs_sparse: int | None
    edit_seconds: float
    background_identical: bool
    dense_step: float | None = None
    rerun_seconds: float | None = None

    @property
    def step_ratio(self) -> float | None:
        """How many times faster the sparse step is than the dense one."""
        return _ratio(self.dense_step, self.sparse_step)

    @property
    def macs_ratio(self) -> float | None:
        return _ratio(self.macs_dense, self.macs_sparse)

    @property
    def edit_ratio(self) -> float | None:
        """How many times faster the whole edit is than the dense rerun."""
        return _ratio(self.rerun_seconds, self.edit_seconds)

    def to_dict(self) -> dict[str, Any]:
        ratios = {"step_ratio": self.step_ratio, "macs_ratio": self.macs_ratio, "edit_ratio": self.edit_ratio}
        return {**asdict(self), **ratios}


def compare(result: EditResult, *, rerun: bool = True) -> tuple[Comparison, list[Any]]:
    """Measure an edit, by default against the dense rerun of its prompt, which runs now.

    Returns:
        the figures, and the rerun's images (none without a rerun).
    """
    report = result.report
    figures: dict[str, Any] = {
        "before": result.base.prompt,
        "after": result.prompt,
        "active_share": float(result.mask.float().mean()),
        "detect_steps": report.detect_steps,
        "recorded_step": None if isinstance(result.base, EditResult) else report.seconds_per_recorded_step,
        "sparse_step": report.seconds_per_sparse_step,
        "macs_dense": report.macs_dense,
        "macs_sparse": report.macs_sparse,
        "edit_seconds": result.seconds,
        "background_identical": result.background_is_identical,
    }
    if not rerun:
        return Comparison(**figures), []
    with timed_calls(result.pipeline.pipe.unet) as seconds:
        images, rerun_seconds = result.pipeline.rerun(result.base, result.prompt)
    return Comparison(**figures, dense_step=median(seconds), rerun_seconds=rerun_seconds), images


@contextmanager
def timed_calls(module: nn.Module) -> Iterator[list[float]]:
    """Yields a list that gets the seconds of each call of ``module`` made inside the ``with`` block."""
    seconds: list[float] = []
    starts: list[float] = []

    def now(args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        wait_for((*args, *kwargs.values()))
        return time.perf_counter()

    def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
        starts.append(now(args, kwargs))

    def end(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        seconds.append(now(args, kwargs) - starts.pop())

    before = module.register_forward_pre_hook(begin, with_kwargs=True)
    after = module.register_forward_hook(end, with_kwargs=True)
    try:
        yield seconds
    finally:
        before.remove()
        after.remove()


RECORDED = "median call while the base is generated: dense, and it stores its feature maps"
PLAIN = "median plain call of the U-Net in the dense rerun"
WHOLE = "seconds for one image: text encoder, all steps (those that find the mask included) and decoder"

ROWS: tuple[tuple[str, Callable[[Comparison], str | None], str], ...] = (
    ("active share of the latent", lambda c: f"{c.active_share:.1%}", ""),
    ("steps that found the mask", lambda c: str(c.detect_steps), ""),
    ("recorded U-Net step", lambda c: _milliseconds(c.recorded_step), RECORDED),
    ("dense U-Net step", lambda c: _milliseconds(c.dense_step), PLAIN),
    ("sparse U-Net step", lambda c: _milliseconds(c.sparse_step), ""),
    ("  dense / sparse", lambda c: _times(c.step_ratio), ""),
    ("MACs of a dense step", lambda c: _giga(c.macs_dense), ""),
    ("MACs of a sparse step", lambda c: _giga(c.macs_sparse), ""),
    ("  dense / sparse", lambda c: _times(c.macs_ratio), ""),
    ("whole dense rerun", lambda c: _seconds(c.rerun_seconds), WHOLE),
    ("whole edit", lambda c: _seconds(c.edit_seconds), WHOLE),
    ("  rerun / edit", lambda c: _times(c.edit_ratio), ""),
    ("background bit-identical", lambda c: "yes" if c.background_identical else "[red]no[/red]", ""),
)
"""Label, figure and footnote of each row."""
MARKS = "¹²³"


def comparison_table(comparisons: Sequence[Comparison], names: Sequence[str], title: str = "") -> Table:
    """One column an edit; figures that no edit has are left out, and their footnotes with them."""
    table = Table(title=title or None, caption_justify="left", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    marks: dict[str, str] = {}
    for label, figure, note in ROWS:
        cells = [figure(comparison) for comparison in comparisons]
        if any(cell is not None for cell in cells):
            if note and note not in marks:
                marks[note] = MARKS[len(marks)]
            table.add_row(label + marks.get(note, ""), *(cell or "-" for cell in cells))
    table.caption = "\n".join(f"{mark} {note}" for note, mark in marks.items()) or None
    return table


def _ratio(large: float | None, small: float | None) -> float | None:
    return large / small if large and small else None


def _milliseconds(value: float | None) -> str | None:
    return None if value is None else f"{value * 1e3:.0f} ms"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f} s"


def _times(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}x"


def _giga(value: int | None) -> str | None:
    return None if value is None else f"{value / 1e9:.2f} G"
