"""The passes that put ops on packed rows: matched counts, ops before and after, numerics, refusals, idempotence."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline
from pass_harness import Toy, apply, captured, error_on_active_rows, ops
from torch import Tensor, nn

from fisedit.passes import ir
from fisedit.passes.eliminate_repacking import eliminate_repacking
from fisedit.passes.fold_group_norm import fold_group_norm
from fisedit.passes.insert_cache_loads import insert_cache_loads, loaded_slots
from fisedit.passes.sparsify_attention import sparsify_attention
from fisedit.passes.sparsify_conv import sparsify_conv
from fisedit.passes.sparsify_rowwise import sparsify_rowwise


class Norm(Toy):
    """conv -> + time embedding -> group_norm."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = shared
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.time = nn.Linear(1, 8)
        nn.init.normal_(self.norm.weight)

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        h = self.conv(sample) + self.time(timestep.reshape(-1, 1))[:, :, None, None]
        out = self.norm(h)
        return out + h if self.shared else out


class Conv(Toy):
    def __init__(self, *convs: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.Sequential(*convs)

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return self.convs(sample)


class Attention(Toy):
    def __init__(self, self_attention: bool = True, masked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.over_positions, self.masked = self_attention, masked
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        b, c, h, w = sample.shape
        tokens = sample.flatten(2).transpose(1, 2)
        memory = tokens if self.over_positions else text

        def heads(x: Tensor) -> Tensor:
            return x.view(b, -1, 2, c // 2).transpose(1, 2)

        bias = torch.ones(memory.shape[1]).cumsum(0)[None, None, None] if self.masked else None
        out = nn.functional.scaled_dot_product_attention(
            heads(self.q(tokens)), heads(self.k(memory)), heads(self.v(memory)), bias
        )
        return out.transpose(1, 2).reshape(b, h * w, c).transpose(1, 2).reshape(b, c, h, w)


class Rowwise(Toy):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(8, 16), nn.LayerNorm(8)
        self.positions = nn.Parameter(torch.randn(1, 48, 8))

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        b, c, h, w = sample.shape
        tokens = self.norm(sample.flatten(2).transpose(1, 2) + self.positions)
        value, gate = self.linear(tokens).chunk(2, -1)
        tokens = torch.cat([value * gate.sigmoid(), tokens[..., :4] * 2], -1)[..., 2:10]
        per_head = tokens.view(b, h * w, 2, 4) * text[:, :1, None, :4]
        return per_head.reshape(b, h * w, c).transpose(1, 2).reshape(sample.shape) / (1 + sample.abs())


CASES = {
    "norm": (Norm(), fold_group_norm, 1, "aten.group_norm", "fisedit.group_norm_rows"),
    "conv 3x3": (Conv(nn.Conv2d(8, 6, 3, padding=1)), sparsify_conv, 1, "aten.conv2d", "fisedit.sparse_conv"),
    "conv 1x1": (Conv(nn.Conv2d(8, 6, 1)), sparsify_conv, 1, "aten.conv2d", "aten.linear"),
    "conv stride": (
        Conv(nn.Conv2d(8, 6, 3, stride=2, padding=1)),
        sparsify_conv,
        1,
        "aten.conv2d",
        "fisedit.sparse_conv",
    ),
    "conv groups": (
        Conv(nn.Conv2d(8, 8, 3, padding=1, groups=4)),
        sparsify_conv,
        1,
        "aten.conv2d",
        "fisedit.sparse_conv",
    ),
    "conv dilated": (
        Conv(nn.Conv2d(8, 6, 3, padding=2, dilation=2)),
        sparsify_conv,
        1,
        "aten.conv2d",
        "fisedit.sparse_conv",
    ),
    "conv 5x3": (
        Conv(nn.Conv2d(8, 6, (5, 3), padding=(2, 1), bias=False)),
        sparsify_conv,
        1,
        "aten.conv2d",
        "fisedit.sparse_conv",
    ),
    "upsample conv": (
        Conv(nn.Upsample(scale_factor=2), nn.Conv2d(8, 6, 3, padding=1)),
        sparsify_conv,
        1,
        "aten.upsample_nearest2d.vec",
        "fisedit.sparse_conv",
    ),
    "upsample to size": (
        Conv(nn.Upsample(size=(11, 15)), nn.Conv2d(8, 6, 3, padding=1)),
        sparsify_conv,
        1,
        "aten.upsample_nearest2d.vec",
        "fisedit.sparse_conv",
    ),
    "upsample alone": (
        Conv(nn.Upsample(scale_factor=2)),
        sparsify_conv,
        1,
        "aten.upsample_nearest2d.vec",
        "fisedit.gather_rows",
    ),
    "self-attention": (
        Attention(),
        sparsify_attention,
        1,
        "aten.scaled_dot_product_attention",
        "fisedit.row_attention",
    ),
    "cross-attention": (
        Attention(False),
        sparsify_attention,
        1,
        "aten.scaled_dot_product_attention",
        "fisedit.row_attention",
    ),
    "masked cross-attention": (
        Attention(False, masked=True),
        sparsify_attention,
        1,
        "aten.scaled_dot_product_attention",
        "fisedit.row_attention",
    ),
    "rowwise": (Rowwise(), sparsify_rowwise, 20, "aten.flatten.using_ints", "fisedit.pack"),
}


@pytest.mark.parametrize("name", CASES)
def test_rewrites(name: str) -> None:
    model, graph_pass, matched, gone, present = CASES[name]
    gm, result = apply(model, graph_pass)
    assert result.matched == matched and not result.refused
    assert gone not in [op for op, node in zip(ops(gm), _calls(gm), strict=True) if "layout" in node.meta]
    assert present in ops(gm)
    assert not graph_pass(gm).modified  # idempotent


@pytest.mark.parametrize("cost", ["halo", "rows", "paper", "dense"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_active_rows_are_the_models(name: str, batch: int, cost: str) -> None:
    """Each pass alone, everything else a dense island: the active rows are the unmodified model's."""
    model, graph_pass, *_ = CASES[name]
    assert error_on_active_rows(model, [graph_pass], cost, batch) <= 2e-6


def _calls(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "call_function"]


def test_time_embedding_folds_into_the_shift() -> None:
    """An add that only the norm uses disappears; one that is used elsewhere stays."""
    folded, _ = apply(Norm(), fold_group_norm)
    (norm,) = folded.graph.find_nodes(op="call_function", target=ir.fisedit.group_norm_rows.default)
    assert norm.args[5] is not None and "aten.add.Tensor" not in ops(folded)
    shared, _ = apply(Norm(shared=True), fold_group_norm)
    (norm,) = shared.graph.find_nodes(op="call_function", target=ir.fisedit.group_norm_rows.default)
    assert norm.args[5] is None and "aten.add.Tensor" in ops(shared)


REFUSALS = {
    "norm without positions": (
        Conv(nn.AdaptiveAvgPool2d(1), nn.GroupNorm(4, 8)),
        fold_group_norm,
        "its input has no positions",
    ),
    "padded maximum": (Conv(nn.MaxPool2d(3, 1, 1)), sparsify_conv, "a pooling that leaves padding out"),
    "masked self-attention": (Attention(masked=True), sparsify_attention, "masked self-attention"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_pass_cannot_do_it_refuses(name: str) -> None:
    """The twin that must not match: refused with a reason, and right all the same as a dense island."""
    model, graph_pass, reason = REFUSALS[name]
    gm, log = captured(model, graph_pass)
    assert log.records[-1].result.matched == 0
    if reason is not None:
        assert reason in [refusal.reason for _, refusal in log.refusals]
    assert not any(op.startswith("fisedit.") for op in ops(gm))


def test_kv_active_needs_no_cache() -> None:
    gm, _ = captured(Attention(), partial(sparsify_attention, kv="active"), eliminate_repacking, insert_cache_loads)
    assert not any("rows:linear" in slot.key or "transpose" in slot.key for slot in loaded_slots(gm.graph))


def test_repacking_is_eliminated() -> None:
    gm, log = captured(Rowwise(), sparsify_rowwise, eliminate_repacking)
    assert log.records[-1].result.matched > 0
    packs = [node for node in _calls(gm) if node.target is ir.fisedit.pack.default]
    assert {node.args[0].op for node in packs} <= {"placeholder", "get_attr"}  # only what is dense to begin with
    assert not eliminate_repacking(gm).modified


def test_golden_graph() -> None:
    """What a reader of ``inspect`` sees for conv -> + time -> norm."""
    gm, _ = captured(Norm(), fold_group_norm, sparsify_conv, eliminate_repacking, insert_cache_loads)
    assert_expected_inline(
        ir.print_graph(gm.graph),
        """\
%sample: map[2, 8, 6, 8] = input
%reshape_default_4: tensor = aten.reshape(%sample, [2, 8, 6, 8])
%permute_default_3: tensor = aten.permute(%reshape_default_4, [0, 2, 3, 1])
%reshape_default_5: tensor = aten.reshape(%permute_default_3, [2, 48, 8])
%table_default_4: tensor = fisedit.table('active:6x8')
%gather_rows_default_1: rows[2, N(6x8), 8] = fisedit.gather_rows(%reshape_default_5, %table_default_4)
%timestep: tensor[2] = input
%text: tensor[2, 5, 8] = input
%permute_default_1: tensor = aten.permute(@conv.weight, [0, 2, 3, 1])
%flatten_using_ints: tensor = aten.flatten.using_ints(%permute_default_1, 1)
%table_default_1: tensor = fisedit.table('halo:conv3x3_s1_6x8_to_6x8')
%table_default_2: tensor = fisedit.table('neighbors:conv3x3_s1_6x8_to_6x8')
%table_default_3: tensor = fisedit.table('outputs:conv3x3_s1_6x8_to_6x8')
%reshape_default_2: tensor = aten.reshape(%sample, [2, 8, 6, 8])
%permute_default_2: tensor = aten.permute(%reshape_default_2, [0, 2, 3, 1])
%reshape_default_3: tensor = aten.reshape(%permute_default_2, [2, 48, 8])
%gather_rows_default: tensor = fisedit.gather_rows(%reshape_default_3, %table_default_1)
%sparse_conv_default: rows[2, N(6x8), 8] = fisedit.sparse_conv(%gather_rows_default_1, %gather_rows_default, %table_default_2, %table_default_3, %flatten_using_ints, @conv.bias, [3, 3], [1, 1], [1, 1], 1)  # conv
%reshape: tensor[2, 1] = aten.reshape(%timestep, [-1, 1])
%linear: tensor[2, 8] = aten.linear(%reshape, @time.weight, @time.bias)  # time
%unsqueeze: tensor[2, 8, 1] = aten.unsqueeze(%linear, 2)
%unsqueeze_1: tensor[2, 8, 1, 1] = aten.unsqueeze(%unsqueeze, 3)
%reshape_default: tensor = aten.reshape(%unsqueeze_1, [2, 8, 1, 1])
%permute_default: tensor = aten.permute(%reshape_default, [0, 2, 3, 1])
%reshape_default_1: tensor = aten.reshape(%permute_default, [2, 1, 8])
%cache_load_default: tensor = fisedit.cache_load('mean:group_norm')
%cache_load_default_1: tensor = fisedit.cache_load('rstd:group_norm')
%table_default: tensor = fisedit.table('count:6x8')
%group_norm_rows_default: rows[2, N(6x8), 8] = fisedit.group_norm_rows(%sparse_conv_default, %cache_load_default, %cache_load_default_1, @norm.weight, @norm.bias, %reshape_default_1, 1e-05, 48, %table_default)  # norm
%cache_load_default_2: tensor = fisedit.cache_load('rows:group_norm')
%table_default_5: tensor = fisedit.table('active:6x8')
%scatter_rows_default: rows[2, N(6x8), 8] = fisedit.scatter_rows(%cache_load_default_2, %table_default_5, %group_norm_rows_default)
%reshape_default_6: tensor = aten.reshape(%scatter_rows_default, [2, 6, 8, 8])
%permute_default_4: tensor = aten.permute(%reshape_default_6, [0, 3, 1, 2])
%reshape_default_7: tensor = aten.reshape(%permute_default_4, [2, 8, 6, 8])  # norm
return [%reshape_default_7]
""",  # noqa: E501
    )
