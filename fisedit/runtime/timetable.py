"""What a graph computes from the timestep alone: for many timesteps of a run at once.

An edit comes to the timesteps of the run it edits, in the same order. So the weights of the timestep stage (time
embeddings and their projections, tens of megabytes) are read once for all of them, not in every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

AHEAD = 64
"""Timesteps that are computed at once: runs may have thousands."""
ALIGNMENT = 16
"""Bytes: kernels load so much at a time."""


@dataclass
class Packing:
    """Tensors side by side in one row of bytes, so that all are copied at once."""

    pieces: list[tuple[int, int, torch.dtype, torch.Size]]  # first byte, bytes, dtype, shape

    @staticmethod
    def pack(values: Sequence[Tensor]) -> tuple[Packing, Tensor]:
        """Pack S rows of tensors ``[S, ...]``; the rows are uint8 ``[S, bytes]``."""
        pieces, packed, start = [], [], 0
        for value in values:
            data = value.reshape(len(value), -1).contiguous().view(torch.uint8)  # [S, bytes]
            length = data.shape[1]
            pieces.append((start, length, value.dtype, value.shape[1:]))
            packed.append(pad(data, (0, -length % ALIGNMENT)))
            start += packed[-1].shape[1]
        return Packing(pieces), torch.cat(packed, 1)

    def unpack(self, row: Tensor) -> list[Tensor]:
        """Views of the tensors in a row uint8 ``[bytes]``."""
        return [row[start : start + length].view(dtype).view(shape) for start, length, dtype, shape in self.pieces]


@dataclass
class Row:
    """The results of the timestep stage for one timestep: uint8 ``[bytes]``, and what is where in it."""

    packing: Packing
    data: Tensor


@dataclass
class Timetable:
    """The rows of the timesteps that an edit comes to.

    Attributes:
        schedule: the timesteps of the run that is edited, each once, in order.
        now: that of the call under way.
    """

    schedule: Sequence[float]
    now: float = math.nan
    _rows: dict[float, Row] = field(default_factory=dict)
    _others: list[tuple[Tensor, int]] | None = None

    def row(self, given: Tensor, others: list[tuple[Tensor, int]], compute: Callable[[Tensor], list[Row]]) -> Row:
        """The row of the present timestep.

        Args:
            given: the present timestep for each sample ``[B]``.
            others: what else the stage reads that may change, with the count of writes to it, -1 if that is unknown.
            compute: makes the rows of S timesteps ``[S, B]``.
        """
        first = self._others is None
        lasting = first or same(self._others or [], others)
        if not lasting:
            self._rows = {}
        self._others = others
        if self.now not in self._rows:
            # Where something else changes in every call, rows made ahead would never be used.
            values = self._block() if lasting else [self.now]
            timesteps = torch.tensor(values, dtype=given.dtype).to(given.device, non_blocking=True)  # [S]
            rows = compute(timesteps[:, None].expand(-1, len(given)))
            self._rows = dict(zip(values, rows, strict=True))
        return self._rows[self.now]

    def forget(self) -> None:
        """The graph or its weights are others."""
        self._rows, self._others = {}, None

    def _block(self) -> list[float]:
        """The timesteps around the present one, cut at fixed places, so that any order of calls uses whole blocks."""
        first = self.schedule.index(self.now) // AHEAD * AHEAD
        return list(self.schedule[first : first + AHEAD])


def counted(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor with PyTorch's count of writes to it, -1 if it was made in inference mode, which does not count."""
    return tensor, -1 if tensor.is_inference() else tensor._version


def same(mine: list[tuple[Tensor, int]], others: list[tuple[Tensor, int]]) -> bool:
    """Whether tensors are the same ones, unwritten, by counts of writes; -1 is no count."""
    return all(a is b and v == w >= 0 for (a, v), (b, w) in zip(mine, others, strict=True))


def run_stage(
    module: Callable[..., Sequence[Tensor]], arguments: list[Tensor], place: int, timesteps: Tensor
) -> list[Row]:
    """Run a timestep stage.

    Args:
        arguments: of ``module``; number ``place`` is the timestep ``[B]``, whose place ``timesteps`` take.
        timesteps: ``[S, B]``.
    Returns:
        S rows.
    """

    def run(timestep: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(*arguments[:place], timestep, *arguments[place + 1 :]))

    def one_by_one() -> list[Tensor]:
        return [torch.stack(results) for results in zip(*map(run, timesteps), strict=True)]

    if len(timesteps) == 1:
        values = one_by_one()
    else:
        try:
            values = list(torch.vmap(run)(timesteps))
        except RuntimeError:  # an op without a rule for batches
            values = one_by_one()
    packing, rows = Packing.pack(values)  # [S, bytes]
    return [Row(packing, row) for row in rows]
