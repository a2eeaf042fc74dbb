"""Which recorded rows go where, and in which pieces the programs of a GPU take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS = 24
"""Pairs of an item of work: at 320 channels, or 640, or 1280, these rows fill the kernel's blocks to 94 %."""


@dataclass(frozen=True)
class Moves:
    """Which rows go where: fixed for a mask, whatever step is loaded.

    A view is one slot of the cache. V views, B samples, M masks (1 if one is shared by the samples, else B), L lists
    of pairs, each of which may serve several views.

    Attributes:
        pairs: int32 ``[P, 2]``, source row and goal row; the lists one after the other.
        starts: int32 ``[L, M]``, where list l of mask m begins in ``pairs``.
        counts: int32 ``[L, M]``, its length.
        lists: int32 ``[V]``, the list of each view.
        widths: int32 ``[V]``, C, the elements of a row.
        work: int32 ``[W, 3]``, view, sample, and first pair within the list; an item moves ``ROWS`` pairs, or what
            is left of the list.
    """

    pairs: Tensor
    starts: Tensor
    counts: Tensor
    lists: Tensor
    widths: Tensor
    work: Tensor


def plan_moves(
    pairs: Sequence[Sequence[Tensor]],
    lists: Sequence[int],
    widths: Sequence[int],
    batch: int,
    device: torch.device | str,
) -> Moves:
    """The moves of a mask, put together on the host and brought to ``device`` in one copy, which nobody waits for.

    Args:
        pairs: for each list and mask, integers ``[n, 2]`` on the CPU: source row, goal row. No goal row twice.
        lists, widths: of each view.
    """
    masks = len(pairs[0]) if pairs else 1
    if masks not in (1, batch) or any(len(of_list) != masks for of_list in pairs):
        raise ValueError(f"lists of {sorted({len(of_list) for of_list in pairs})} masks for a batch of {batch}")
    pieces = [np.asarray(piece, np.int32).reshape(-1, 2) for of_list in pairs for piece in of_list]
    lengths = np.array([len(piece) for piece in pieces], np.int32)
    starts = (np.cumsum(lengths) - lengths).reshape(len(pairs), masks)
    counts = lengths.reshape(len(pairs), masks)
    joined = np.concatenate([np.empty((0, 2), np.int32), *pieces])
    of_view = np.asarray(lists, np.int32)
    work = _items(np.broadcast_to(counts[of_view], (len(of_view), batch)))
    tables = [joined, starts, counts, of_view, np.asarray(widths, np.int32), work]
    return Moves(*_upload(tables, torch.device(device)))


def _items(counts: np.ndarray) -> np.ndarray:
    """Work for ``counts`` ``[V, B]`` of pairs: ``[W, 3]`` of view, sample and first pair."""
    items = (-(-counts // ROWS)).ravel()  # of each view and sample
    owner = np.repeat(np.arange(items.size), items)
    number = np.arange(owner.size) - (np.cumsum(items) - items)[owner]
    return np.stack([owner // counts.shape[1], owner % counts.shape[1], number * ROWS], 1)


def _upload(tables: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Int32 tensors on ``device``, views of one buffer, each of which begins at a multiple of 16 bytes."""
    *places, size = np.cumsum([0, *(-(-table.size // 4) * 4 for table in tables)]).tolist()
    buffer = torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
    for table, place in zip(tables, places, strict=True):
        buffer.numpy()[place : place + table.size] = table.ravel()
    there = buffer.to(device, non_blocking=True)
    return [there[place : place + table.size].view(table.shape) for table, place in zip(tables, places, strict=True)]
