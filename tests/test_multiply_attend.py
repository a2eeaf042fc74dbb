"""Linear layers that attend to a text, by each kernel, against float64. Without a GPU, Triton's runs interpreted."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from fisedit.runtime.kernels.attend_rows import reference as attend_reference  # noqa: E402
from fisedit.runtime.kernels.launch import specializes  # noqa: E402
from fisedit.runtime.kernels.multiply_rows import reference  # noqa: E402
from fisedit.runtime.kernels.multiply_rows.attend import blocks_of, multiply_attend  # noqa: E402
from fisedit.runtime.kernels.multiply_rows.triton import Config  # noqa: E402
from fisedit.runtime.tuning import multiply_rows as tuning  # noqa: E402
from fisedit.runtime.tuning.product import Product, candidates  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Queries and weights are rounded, and so is the result."""
SMALL = Config(16, 32, 32, 4, 2)
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
ON_GPU = pytest.mark.skipif(DEVICE == "cpu" or not specializes(), reason="warps with tasks of their own: on a Hopper")


def arguments(
    batch: int, rows: int, channels: int, heads: int, head_dim: int, keys: int, dtype: torch.dtype, moments: bool = True
) -> dict[str, Any]:
    """Keys and values are slices of one product of the text."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    given, weight = 0.3 + random(batch, rows, channels), random(heads * head_dim, channels) / channels**0.5
    both = 1.5 * random(batch, keys, 2 * heads * head_dim)
    halves = given.float().unflatten(2, (2, -1))  # moments come in two parts
    sums = torch.stack([halves.sum(3), (halves * halves).sum(3)]).permute(0, 3, 1, 2).contiguous()  # [2, 2, B, N]
    return {
        "rows": given, "weight": weight, "bias": random(heads * head_dim) / 5, "moments": sums if moments else None,
        "center": weight.double().sum(1).float() if moments else None, "input_eps": 1e-5,
        "count": torch.tensor([rows - 3], dtype=torch.int32, device=DEVICE),
        "key": both[..., : heads * head_dim], "value": both[..., heads * head_dim :], "heads": heads, "scale": None,
    }  # fmt: skip


def check(out: torch.Tensor, given: dict[str, Any]) -> None:
    """Against products and attention in float64."""
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()}
    product = {name: wide[name] for name in ("rows", "weight", "bias", "moments", "center", "input_eps", "count")}
    nothing = dict.fromkeys(("rows2", "recorded", "sources", "affine", "residual", "locks"))
    query = reference.multiply_rows(**product, **nothing, full=False, activation="none", gated=False, positions=0)
    key, value, count = wide["key"], wide["value"], wide["count"]
    wanted = attend_reference.attend_rows(
        query, key, value, None, None, None, count, None, count, given["heads"], given["scale"]
    )
    active = int(count)
    difference = (out.double() - wanted)[:, :active].abs().max()
    assert difference <= TOLERANCE[given["rows"].dtype] * wanted[:, :active].abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moments", [True, False], ids=["normalized", "as they are"])
@pytest.mark.parametrize(("batch", "keys"), [(2, 77), (3, 16), (1, 5)])
def test_rows_attend_to_the_text_of_their_sample(dtype: torch.dtype, moments: bool, batch: int, keys: int) -> None:
    """Tiles have rows of two samples, or of three."""
    given = arguments(batch, 12, 64, 2, 32, keys, dtype, moments)
    check(multiply_attend(**given, config=SMALL), given)
    apart = given["value"].mT.contiguous().mT  # channels are not side by side
    scaled = given | {"scale": 0.3, "bias": None, "key": given["key"].contiguous(), "value": apart}
    check(multiply_attend(**scaled, config=SMALL), scaled)


@pytest.mark.parametrize("channels", [80, 70], ids=["by descriptor", "by address"])
def test_channels_that_are_no_whole_steps(channels: int) -> None:
    given = arguments(2, 12, channels, 2, 32, 7, torch.float16, moments=False)
    check(multiply_attend(**given, config=SMALL), given)


@ON_GPU
@pytest.mark.parametrize("keys", [5, 64, 77, 128])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(("batch", "rows"), [(2, 224), (3, 40), (2, 1409)])
def test_every_tile(keys: int, head_dim: int, batch: int, rows: int) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        given = arguments(batch, rows, 640, 5, head_dim, keys, dtype)
        shape = Product(0, batch, (640, 0, 0), 5 * head_dim, dtype, "bias moments", (head_dim, keys))
        tiles = candidates(shape, rows)
        assert any(tile.specialized for tile in tiles) and all(tile.split == 1 for tile in tiles)
        for tile in tiles:
            check(multiply_attend(**given, config=tile), given)


def test_every_way_attends() -> None:
    """By one kernel, or by two; a text has timings of its own, and its tiles the columns of a head."""
    given = arguments(2, 12, 64, 2, 32, 77, torch.float16)
    text = {name: given[name] for name in ("key", "value", "heads", "scale")}
    nothing = dict.fromkeys(("rows2", "recorded", "sources", "affine", "residual", "rows3"))
    product = {name: value for name, value in given.items() if name not in text} | nothing
    product |= {"full": False, "activation": "none", "gated": False, "positions": 24,
                "locks": torch.zeros(64, dtype=torch.int32, device=DEVICE)}  # fmt: skip
    shape = tuning.Product.of({**product, "text": text})
    assert shape.text == (32, 77) and shape.key[-1] == "bias moments heads of 32, 77 keys"
    ways = shape.ways(12)
    assert ways[-1] == tuning.LIBRARY and all(isinstance(way, str) or way.n == 32 for way in ways)
    for way in (tuning.RULE, tuning.LIBRARY, SMALL):
        check(tuning.run(way, {**product, "text": text}), given)
    check(torch.ops.fisedit.multiply_attend_rows(*(product[name] for name in tuning.NAMES), **text), given)


@pytest.mark.parametrize(
    ("keys", "blocks"), [(5, (16, 0)), (64, (64, 0)), (65, (64, 16)), (77, (64, 16)), (128, (64, 64))]
)
def test_blocks_hold_all_keys(keys: int, blocks: tuple[int, int]) -> None:
    assert blocks_of(keys) == blocks
