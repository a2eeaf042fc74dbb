"""Each reference kernel against PyTorch's dense op or plain loops in float64, and its schema by ``opcheck``."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library
from triton.runtime import driver

from fisedit.errors import UnavailableProviderError
from fisedit.runtime import kernels, ops
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.geometry import ConvGeometry, Upsample
from fisedit.runtime.kernels.controlled_attention.reference import controlled_attention
from fisedit.runtime.kernels.gather_rows.reference import gather_rows
from fisedit.runtime.kernels.group_norm_rows.reference import group_norm_rows
from fisedit.runtime.kernels.group_norm_stats.reference import group_norm_stats
from fisedit.runtime.kernels.row_attention.reference import row_attention
from fisedit.runtime.kernels.scatter_rows.reference import scatter_rows
from fisedit.runtime.kernels.sparse_conv.reference import sparse_conv
from fisedit.runtime.plan import MaskPlan, Table
from fisedit.warnings import NotFusedWarning


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)  # [B, R, C]


class FixedTile(CostModel):
    """A cost model that always takes one tile."""

    def __init__(self, tile: tuple[int, int]) -> None:
        super().__init__()
        object.__setattr__(self, "tile", tile)

    def choose(self, mask: Tensor, geometry: ConvGeometry) -> tuple[int, int]:
        return self.tile  # type: ignore[attr-defined]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[ConvGeometry, tuple[int, int], int, int]:
    """A convolution over a map of random size, a tile, groups, and a seed for its mask."""
    sides = st.integers(1, 9)
    source = (draw(sides), draw(sides))
    upsample = draw(st.sampled_from([None, "factor", "size"]))
    virtual = source
    up = None
    if upsample == "factor":
        virtual = (source[0] * 2, source[1] * 2)
        up = Upsample(virtual, (2.0, 2.0))
    elif upsample == "size":
        virtual = (source[0] + draw(st.integers(0, 4)), source[1] + draw(st.integers(0, 4)))
        up = Upsample(virtual, None)
    kernel = (draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([1, 3])))
    stride, dilation = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    padding = tuple(draw(st.integers((k - 1) * dilation // 2, (k - 1) * dilation)) for k in kernel)
    target = tuple((virtual[i] + 2 * padding[i] - (kernel[i] - 1) * dilation - 1) // stride + 1 for i in (0, 1))
    geometry = ConvGeometry(source, target, kernel, (stride, stride), padding, (dilation, dilation), up)
    tile = draw(st.sampled_from([(1, 1), (2, 2), (2, 8), (4, 4), target]))
    return geometry, tile, draw(st.sampled_from([1, 2])), draw(st.integers(0, 99))


@settings(max_examples=80)
@given(case=convolutions())
def test_sparse_conv_is_conv2d(case: tuple[ConvGeometry, tuple[int, int], int, int]) -> None:
    """Tables and kernel together, any geometry and tile: the active outputs of ``F.conv2d`` on the whole map."""
    geometry, tile, groups, seed = case
    image, weight, bias = (
        noise(2, 4, *geometry.source),
        noise(6, 4 // groups, *geometry.kernel, seed=1),
        noise(6, seed=2),
    )
    whole = image
    if geometry.upsample:
        scale = geometry.upsample.scale
        size = None if scale else geometry.upsample.size
        whole = F.interpolate(image, size=size, scale_factor=scale, mode="nearest")
    wanted = F.conv2d(whole, weight, bias, geometry.stride, geometry.padding, geometry.dilation, groups)
    assert tuple(wanted.shape[2:]) == geometry.target
    mask = torch.rand(geometry.target, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask[seed % geometry.target[0], seed % geometry.target[1]] = True
    plan = MaskPlan(mask, FixedTile(tile))
    halo, neighbors, outputs = (plan.table(Table(kind, geometry)) for kind in Table.CONV)
    active = plan.table(Table("active", geometry.source))
    assert active is not None and halo is not None and neighbors is not None
    rows = rows_of(image)
    packed = weight.permute(0, 2, 3, 1).flatten(1)
    out = sparse_conv(
        gather_rows(rows, active), gather_rows(rows, halo), neighbors, outputs, packed, bias,
        list(geometry.kernel), list(geometry.stride), list(geometry.dilation), groups,
    )  # fmt: skip
    torch.testing.assert_close(out, gather_rows(rows_of(wanted), plan.table(Table("active", geometry.target))))
    assert not set(halo.flatten().tolist()) & set(active.flatten().tolist())  # nothing active is loaded


@pytest.mark.parametrize("masks", [1, 2])
def test_rows_there_and_back(masks: int) -> None:
    rows, index = noise(2, 7, 3), torch.tensor([[4, 0, 6], [1, 5, 2]])[:masks]
    taken = gather_rows(rows, index)
    for b in range(2):
        for n in range(3):
            assert torch.equal(taken[b, n], rows[b, index[b % masks, n]])
    assert torch.equal(scatter_rows(rows, index, taken), rows)
    replaced = scatter_rows(torch.zeros_like(rows), index, taken)
    assert replaced.count_nonzero() == taken.count_nonzero() and torch.equal(gather_rows(replaced, index), taken)


def test_group_norm_with_recorded_statistics() -> None:
    image, shift = noise(2, 8, 3, 5), noise(2, 1, 8, seed=3)
    weight, bias = noise(8, seed=1), noise(8, seed=2)
    moved = image + shift.transpose(1, 2)[..., None]
    wanted = rows_of(F.group_norm(moved, 4, weight, bias, 1e-5))
    _, mean, rstd = group_norm_stats(moved.float(), 4, weight.float(), bias.float(), 1e-5)
    index = torch.tensor([[0, 3, 14]])
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 3e-2)):
        given = [t.to(dtype) for t in (gather_rows(rows_of(image), index), weight, bias, shift)]
        out = group_norm_rows(given[0], mean, rstd, given[1], given[2], given[3], 1e-5, 15)
        torch.testing.assert_close(out.double(), gather_rows(wanted, index), rtol=tolerance, atol=tolerance * 4)


def test_group_norm_of_a_full_level_takes_its_own_statistics() -> None:
    image = noise(2, 8, 3, 5)
    poison = torch.full((2, 4), float("nan"))
    out = group_norm_rows(rows_of(image), poison, poison, None, None, None, 1e-5, 15)
    torch.testing.assert_close(out, rows_of(F.group_norm(image, 4, eps=1e-5)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_statistics(dtype: torch.dtype, layout: torch.memory_format) -> None:
    image = (noise(2, 8, 3, 5) * 3 + 1).to(dtype).contiguous(memory_format=layout)
    out, mean, rstd = group_norm_stats(image, 4, None, None, 1e-5)
    grouped = image.double().reshape(2, 4, -1)
    torch.testing.assert_close(mean.double(), grouped.mean(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rstd.double(), (grouped.var(-1, correction=0) + 1e-5).rsqrt(), rtol=1e-5, atol=1e-5)
    assert torch.equal(out, F.group_norm(image, 4, eps=1e-5)) and mean.dtype == torch.float32


def attention_by_hand(query: Tensor, key: Tensor, scale: float) -> Tensor:
    maps = torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=torch.float64)
    for i in range(query.shape[1]):
        for j in range(key.shape[1]):
            maps[:, i, j] = (query[:, i] * key[:, j]).sum(-1) * scale
    return maps.exp() / maps.exp().sum(-1, keepdim=True)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_row_attention(scale: float | None) -> None:
    query, key, value = noise(2, 3, 8), noise(2, 2, 5, 4, seed=1), noise(2, 2, 5, 4, seed=2)
    out = row_attention(query, key, value, None, 2, scale)
    for head in range(2):
        maps = attention_by_hand(query[..., head * 4 : head * 4 + 4], key[:, head], scale or 0.5)
        torch.testing.assert_close(out[..., head * 4 : head * 4 + 4], maps @ value[:, head])


@pytest.mark.parametrize("masked", [False, True])
def test_controlled_attention(masked: bool) -> None:
    """Kept tokens take the recorded map of their position, the others their own; samples differ."""
    query, recorded = noise(2, 3, 4), noise(2, 3, 4, seed=4)
    key, key_recorded, value = noise(2, 1, 5, 4, seed=1), noise(2, 1, 5, 4, seed=5), noise(2, 1, 5, 4, seed=2)
    index, weight = torch.tensor([[0, 1, 1, 2, 3], [0, 1, 2, 3, 4]]), torch.tensor([[1.0, 0, 1, 1, 0], [0.0] * 5])
    seen = torch.tensor([True, True, True, True, not masked])
    out = controlled_attention(
        query, key, value, seen[None, None, None] if masked else None, recorded, key_recorded, index, weight, 1, None
    )
    length = 4 if masked else 5
    new = attention_by_hand(query, key[:, 0, :length], 0.5)
    old = attention_by_hand(recorded, key_recorded[:, 0, :length], 0.5)
    maps = new.clone()
    for b in range(2):
        for j in range(length):
            if weight[b, j]:
                maps[b, :, j] = old[b, :, index[b, j]]
    torch.testing.assert_close(out, maps @ value[:, 0, :length])


def fused_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of the fused ops: 2 samples, 3 of 6 rows, 8 channels."""
    rows, recorded, affine = torch.randn(2, 3, 8), torch.randn(2, 6, 8), torch.randn(2, 2, 8)
    count, counts = torch.tensor([3], dtype=torch.int32), torch.tensor([3, 2], dtype=torch.int32)
    places, locks = torch.tensor([[0, 4, 1, 6, 2, 8]], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    sources = torch.tensor([[[0, 5], [-1, 1], [2, 8], [7, 0]]], dtype=torch.int32)  # [M, N', taps]
    channels, stats = torch.randn(8), [torch.rand(2, 4), torch.rand(2, 4)]
    after = (affine, False, torch.randn(2, 4, 8), count, locks, "silu", False, 15)
    product = (rows, None, recorded, sources, torch.randn(8, 16), channels, *after)
    return {
        "multiply_rows": product,
        "multiply_norm_rows": product,
        "multiply_attend_rows": product,
        "attend_rows": (rows, rows, rows, recorded, recorded, places, count, counts, locks, 2, None),
        "gather_patches": (rows, recorded, sources, count),
        "normalize_rows": (rows, rows, torch.randn(2, 2, 16), "silu", count, False),
        "layer_norm_rows": (rows, channels, channels, 1e-5, count),
        "renew_affine": (rows, None, affine, True, channels, channels, None, 4, 1e-5, counts),
        "fold_group_norms": (stats, [0], [1], [4], [8], channels, channels, None),
    }


def test_every_op_passes_opcheck() -> None:
    """Schema, fake and eager implementation agree."""
    rows, index, x = torch.randn(2, 7, 8), torch.tensor([[4, 0, 6]]), torch.randn(2, 8, 3, 5)
    stats, heads = torch.rand(2, 4), torch.randn(2, 2, 5, 4)
    conv = (rows, rows[:, :2], torch.tensor([[[[0, 8, 9]], [[1, 2, 3]]]]), None, torch.randn(6, 24), torch.randn(6))
    calls = {
        "gather_rows": (rows, index),
        "scatter_rows": (rows, index, torch.randn(2, 3, 8)),
        "sparse_conv": (*conv, [1, 3], [1, 1], [1, 1], 1),
        "group_norm_rows": (rows, stats, stats, torch.randn(8), torch.randn(8), None, 1e-5, 99),
        "group_norm_stats": (x, 4, torch.randn(8), torch.randn(8), 1e-5),
        "row_attention": (rows, heads, heads, None, 2, None),
        "controlled_attention": (rows, heads, heads, None, rows, heads, torch.zeros(2, 5, dtype=torch.long),
                                 torch.ones(2, 5), 2, None),
        "quantize_rows": (rows,),
        **fused_calls(),
    }  # fmt: skip
    assert set(calls) == set(kernels.PROVIDERS["reference"]) == set(ops.SCHEMAS) - set(ops.STRUCTURAL)
    named = {"multiply_attend_rows": {"key": torch.randn(2, 5, 8), "value": torch.randn(2, 5, 8), "heads": 2}}
    blocks = {
        "block_sources": torch.zeros(1, 2, 16, dtype=torch.int32), "block_count": torch.ones(1, dtype=torch.int32),
        "places": torch.tensor([[[0, 1, -1, 2], [3, -1, -1, -1]]], dtype=torch.int32),
        "block_weight": torch.randn(128, 8),
    }  # fmt: skip
    named |= {"multiply_rows": blocks, "multiply_norm_rows": blocks}
    for name, arguments in calls.items():
        op = getattr(torch.ops.fisedit, name).default
        library.opcheck(op, arguments, named.get(name), test_utils=("test_schema", "test_faketensor"))


class Uncompiled:
    """Triton's driver where it finds no C compiler, or its compiler no header."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    @property
    def utils(self) -> object:
        if self.error is not None:
            raise self.error
        return self


@pytest.fixture
def fresh() -> Iterator[None]:
    """What was found out about this machine's Triton is forgotten, before and after."""

    def forget() -> None:
        kernels.why_not_triton.cache_clear()
        kernels._fall_back.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nor so"),
        subprocess.CalledProcessError(1, ["gcc", "driver.c"]),
        FileNotFoundError("ldconfig"),
    ],
)
def test_a_gpu_without_a_compiler_runs_plain_pytorch(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one warning for all models; an error where Triton was asked for."""
    gpu = torch.device("cuda", 7)
    monkeypatch.setattr(type(driver), "active", Uncompiled(error))
    told = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(".")
    reason = f"Triton's driver failed ({told}); Triton needs a C compiler and Python's headers"
    with pytest.warns(NotFusedWarning, match=f"{re.escape(reason)}.*gcc") as seen:
        assert [kernels.choose_provider("auto", gpu) for _ in range(2)] == ["reference"] * 2
    assert len(seen) == 1
    with pytest.raises(UnavailableProviderError, match=re.escape(f"'triton' cannot be launched here: {reason}")):
        kernels.choose_provider("triton", gpu)
    assert kernels.choose_provider("reference", gpu) == "reference"
    kernels.why_not_triton.cache_clear()
    monkeypatch.setattr(type(driver), "active", Uncompiled(None))
    assert [kernels.choose_provider(asked, gpu) for asked in ("auto", "triton")] == ["triton"] * 2


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("reason", ["Triton is not installed", "written for GPUs of NVIDIA"])
def test_a_gpu_that_kernels_are_not_for_runs_plain_pytorch(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason.startswith("Triton"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.warns(NotFusedWarning, match=reason):
        assert kernels.choose_provider("auto", torch.device("cuda", 7)) == "reference"
    assert kernels.choose_provider("auto", torch.device("cpu")) == "reference"


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("version", "reason"), [("3.6.0", f"there is no C compiler; {kernels.NEEDED}"), ("3.7.1", None)]
)
def test_an_older_triton_needs_its_compiler_again(
    version: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver may lie compiled in the cache, but not what launches other kinds of arguments."""
    monkeypatch.setattr("triton.__version__", version)
    monkeypatch.setattr(type(driver), "active", Uncompiled(None))
    monkeypatch.setattr(kernels, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert kernels.why_not_triton() == reason
    kernels.why_not_triton.cache_clear()
    monkeypatch.setenv("CC", "cc")
    assert kernels.why_not_triton() is None
