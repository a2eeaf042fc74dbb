"""What the record run must keep: one slot for each recorded value that the edit and detect graphs read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

SlotKind = Literal["rows", "mean", "rstd", "text"]


@dataclass(frozen=True, order=True)
class Slot:
    """A recorded value of the captured node ``origin``.

    ``rows``: all its rows ``[B, R, C]``; ``mean``/``rstd``: group statistics ``[B, G]``, float32;
    ``text``: a value without positions, as it is.
    """

    kind: SlotKind
    origin: str

    @property
    def key(self) -> str:
        return f"{self.kind}:{self.origin}"

    @staticmethod
    def parse(key: str) -> Slot:
        kind, _, origin = key.partition(":")
        return Slot(cast(SlotKind, kind), origin)
