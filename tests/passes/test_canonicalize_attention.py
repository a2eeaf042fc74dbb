from __future__ import annotations

import pytest
import torch
from pass_harness import Toy, apply, captured, inputs, ops
from torch import Tensor, nn

from fisedit.capture import bind_call, capture
from fisedit.passes.canonicalize_attention import canonicalize_attention

SDPA = "aten.scaled_dot_product_attention"
FORMS = ("einsum", "channels first", "heads last", "values first", "keys first", "matmul", "baddbmm", "dropout")


class HandWritten(Toy):
    """Self-attention over the positions, its two products written in one of many ways."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def body(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        tokens = sample.flatten(2).transpose(1, 2)
        out = self.attend(self.query(tokens), self.key(tokens), self.value(tokens))
        return out.transpose(1, 2).reshape(sample.shape)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = 8**-0.5
        if self.form == "einsum":
            weights = (torch.einsum("bid,bjd->bij", q, k) * scale).softmax(-1)
            return torch.einsum("bij,bjd->bid", weights, v)
        if self.form == "channels first":  # as QKVAttention of guided-diffusion: [B, C, T]
            weights = (torch.einsum("bct,bcs->bts", q.mT * scale**0.5, k.mT * scale**0.5)).softmax(-1)
            return torch.einsum("bts,bcs->bct", weights, v.mT).mT
        if self.form == "heads last":  # keys in the middle of the map, heads last
            q, k, v = (t.unflatten(-1, (2, 4)) for t in (q, k, v))
            weights = (torch.einsum("bihd,bjhd->bijh", q, k) * scale).softmax(2)
            return torch.einsum("bijh,bjhd->bihd", weights, v).flatten(2)
        if self.form == "values first":  # V W^T, as the first autoencoders and DDPM do
            weights = (torch.bmm(q, k.mT) * scale).softmax(2).permute(0, 2, 1)
            return torch.bmm(v.mT, weights).mT
        if self.form == "keys first":
            weights = (torch.einsum("bjd,bid->bji", k, q) * scale).softmax(1)
            return torch.einsum("nst,nse->nte", weights, v)
        if self.form == "matmul":
            return (q @ k.transpose(-1, -2) / 8**0.5).float().softmax(-1).to(q.dtype) @ v
        if self.form == "baddbmm":
            empty = torch.empty(q.shape[0], q.shape[1], k.shape[1])
            return torch.bmm(torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=scale).softmax(-1), v)
        if self.form == "dropout":
            weights = nn.functional.dropout((torch.bmm(q, k.transpose(1, 2)) * scale).softmax(-1), 0.3, self.training)
            return torch.bmm(weights, v)
        if self.form == "two uses":
            weights = (q @ k.transpose(-1, -2)).softmax(-1)
            return weights @ v + weights.sum(-1, keepdim=True)
        if self.form == "no product":
            return q.softmax(-1) @ torch.eye(8)
        return (q @ k.transpose(-1, -2)).softmax(1) @ v  # softmax over the queries


@pytest.mark.parametrize("form", FORMS)
def test_hand_written_attention_is_recognized(form: str) -> None:
    model = HandWritten(form).eval()
    gm, log = captured(model)
    result = log.records[0].result
    assert result.matched == 1 and not result.refused
    assert ops(gm).count(SDPA) == 1 and "aten.softmax.int" not in ops(gm)
    call = bind_call(model, (), inputs())
    with torch.no_grad():
        (out,) = gm(*call.tensors.values())
        wanted = model(**inputs())
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("two uses", "the attention map is used elsewhere too"),
        ("no product", "its input is not a product of queries and keys"),
        ("wrong axis", "softmax is not over what the values are summed over"),
    ],
)
def test_what_is_not_attention_is_left_alone(form: str, reason: str) -> None:
    model = HandWritten(form).eval()
    gm = capture(model, bind_call(model, (), inputs())).module
    result = canonicalize_attention(gm)
    assert result.matched == 0 and [r.reason for r in result.refused] == [reason]
    assert SDPA not in ops(gm)


def test_idempotent() -> None:
    _, result = apply(HandWritten("einsum"), canonicalize_attention)
    assert not result.modified and not result.refused
