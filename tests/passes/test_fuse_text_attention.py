"""Attention to a text within the linear layer of its queries: where nothing else is between the two."""

from __future__ import annotations

import pytest
from fuse_harness import Block, error, fused
from pass_harness import ops
from torch import Tensor, nn

from fisedit.passes.fused import get
from fisedit.passes.ir import fisedit

FUSED = fisedit.multiply_attend_rows.default


class Text(Block):
    """Tokens that attend to the text by heads of ``channels``; and what is done to the queries before."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.norm, self.q = nn.LayerNorm(8), nn.Linear(8, 2 * channels)
        self.k, self.v, self.out = nn.Linear(8, 2 * channels), nn.Linear(8, 2 * channels), nn.Linear(2 * channels, 8)

    def queries(self, tokens: Tensor, text: Tensor) -> Tensor:
        return self.q(tokens)

    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        found = self.attend(self.queries(self.norm(tokens), text), self.k(text), self.v(text))
        return tokens + self.out(found)


@pytest.mark.parametrize("channels", [32, 64])
def test_queries_and_what_they_find_are_one(channels: int) -> None:
    """The norm in front is in it, too; keys and values are made once for each edit."""
    model = Text(channels).eval()
    gm, results = fused(model)
    assert results["fuse_text_attention"].matched == 1
    (node,) = gm.graph.find_nodes(op="call_function", target=FUSED)
    assert get(node, "moments") is not None and node.kwargs["heads"] == 2
    assert [node.kwargs[name].meta["stage"] for name in ("key", "value")] == ["edit", "edit"]
    assert "fisedit.attend_rows" not in ops(gm)
    assert error(model, gm) < 1e-5


class Twice(Text):
    """Queries that something else reads."""

    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        queries = self.q(tokens)
        return tokens + self.out(self.attend(queries, self.k(text), self.v(text)) * queries.sigmoid())


class Activated(Text):
    def queries(self, tokens: Tensor, text: Tensor) -> Tensor:
        return nn.functional.silu(self.q(tokens))


class Timed(Text):
    """Keys that change with the timestep: a kernel may not load them before those in front of it end."""

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().body(sample, timestep, text + timestep.reshape(-1, 1, 1) / 1000)


class Selfish(Text):
    """Self-attention, whose keys are rows."""

    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        return tokens + self.out(self.attend(self.q(tokens), self.k(tokens), self.v(tokens)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Twice(), "its queries"), (Activated(), "something follows"), (Timed(), "its keys change"),
     (Text(24), "no tile has"), (Selfish(), None)],
    ids=lambda value: type(value).__name__ if isinstance(value, Block) else "",
)  # fmt: skip
def test_others_stay_apart(model: Text, reason: str | None) -> None:
    gm, results = fused(model.eval())
    result = results["fuse_text_attention"]
    assert result.matched == 0 and "fisedit.multiply_attend_rows" not in ops(gm)
    assert [refusal.reason.startswith(reason) for refusal in result.refused if reason] == [True] * (reason is not None)
    assert error(model, gm) < 1e-5
