from __future__ import annotations

import pytest
import torch
from pass_harness import SIZE, Toy, captured
from torch import Tensor, nn

from fisedit.passes.ir import layout_of
from fisedit.passes.layout import Atom, Kind, Layout, LayoutError


def layouts(model: nn.Module, **kwargs: int) -> dict[str, str]:
    gm, _ = captured(model, **kwargs)
    return {node.name: str(layout_of(node)) for node in gm.graph.nodes if layout_of(node) is not None}


class Heads(Toy):
    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        b, c, h, w = sample.shape
        tokens = sample.permute(0, 2, 3, 1).reshape(b, h * w, c)
        heads = tokens.view(b, h * w, 2, c // 2).transpose(1, 2)
        merged = heads.reshape(b * 2, h * w, c // 2) * 2
        back = merged.view(b, 2, h * w, c // 2).transpose(1, 2).reshape(b, h * w, c)
        return back.transpose(1, 2).reshape(b, c, h, w)


def test_positions_are_followed_through_heads() -> None:
    found = layouts(Heads())
    assert found["sample"] == "[batch:2, other:8, y:6, x:8]"
    assert found["transpose"] == "[batch:2, other:2, y:6*x:8, other:4]"
    assert found["mul"] == "[batch:2*other:2, y:6*x:8, other:4]"
    assert found["reshape_3"] == "[batch:2, other:8, y:6, x:8]".replace("other:8", "other:2*other:4")


def test_sizes_that_coincide_do_not_confuse() -> None:
    """48 text-like channels and 48 positions: tracking, not comparing sizes."""

    class Coincidence(Toy):
        def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return sample.flatten(2).transpose(1, 2)

    found = layouts(Coincidence(), channels=48)
    assert found["transpose"] == "[batch:2, y:6*x:8, other:48]"


ISLANDS = {
    "roll": (lambda x: torch.roll(x, 1, 2), "no pass knows this op"),
    "softmax over positions": (lambda x: x.flatten(2).softmax(-1).view(x.shape), "dimension 2 of"),
    "cat of lines": (lambda x: torch.cat([x, x], 2), "dimension 2 of"),
    "transposed map": (lambda x: x.transpose(2, 3), "y and x are not neighbors"),
    "channel shuffle": (lambda x: x.view(2, 2, 4, *SIZE).transpose(1, 2), "channel dimensions change places"),
}


@pytest.mark.parametrize("name", ISLANDS)
def test_ops_that_mix_positions_become_islands(name: str) -> None:
    function, reason = ISLANDS[name]

    class Mixing(Toy):
        def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return function(sample) * 2

    gm, log = captured(Mixing())
    (refusal,) = next(record for record in log.records if record.name == "infer_domains").result.refused[:1]
    assert reason in refusal.reason
    assert any("island" in node.meta for node in gm.graph.nodes)


@pytest.mark.parametrize("level", [(1, 1), (1, 5), (5, 1), (3, 4)])
@pytest.mark.parametrize("batch", [1, 2])
def test_views_there_and_back(level: tuple[int, int], batch: int) -> None:
    """Map, tokens, heads and back, for levels of one line or one position too."""
    height, width = level
    layout = Layout.of_map((batch, 6, height, width))
    tokens = layout.permute((0, 2, 3, 1)).view((batch, height * width, 6))
    heads = tokens.view((batch, height * width, 2, 3)).permute((0, 2, 1, 3))
    merged = heads.view((batch * 2, height * width, 3))
    back = merged.view((batch, 2, height * width, 3)).permute((0, 2, 1, 3)).view((batch, height, width, 6))
    assert layout.matches(back.permute((0, 3, 1, 2)))
    assert (back.batch, back.level, back.channels) == (batch, level, 6)


def test_a_view_that_splits_lines_is_refused() -> None:
    layout = Layout((((Atom(Kind.Y, 4, (4, 4))),), ((Atom(Kind.X, 4, (4, 4))),)))
    with pytest.raises(LayoutError, match="split"):
        layout.view((2, 2, 4))
