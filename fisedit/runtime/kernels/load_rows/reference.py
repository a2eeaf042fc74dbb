from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fisedit.runtime.kernels.load_rows.moves import Moves


def load_rows(
    moves: Moves, origins: Tensor, goals: Tensor, dtype: torch.dtype, scales: Tensor | None = None, *,
    programs: int = 32,
) -> None:  # fmt: skip
    """Copy scattered rows of recorded maps into buffers; goal rows that no pair names are left as they are.

    Args:
        moves: which rows, see :class:`Moves`.
        origins: int64 ``[V, B]``, the address of row 0 of each view and sample. Rows of C elements, one after the
            other, of ``dtype``, or of int8 if there are ``scales``. 0: this view and sample is left alone.
        goals: int64 ``[V, B]``, the address of each sample's goal row 0; rows of C elements of ``dtype``.
        scales: int64 ``[V, B]``, the address of each sample's float32 scales, one for each source row; a row's values
            are its integers times its scale, rounded to ``dtype``.
        programs: how much of a GPU to take, nothing here.
    """
    starts, counts = moves.starts.tolist(), moves.counts.tolist()
    for view, (which, width) in enumerate(zip(moves.lists.tolist(), moves.widths.tolist(), strict=True)):
        for sample in range(origins.shape[1]):
            mask = sample if moves.starts.shape[1] > 1 else 0
            start, count = starts[which][mask], counts[which][mask]
            origin = int(origins[view, sample])
            if not (origin and count):
                continue
            source, goal = moves.pairs[start : start + count].long().T  # [count] each
            kind = dtype if scales is None else torch.int8
            rows = _at(origin, int(source.max()) + 1, width, kind)[source]  # [count, C]
            if scales is not None:
                rows = rows * _at(int(scales[view, sample]), int(source.max()) + 1, 1, torch.float32)[source]
            _at(int(goals[view, sample]), int(goal.max()) + 1, width, dtype)[goal] = rows.to(dtype)


def _at(address: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """The memory at an address of this machine, as ``[rows, width]``."""
    memory = (ctypes.c_char * (rows * width * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(rows, width)
