"""Tell that a tensor is the one of an earlier call, without reading it: reading waits for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Same:
    """Remembers which memory a tensor is, and PyTorch's count of writes to it. Keeps that memory alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._root, self._facts = _look(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is surely the same elements, with the same values."""
        root, facts = _look(tensor)
        return self._root is root and self._facts == facts and facts is not None


def _look(tensor: Tensor) -> tuple[Tensor, tuple[Any, ...] | None]:
    if tensor.is_inference():  # writes are not counted
        return tensor, None
    root = tensor if tensor._base is None else tensor._base
    return root, (tensor._version, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())


class Copies:
    """Copies of tensors that come again and again: one for each that differs, of the last few."""

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._known: list[tuple[Same, Tensor]] = []

    def of(self, tensor: Tensor) -> Tensor:
        """A detached copy of ``tensor``, shared with earlier calls that gave the same values."""
        known = next((copy for same, copy in self._known if same.holds(tensor)), None)
        if known is None:
            known = next((copy for _, copy in self._known if _equal(copy, tensor)), None)
            known = tensor.detach().clone() if known is None else known
            self._known = [(Same(tensor), known), *self._known[: self._limit - 1]]
        return known


def _equal(mine: Tensor, theirs: Tensor) -> bool:
    alike = mine.dtype == theirs.dtype and mine.device == theirs.device and mine.shape == theirs.shape
    return alike and torch.equal(mine, theirs)
