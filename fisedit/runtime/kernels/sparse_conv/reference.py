from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sparse_conv(
    rows: Tensor,
    halo: Tensor,
    table: Tensor,
    out_index: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolution of the active outputs of a map: gather an input block per tile, then a dense product.

    Args:
        rows: active input rows ``[B, N, C]``.
        halo: inactive input rows that the outputs read ``[B, H, C]``.
        table: int64 ``[M, T, bh, bw]`` into ``cat(rows, halo, zero row)``: the input block of each tile.
        out_index: int64 ``[M, N']``: the active outputs among ``T * h * w``; ``None`` where tiles are single outputs.
        weight: ``[Co, kh*kw*C/groups]``, packed from PyTorch's ``[Co, C/groups, kh, kw]``.
        bias: ``[Co]``.
    Returns:
        ``[B, N', Co]``.
    """
    batch, _, channels = rows.shape
    masks, tiles, *block = table.shape
    source = torch.cat([rows, halo, rows.new_zeros(batch, 1, channels)], 1)  # [B, N+H+1, C]
    if masks == 1:
        patches = source.index_select(1, table.flatten())  # [B, T*bh*bw, C]
    else:
        patches = torch.take_along_dim(source, table.reshape(masks, -1, 1), 1)
    if out_index is None and list(block) == list(kernel_size) and groups == 1:
        return F.linear(patches.view(batch, tiles, -1), weight, bias)  # [B, N', Co]
    patches = patches.view(batch * tiles, *block, channels).permute(0, 3, 1, 2)  # [B*T, C, bh, bw], channels last
    kernel = weight.view(weight.shape[0], *kernel_size, -1).permute(0, 3, 1, 2)  # [Co, C/groups, kh, kw]
    out = F.conv2d(patches, kernel, bias, stride, 0, dilation, groups)  # [B*T, Co, h, w]
    out = out.permute(0, 2, 3, 1).reshape(batch, -1, weight.shape[0])  # [B, T*h*w, Co]
    if out_index is None:
        return out
    if masks == 1:
        return out.index_select(1, out_index[0])  # [B, N', Co]
    return torch.take_along_dim(out, out_index[:, :, None], 1)
