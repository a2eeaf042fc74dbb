from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit.runtime.kernels.launch import cdiv, launch, overlaps

CHANNELS = 256


@triton.jit
def _fold(
    out, addresses, places, weight, bias, shift, channels, batch, shift_batch,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sample = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    good = channel < channels
    group = tl.load(places + 2 * channels + channel, mask=good, other=0)
    mean_slot = tl.load(places + channel, mask=good, other=0)
    rstd_slot = tl.load(places + channels + channel, mask=good, other=0)
    mean_at = tl.load(addresses + mean_slot * batch + sample).to(tl.pointer_type(tl.float32))
    rstd_at = tl.load(addresses + rstd_slot * batch + sample).to(tl.pointer_type(tl.float32))
    scale = tl.load(rstd_at + group, mask=good, other=0.0) * tl.load(weight + channel, mask=good, other=0.0)
    center = -tl.load(mean_at + group, mask=good, other=0.0)
    if SHIFT:
        center += tl.load(shift + sample * shift_batch + channel, mask=good, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=good, other=0.0) + center * scale
    at = out + sample * channels + channel
    tl.store(at, scale, mask=good)
    tl.store(at + batch * channels, offset, mask=good)


def fold_group_norms(
    recorded: list[Tensor] | Tensor,
    means: list[int],
    rstds: list[int],
    groups: list[int],
    channels: list[int],
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
) -> Tensor:
    """The reference's contract; ``weight`` and ``bias`` float32 and contiguous, the last dimension of ``shift`` too.

    The tables of channels are made at the first call, outside of a CUDA graph's capture, and kept.
    """
    table = recorded if isinstance(recorded, Tensor) else _addresses(recorded)
    batch, total = table.shape[1], weight.shape[0]
    places = _places(tuple(means), tuple(rstds), tuple(groups), tuple(channels), weight.device)
    out = weight.new_empty(2, batch, total)  # [2, B, S]
    pdl = overlaps(weight)
    launch(_fold, (cdiv(total, CHANNELS), batch),
        out, table, places, weight, bias, shift, total, batch,
        shift.stride(0) if shift is not None and shift.shape[0] > 1 else 0,
        SHIFT=shift is not None, BLOCK=CHANNELS, PDL=pdl, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def _addresses(recorded: list[Tensor]) -> Tensor:
    """Where the statistics of each slot and sample begin."""
    rows = [[t.data_ptr() + b * t.stride(0) * t.element_size() for b in range(t.shape[0])] for t in recorded]
    return torch.tensor(rows, device=recorded[0].device)  # [slots, B]


@cache
def _places(
    means: tuple[int, ...],
    rstds: tuple[int, ...],
    groups: tuple[int, ...],
    channels: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """Of each channel: the slot of its mean, the slot of its reciprocal standard deviation, its group; int32."""
    norms = list(zip(means, rstds, groups, channels, strict=True))
    columns = [(mean, rstd, c // (size // number)) for mean, rstd, number, size in norms for c in range(size)]
    return torch.tensor(columns, dtype=torch.int32).T.contiguous().to(device)  # [3, S]
