"""What an edit computed, moved, and how long it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class EditReport:
    """Figures of one edit.

    Attributes:
        active_share: share of the latent that was computed, 0..1; ``None`` before the mask is found.
        levels: active share per resolution level.
        tiles: the cut that the cost model chose per convolution geometry: (1, 1) is rows, the whole map dense.
        detect_steps: dense steps that found the mask.
        timings: seconds of each U-Net call by kind (``detect``, ``sparse``, ``dense``).
        dense_because: why an edit of a part of the image ran dense; ``None`` if it did not.
        seconds_recorded: seconds of each recorded (dense) call of the base.
        macs_dense, macs_sparse: multiply-accumulates of one U-Net call.
        bytes_cached: bytes that the base holds. bytes_loaded: bytes read from it by each sparse call.
        bytes_fetched: bytes copied for each sparse call from where its base lies; 0 where kernels read it in its place.
        placement: bytes of the base by kind of value and tier.
        islands: ops that ran dense because no pass understands them.
    """

    active_share: float | None = None
    levels: dict[str, float] = field(default_factory=dict)
    tiles: dict[str, tuple[int, int]] = field(default_factory=dict)
    detect_steps: int = 0
    timings: dict[str, list[float]] = field(default_factory=dict)
    dense_because: str | None = None
    seconds_recorded: list[float] = field(default_factory=list)
    macs_dense: int | None = None
    macs_sparse: int | None = None
    bytes_cached: int = 0
    bytes_loaded: list[int] = field(default_factory=list)
    bytes_fetched: list[int] = field(default_factory=list)
    placement: dict[str, dict[str, int]] = field(default_factory=dict)
    islands: list[str] = field(default_factory=list)

    @property
    def seconds_per_sparse_step(self) -> float | None:
        """Median seconds of a sparse U-Net call."""
        return median(self.timings["sparse"]) if self.timings.get("sparse") else None

    @property
    def seconds_per_recorded_step(self) -> float | None:
        """Median seconds of a recorded U-Net call: dense, and storing its feature maps."""
        return median(self.seconds_recorded) if self.seconds_recorded else None

    def _tiers(self) -> str:
        """Where the base lies, unless it is one place."""
        tiers: dict[str, int] = {}
        for of_kind in self.placement.values():
            for tier, size in of_kind.items():
                tiers[tier] = tiers.get(tier, 0) + size
        shown = ", ".join(f"{tier} {size / 2**20:.0f}" for tier, size in tiers.items())
        return f" ({shown})" if len(tiers) > 1 else ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = [("active share", _percent(self.active_share)), ("detect steps (dense)", str(self.detect_steps))]
        rows += [(f"{kind} calls", f"{len(times)}, median {median(times) * 1e3:.1f} ms")
                 for kind, times in self.timings.items() if times]  # fmt: skip
        if self.dense_because is not None:
            rows.append(("dense because", self.dense_because))
        if self.seconds_per_recorded_step is not None:
            rows.append(("recorded call", f"median {self.seconds_per_recorded_step * 1e3:.1f} ms"))
        if self.macs_dense and self.macs_sparse:
            figures = f"{self.macs_dense / 1e9:.2f} dense, {self.macs_sparse / 1e9:.2f} sparse"
            rows.append(("GMACs a call", f"{figures} ({self.macs_dense / self.macs_sparse:.1f}x fewer)"))
        if self.bytes_loaded:
            rows.append(("loaded a sparse call", f"{median(self.bytes_loaded) / 2**20:.1f} MiB"))
        if any(self.bytes_fetched):
            rows.append(("fetched a sparse call", f"{median(self.bytes_fetched) / 2**20:.1f} MiB"))
        rows.append(("cached by the base", f"{self.bytes_cached / 2**20:.0f} MiB{self._tiers()}"))
        if self.islands:
            more = f"; and {len(self.islands) - 3} more" if len(self.islands) > 3 else ""
            rows.append(("dense islands", "; ".join(self.islands[:3]) + more))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _percent(share: float | None) -> str:
    return "not found yet" if share is None else f"{share:.1%}"
