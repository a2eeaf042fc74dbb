from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def multiply_upsampled_rows(
    *product: Any, coarse_sources: Tensor, coarse_count: Tensor, places: Tensor, parities: Tensor
) -> Tensor:
    """A 3x3 convolution of a map that nearest upsampling made twice as large, over active rows.

    Of an output's nine taps, some read the same row of the map before: four different ones, which of them depends on
    the parity of its line and of its column. So each parity is a convolution of 2x2 taps over the map before, whose
    weights are sums of the nine; what it multiplies is 4/9.

    Args:
        product: the arguments of the ``multiply_rows`` of nine taps, by position; nothing follows its bias.
        coarse_sources: int32 ``[M, N, 9]``: the ``sources`` of a 3x3 convolution of the map before.
        coarse_count: int32 ``[1]``: rows of that map past it need not be computed.
        places: int32 ``[M, N, 4]``: which output each parity (line, column: 00, 01, 10, 11) of a row is; -1: none.
        parities: ``[4 * Co, 4 * C]``: for each parity the weights of its four taps, these outermost.
    Returns: ``[B, N', Co]``.
    """
    multiply = torch.ops.fisedit.multiply_rows
    given = dict(zip((argument.name for argument in multiply.default._schema.arguments), product, strict=False))
    rows, sources, weight, bias = (given[name] for name in ("rows", "sources", "weight", "bias"))
    batch, number, outputs = rows.shape[0], sources.shape[1], weight.shape[0]
    out = rows.new_zeros(batch, number + 1, outputs)
    for parity, own in enumerate(parities.chunk(4)):
        line, column = divmod(parity, 2)
        taps = [(line + down) * 3 + column + across for down in (0, 1) for across in (0, 1)]
        own_sources = coarse_sources[:, :, taps].contiguous()  # [M, N, 4]
        result = multiply(
            rows, None, given["recorded"], own_sources, own, bias, None, False, None, coarse_count, given["locks"],
            "none", False, 0,
        )  # fmt: skip
        place = places[:, :, parity].long()
        place = place.where(place >= 0, number).expand(batch, -1)[:, :, None]  # [B, N, 1]
        out.scatter_(1, place.expand(-1, -1, outputs), result)
    return out[:, :number].contiguous()
