"""U-Nets with other people's habits against their own forward; what stays dense is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equivalence import check_equivalence
from other_unets import FunctionalUNet, LinearAttentionUNet, SongStyleUNet, TutorialUNet, built
from torch import nn

# Feature: the model, its input channels, and what of it stays a dense island.
CASES: dict[str, tuple[Callable[[], nn.Module], int, set[str]]] = {
    "RMSNorm and LayerNorm over channels, weight-standardized convolutions, pixel-unshuffle downsampling": (
        LinearAttentionUNet, 3, set(),
    ),
    "linear attention (its two products stay dense)": (
        lambda: LinearAttentionUNet(linear=True), 3, {"softmax_1", "einsum", "einsum_1"},
    ),
    "EDM's SongUNet style: grouped and transposed filters, in-place adds, `ncq,nck->nqk` attention": (
        SongStyleUNet, 3, set(),
    ),
    "batch norm, max pooling, transposed convolutions": (lambda: TutorialUNet(bilinear=False), 3, set()),
    "bilinear upsampling (stays dense)": (lambda: TutorialUNet(bilinear=True), 3, {"upsample_bilinear2d"}),
    "functional style: `@`, `.mT`, instance norm (reflected borders and global pooling stay dense)": (
        FunctionalUNet, 4, {"pad", "mean"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("build", "channels", "islands"),
    [pytest.param(*case, id=name, marks=pytest.mark.supports("Models", name)) for name, case in CASES.items()],
)
def test_other_unets(build: Callable[[], nn.Module], channels: int, islands: set[str]) -> None:
    torch.manual_seed(0)
    h = check_equivalence(*built(build(), channels))
    assert {island.split()[0] for island in h.program.islands} == islands
