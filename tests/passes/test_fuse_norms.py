"""The passes that fuse norms: behind the products that make their rows, or into the weights of those that read them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fuse_harness import Block, error, fused
from pass_harness import Toy, ops
from torch import Tensor, nn

from fisedit.passes import ir
from fisedit.passes.fused import get
from fisedit.passes.ir import fisedit, is_op


class Norms(Toy):
    """Two norms: one moved by the time, one by what the image is on average; an identity and a halving between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 8), nn.GroupNorm(4, 8, affine=False)])
        self.time = nn.Linear(1, 8)

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        h = self.first(sample) + self.time(timestep.reshape(-1, 1))[:, :, None, None]
        h = F.silu(self.norms[0](h) / 1.0)
        return self.norms[1](self.last(h / 2) + h.mean((2, 3), keepdim=True))


def test_norms() -> None:
    """What the time adds folds into the offset; what the image adds stays an addition."""
    model = Norms().eval()
    gm, results = fused(model)
    assert results["remove_identities"].matched == 1 and results["batch_group_norms"].matched == 2
    (fold,) = gm.graph.find_nodes(op="call_function", target=fisedit.fold_group_norms.default)
    assert len(ir.args(fold)[0]) == 4 and ir.args(fold)[3:5] == ([2, 4], [8, 8])
    products = [node for node in gm.graph.nodes if is_op(node, fisedit.multiply_rows.default)]
    assert [get(node, "activation") for node in products] == ["silu", "none"]
    assert [get(node, "affine") is not None for node in products] == [True, False]
    assert ops(gm).count("aten.div.Tensor") == 1
    assert error(model, gm) < 1e-5


class Residual(Block):
    """A stream that is normalized twice and added to: the first norm comes with the product that makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)])

    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        stream = tokens + self.q(tokens)
        return stream + self.k(self.norms[0](stream)) * self.v(self.norms[1](stream))


def test_a_product_has_one_norm() -> None:
    model = Residual().eval()
    gm, results = fused(model)
    assert results["fuse_norms"].matched == 1
    assert ops(gm).count("fisedit.multiply_norm_rows") == ops(gm).count("fisedit.layer_norm_rows") == 1
    (both,) = gm.graph.find_nodes(op="call_function", target=fisedit.multiply_norm_rows.default)
    assert get(both, "residual") is not None and both.kwargs["norm_moments"]  # the first, folded into what reads it
    assert error(model, gm) < 1e-5


class Folded(Block):
    """A stream whose norm one layer reads, gated or not, or two, or one that reads something else as well."""

    def __init__(self, readers: str, affine: bool, bias: bool) -> None:
        super().__init__()
        self.readers = readers
        self.norm = nn.LayerNorm(8, 0.1, affine, bias)
        self.wide = nn.Linear(8, 16, bias)
        if affine:
            nn.init.normal_(self.norm.weight)
        if affine and bias:
            nn.init.normal_(self.norm.bias)

    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        stream = 3 + tokens + self.q(tokens)
        read = self.norm(stream)
        if self.readers == "gated":
            value, gate = self.wide(read).chunk(2, -1)
            return stream + value * F.gelu(gate)
        if self.readers == "rows too":
            return stream + self.k(read) + read
        if self.readers == "weights of the text":
            return stream + F.linear(read, (text[0].T @ text[0])[:8, :8])
        return stream + (self.k(read) if self.readers == "one" else self.k(read) * self.v(read).exp())


@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("readers", ["one", "gated", "two"])
def test_a_norm_folds_into_the_product_that_reads_it(readers: str, affine: bool, bias: bool) -> None:
    model = Folded(readers, affine, bias).eval()
    gm, results = fused(model)
    assert results["fuse_norms"].matched == results["fold_layer_norm"].matched == 1
    (both,) = gm.graph.find_nodes(op="call_function", target=fisedit.multiply_norm_rows.default)
    assert both.kwargs["norm_moments"] and both.kwargs["norm_weight"] is both.kwargs["norm_bias"] is None
    (product,) = [n for n in gm.graph.nodes if is_op(n, *ir.PRODUCTS) and get(n, "moments") is not None]
    assert get(product, "input_eps") == 0.1 and get(product, "center").meta["stage"] == "weights"
    assert error(model, gm) < 1e-5


@pytest.mark.parametrize("readers", ["rows too", "weights of the text"])
def test_norms_that_are_not_folded(readers: str) -> None:
    model = Folded(readers, True, True).eval()
    gm, results = fused(model)
    assert results["fuse_norms"].matched == 1 and results["fold_layer_norm"].matched == 0
    assert error(model, gm) < 1e-5


class Adaptive(Block):
    """A norm whose weight is made of the text, and one whose weight is made of the rows."""

    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        stream = self.q(tokens)
        other = self.k(stream)
        first = F.layer_norm(stream, [8], 1 + text.mean((0, 1))[:8])
        return first + stream + other * F.layer_norm(other, [8], other.mean((0, 1)))


def test_weights_of_norms_are_known_before_the_rows() -> None:
    model = Adaptive().eval()
    gm, results = fused(model)
    assert results["fuse_norms"].matched == 1
    assert error(model, gm) < 1e-5


class Stream(Norms):
    """Both norms read what is added to as well; the first, which is activated, comes with its product."""

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        stream = sample + self.first(sample)
        stream = stream + self.last(F.silu(self.norms[0](stream)))
        return stream + self.norms[1](stream)


def test_group_norms_of_a_stream() -> None:
    model = Stream().eval()
    gm, results = fused(model)
    assert results["fuse_norms"].matched == 2
    both = gm.graph.find_nodes(op="call_function", target=fisedit.multiply_norm_rows.default)
    assert [node.kwargs["norm_activation"] for node in both] == ["silu", "none"]
    assert error(model, gm) < 1e-5
