from __future__ import annotations

import torch
from torch import Tensor


def fold_group_norms(
    recorded: list[Tensor],
    means: list[int],
    rstds: list[int],
    groups: list[int],
    channels: list[int],
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
) -> Tensor:
    """All group normalizations of a network with recorded statistics, as scales and offsets of their channels.

    ``(x + shift - mean) * rstd * weight + bias`` is ``x * scale + offset`` with ``scale = rstd * weight`` and
    ``offset = bias + (shift - mean) * scale``.

    Args:
        recorded: statistics, float32 ``[B, G_i]`` each. The Triton kernel also takes one int64 tensor ``[slots, B]``
            in place of the list: the device address of each slot's and sample's ``[G_i]``.
        means, rstds: where each norm's mean and reciprocal standard deviation stand among ``recorded``.
        groups, channels: of each norm. S is the sum of ``channels``.
        weight, bias: ``[S]``, all norms one after the other.
        shift: added to the rows before they are normalized, ``[B or 1, S]``; ``None`` for zero.
    Returns:
        float32 ``[2, B, S]``: scales, then offsets; float64 of float64 statistics.
    """
    sizes = [c // g for c, g in zip(channels, groups, strict=True)]
    mean, rstd = (
        torch.cat([recorded[slot].repeat_interleave(size, 1) for slot, size in zip(slots, sizes, strict=True)], 1)
        for slots in (means, rstds)
    )  # [B, S]
    scale = rstd * weight.to(rstd.dtype)
    offset = -mean if shift is None else shift.to(mean.dtype) - mean
    return torch.stack([scale, torch.addcmul(bias.to(rstd.dtype), offset, scale)])
