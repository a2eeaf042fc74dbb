"""The passes that fuse an edit graph for GPUs: counts, ops before and after, numerics, refusals, idempotence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import models
import pytest
import torch
import torch.nn.functional as F
from fuse_harness import Block, error, fused
from pass_harness import SIZE, Toy, captured, ops
from torch import Tensor, nn
from torch.fx import GraphModule

from fisedit.capture import bind_call, capture
from fisedit.passes import ir, pipeline
from fisedit.passes.base import PassLog, PassResult, run_passes
from fisedit.passes.count_macs import count_macs
from fisedit.passes.fused import get
from fisedit.passes.ir import fisedit, is_op
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.plan import MaskPlan

Step = tuple[PassResult, Counter[str], Counter[str], PassResult]
"""The result of a pass, the ops before and after it, and its result when it runs again."""


@pytest.fixture(scope="module")
def steps() -> dict[str, Step]:
    """Each fusion pass on a small U-Net of diffusers: 21 norms, 20 wide convolutions, 4 transformers."""
    model = models.one_level()
    gm = capture(model, bind_call(model, (), models.arguments(model, (8, 8)))).module
    run_passes(gm, pipeline.canonical_passes(), PassLog("canonical"))
    gm = GraphModule(gm, ir.copy_graph(gm.graph))
    run_passes(gm, pipeline.edit_passes("cached")[:-2], PassLog("edit"))
    found = {}
    for graph_pass in pipeline.fuse_passes():
        log, before = PassLog("test"), Counter(ops(gm))
        run_passes(gm, [graph_pass], log)
        after = Counter(ops(gm))
        run_passes(gm, [graph_pass], log)
        assert Counter(ops(gm)) == after
        found[log.records[0].name] = (log.records[0].result, before, after, log.records[1].result)
    return found


# Pass: places, the op that is gone, and how often the new op is there.
MATCHED = {
    "remove_identities": (39, None, None, 0),
    "read_in_place": (20, "fisedit.sparse_conv", "fisedit.multiply_rows", 20),
    "fuse_attention": (8, "fisedit.row_attention", "fisedit.attend_rows", 8),
    "fuse_linear": (65, None, "fisedit.multiply_rows", 20 + 37),
    "compose_linear": (0, None, "fisedit.multiply_rows", 20 + 37),  # too narrow
    "fuse_sums": (0, None, "fisedit.multiply_rows", 20 + 37),  # too narrow
    "batch_group_norms": (21, "fisedit.group_norm_rows", "fisedit.normalize_rows", 21),
    "fuse_epilogues": (53, "aten.gelu", "fisedit.multiply_rows", 20 + 37),
    "fuse_layer_norm": (12, "aten.layer_norm", "fisedit.layer_norm_rows", 12),
    "fuse_norms": (21, "fisedit.layer_norm_rows", "fisedit.multiply_norm_rows", 21),
    "fold_layer_norm": (12, None, "fisedit.multiply_norm_rows", 21),
}


@pytest.mark.parametrize("name", MATCHED)
def test_what_is_fused(name: str, steps: dict[str, Step]) -> None:
    result, before, after, again = steps[name]
    matched, gone, made, times = MATCHED[name]
    assert result.matched == matched and not result.refused
    assert gone is None or before[gone] > after[gone] == 0
    assert made is None or after[made] == times
    assert not again.modified


def test_all_fusion_passes_are_here(steps: dict[str, Step]) -> None:
    assert set(steps) == {*MATCHED, "fuse_text_attention", "transform_convolutions"}
    refused = [refusal.reason for refusal in steps["fuse_text_attention"][0].refused]
    assert len(refused) == 4 and len(set(refused)) == 1 and "no tile has" in refused[0]  # heads are too small


def test_identities_are_removed(steps: dict[str, Step]) -> None:
    """Of 9 residual blocks' and 8 attentions' divisions by 1; of equal SiLUs of the time."""
    _, before, after, _ = steps["remove_identities"]
    assert before - after == {"aten.div.Tensor": 16, "aten.reshape": 8, "aten.to.dtype": 8, "aten.silu": 7}


def test_layers_of_one_input_are_one(steps: dict[str, Step]) -> None:
    """Queries, keys and values of each self-attention; all keys and values of the text; all time embeddings."""
    _, before, after, _ = steps["fuse_linear"]
    assert after["aten.slice.Tensor"] - before["aten.slice.Tensor"] == 4 * 3 + 4 * 2 + 8
    assert before["aten.linear"] == 63 and after["aten.linear"] == 2 + 1 + 1  # of the time, of the text


def test_one_launch_folds_all_norms(steps: dict[str, Step]) -> None:
    _, before, after, _ = steps["batch_group_norms"]
    assert after["fisedit.fold_group_norms"] == 1 and after["fisedit.renew_affine"] == 21
    assert before["fisedit.cache_load"] - after["fisedit.cache_load"] == 42  # a mean and a deviation each


class Convolved(Block):
    """Queries, keys and values by 1x1 convolutions, as in autoencoders: their weights are views."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(8, 8, 1, bias=bias) for bias in (True, False, True))

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.first(sample)
        q, k, v = (layer(x).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.attend(q, k, v).transpose(1, 2).reshape(sample.shape)


def test_computed_weights_are_joined() -> None:
    gm, results = fused(Convolved().eval())
    assert results["fuse_linear"].matched == 4  # three, and the one made of them
    assert ops(gm).count("fisedit.multiply_rows") == 2 and ops(gm).count("fisedit.attend_rows") == 1
    assert error(Convolved().eval(), gm) < 1e-5


class Modulated(Block):
    """Weights made of the text: not known beforehand."""

    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        return self.q(tokens) * F.linear(tokens, self.k.weight * text.mean())


def test_weights_made_of_inputs_are_neither_joined_nor_read_by_a_kernel_of_ours() -> None:
    gm, results = fused(Modulated().eval())
    assert results["fuse_linear"].matched == 1
    assert ops(gm).count("fisedit.multiply_rows") == 2 and "aten.cat" not in ops(gm)
    assert ops(gm).count("aten.linear") == 1
    assert error(Modulated().eval(), gm) < 1e-5


class PerHead(Block):
    """A norm and a layer of each head's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.each = nn.LayerNorm(4), nn.Linear(4, 4)

    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        return self.each(self.norm(tokens.unflatten(2, (2, 4)))).flatten(2)


def test_parts_of_the_channels_are_left_alone() -> None:
    gm, results = fused(PerHead().eval())
    assert [r.reason for r in results["fuse_layer_norm"].refused] == ["it normalizes over a part of the channels"]
    assert results["fuse_linear"].matched == results["fuse_layer_norm"].matched == 0
    assert {"aten.linear", "aten.layer_norm"} <= set(ops(gm))
    assert error(PerHead().eval(), gm) < 1e-5


class Masked(Block):
    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        mask = torch.ones(text.shape[1]).cumsum(0)[None, None, None]
        return self.attend(self.q(tokens), self.k(text), self.v(text), mask)


class WideValues(Block):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.out = nn.Linear(8, 12), nn.Linear(12, 8)

    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        return self.out(self.attend(self.q(tokens), self.k(tokens), self.v(tokens)))


class DenseKeys(Block):
    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        split = [x.unflatten(2, (2, 4)).transpose(1, 2) for x in (self.q(tokens), self.k(tokens), self.v(tokens))]
        split[1] = split[1].softmax(2)  # over the positions
        return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


REFUSED = {
    Masked: "a mask",
    WideValues: "values of another width than keys",
    DenseKeys: "keys or values that are dense, not recorded",
}


@pytest.mark.parametrize("build", REFUSED)
def test_attention_that_is_left_alone(build: type[Block]) -> None:
    gm, results = fused(build().eval())
    assert [refusal.reason for refusal in results["fuse_attention"].refused] == [REFUSED[build]]
    assert ops(gm).count("fisedit.row_attention") == 1 and "fisedit.attend_rows" not in ops(gm)
    assert error(build().eval(), gm) < 1e-5


def test_keys_of_active_rows_are_counted() -> None:
    """``kv="active"``: the fused and the unfused attention know how many rows are real."""
    for build, op, kind in ((Convolved, "attend_rows", "counts"), (WideValues, "row_attention", "count")):
        gm, _ = fused(build().eval(), "active")
        (attention,) = gm.graph.find_nodes(op="call_function", target=getattr(fisedit, op).default)
        tables = [node.meta["table"].kind for node in attention.all_input_nodes if "table" in node.meta]
        assert kind in tables


class OverText(Block):
    def __init__(self, split: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.split = split

    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        query = self.q(tokens).unflatten(2, (2, 4)).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, self.split(self.k(text)), self.split(self.v(text)))
        return out.transpose(1, 2).flatten(2)


SPLITS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "transposed": (lambda rows: rows.unflatten(2, (2, 4)).transpose(1, 2), 3),
    "permuted": (lambda rows: rows.reshape(*rows.shape[:2], 2, 4).permute(0, 2, 1, 3), 3),
    "channels of a head apart": (lambda rows: rows.unflatten(2, (4, 2)).permute(0, 3, 1, 2), 4),
}


@pytest.mark.parametrize("name", SPLITS)
def test_rows_of_the_text_are_read_where_heads_lie_side_by_side(name: str) -> None:
    split, dimensions = SPLITS[name]
    gm, _ = fused(OverText(split).eval())
    (attention,) = gm.graph.find_nodes(op="call_function", target=fisedit.attend_rows.default)
    assert [len(operand.meta["val"].shape) for operand in attention.args[1:3]] == [dimensions] * 2
    assert error(OverText(split).eval(), gm) < 1e-5


class Gated(Block):
    """GEGLU between a norm and a residual; ``swapped``: the first half is the gate."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.swapped, self.wide, self.back = swapped, nn.Linear(8, 32), nn.Linear(16, 8)

    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        value, gate = self.wide(tokens).chunk(2, -1)
        if self.swapped:
            value, gate = gate, value
        return tokens + self.back(value * F.gelu(gate))


@pytest.mark.parametrize("swapped", [False, True])
def test_gates(swapped: bool) -> None:
    model = Gated(swapped).eval()
    gm, results = fused(model)
    products = [node for node in gm.graph.nodes if is_op(node, fisedit.multiply_rows.default)]
    assert [get(node, "gated") for node in products].count(True) == (not swapped)
    assert ("aten.gelu" in ops(gm)) == swapped
    assert [get(node, "residual") is not None for node in products] == [False, False, True]
    assert results["fuse_epilogues"].matched == (1 if swapped else 2)
    assert error(model, gm) < 1e-5


class Projected(Block):
    """A feed-forward with its residual, and a projection: one product. Read twice, widening, or narrow: left alone."""

    def __init__(self, bias: bool, width: int = 64, out: int = 64, reads: int = 1) -> None:
        super().__init__()
        self.reads = reads
        self.first, self.last = nn.Conv2d(8, width, 3, padding=1), nn.Conv2d(out, 8, 1)
        self.wide, self.back = nn.Linear(width, 128), nn.Linear(128, width, bias=bias)
        self.project = nn.Conv2d(width, out, 1, bias=not bias)

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.first(sample)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.back(F.silu(self.wide(tokens)))
        h = self.project(tokens.transpose(1, 2).reshape(x.shape))
        h = h + x if h.shape == x.shape else h
        return self.last(h.sigmoid() if self.reads == 1 else h * tokens.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_the_next_are_one(bias: bool) -> None:
    model = Projected(bias).eval()
    gm, results = fused(model)
    assert results["compose_linear"].matched == 1
    products = [node for node in gm.graph.nodes if is_op(node, fisedit.multiply_rows.default)]
    assert [get(node, "rows2") is not None for node in products] == [False, False, True, False]
    composed = products[2]
    assert get(composed, "residual") is products[0] and get(composed, "rows") is products[1]
    assert get(composed, "weight").meta["stage"] == get(composed, "bias").meta["stage"] == "weights"
    assert get(composed, "weight").meta["val"].shape == (64, 128 + 64)
    assert error(model, gm) < 1e-5


def test_what_is_composed_multiplies_no_more() -> None:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[1:4, 2:5] = True
    plan = MaskPlan(mask, CostModel("rows"))
    for out in (64, 32):
        gm, results = fused(Projected(True, out=out).eval())
        plain, _ = captured(Projected(True, out=out).eval(), *pipeline.edit_passes("cached"))
        assert results["compose_linear"].matched == 1
        fewer = 9 * 2 * (128 * 64 - 128 * out)  # rows, samples
        assert count_macs(plain.graph, plan) - count_macs(gm.graph, plan) == fewer


@pytest.mark.parametrize("given", [{"reads": 2}, {"out": 128}, {"width": 32, "out": 32}])
def test_linear_layers_that_are_left_alone(given: dict[str, int]) -> None:
    model = Projected(True, **given).eval()
    gm, results = fused(model)
    assert results["compose_linear"].matched == 0
    assert error(model, gm) < 1e-5


class Shortcut(Toy):
    """A residual block whose input, joined of two or one, goes by a 1x1 convolution around two others. Narrow, or read
    twice: left alone."""

    def __init__(self, two: bool = True, bias: bool = True, width: int = 64, again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.two, self.again = two, again
        self.first, self.second = nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(8, width, 3, padding=1)
        self.inner = nn.Conv2d(64 + width * two, 64, 3, padding=1)
        self.outer, self.around = nn.Conv2d(64, 128, 3, padding=1, bias=bias), nn.Conv2d(64 + width * two, 128, 1)
        self.last = nn.Conv2d(128, 8, 1)

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.first(sample)
        if self.two:
            x = torch.cat([x, self.second(sample)], 1)
        around = self.around(x)
        h = around + self.outer(F.silu(self.inner(F.silu(x))))
        return self.last(F.silu(h * around if self.again else h))


@pytest.mark.parametrize(("two", "bias"), [(True, True), (False, False)])
def test_a_convolution_and_the_shortcut_around_it_are_one(two: bool, bias: bool) -> None:
    model = Shortcut(two, bias).eval()
    gm, results = fused(model)
    assert results["fuse_sums"].matched == 1
    (joined,) = (node for node in gm.graph.nodes if is_op(node, fisedit.multiply_rows.default) and get(node, "rows2"))
    assert (get(joined, "rows3") is not None) == two and get(joined, "recorded") is not None
    assert get(joined, "weight").meta["stage"] == get(joined, "bias").meta["stage"] == "weights"
    assert get(joined, "weight").meta["val"].shape == (128, 9 * 64 + 64 + 64 * two)
    assert get(joined, "activation") == "silu"
    plain, _ = captured(Shortcut(two, bias).eval(), *pipeline.edit_passes("cached"))
    plan = MaskPlan(torch.eye(*SIZE, dtype=torch.bool), CostModel("rows"))
    assert count_macs(gm.graph, plan) == count_macs(plain.graph, plan)
    assert error(model, gm) < 1e-5


@pytest.mark.parametrize("given", [{"width": 32}, {"again": True}])
def test_sums_that_are_left_alone(given: dict[str, int]) -> None:
    model = Shortcut(**given).eval()
    gm, results = fused(model)
    assert results["fuse_sums"].matched == 0
    assert error(model, gm) < 1e-5


class Shared(Block):
    """A product that is read twice cannot take what follows it."""

    def tokens(self, tokens: Tensor, sample: Tensor, text: Tensor) -> Tensor:
        q = self.q(tokens)
        return F.silu(q) + 2 * q


def test_products_that_are_read_twice_are_left_alone() -> None:
    gm, results = fused(Shared().eval())
    assert results["fuse_epilogues"].matched == 0 and "aten.silu" in ops(gm)
    assert error(Shared().eval(), gm) < 1e-5
