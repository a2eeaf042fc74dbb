"""Rewrite hand-written attention to ``scaled_dot_product_attention``, and clean what capture leaves behind.

Anchored on softmax, walking both ways: ``softmax(scale * Q K^T + mask) V`` written with einsum, bmm, baddbmm or
matmul, with dtype casts, dropout and contiguous calls between. The mask and scale of the found product are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.ir import args, aten, bound_arguments, is_op, tensor

CASTS = (aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default, aten.alias.default)
PRODUCTS = (aten.bmm.default, aten.matmul.default)


@dataclass
class Scores:
    """``scale * query @ key^T + mask``; ``transposed`` says that ``key`` is given as ``[..., d, L]``."""

    query: Node
    key: Node
    transposed: bool
    scale: float = 1.0
    mask: Node | None = None


def canonicalize_attention(gm: GraphModule) -> PassResult:
    graph = gm.graph
    for node in list(graph.nodes):
        if _inactive_dropout(node):
            node.replace_all_uses_with(args(node)[0])
        if _inactive_dropout(node) or is_op(node, aten._assert_tensor_metadata.default):
            graph.erase_node(node)
    matched, refused = 0, []
    for softmax in list(graph.nodes):
        if not is_op(softmax, aten.softmax.int, aten._softmax.default):
            continue
        reason = _rewrite(graph, softmax)
        if reason is None:
            matched += 1
        else:
            refused.append(Refusal(softmax.name, reason))
    graph.eliminate_dead_code()
    return PassResult(matched, tuple(refused))


def _rewrite(graph: Graph, softmax: Node) -> str | None:
    """Replace one attention; returns the reason where it is not one."""
    if int(args(softmax)[1]) % tensor(softmax).dim() != tensor(softmax).dim() - 1:
        return "softmax is not over the last dimension"
    scores = _match_scores(args(softmax)[0])
    if scores is None:
        return "its input is not a product of queries and keys"
    weights = _follow_casts(softmax)
    if len(weights.users) != 1:
        return "the attention map is used elsewhere too"
    product = next(iter(weights.users))
    value = _match_value(product, weights)
    if value is None:
        return "its result is not multiplied by values"
    if tensor(scores.query).dim() != tensor(value).dim():
        return "queries and values of different ranks"
    with graph.inserting_before(product):
        key: Any = scores.key
        if scores.transposed:
            key = graph.call_function(aten.transpose.int, (scores.key, -1, -2))
            key.meta = {"val": tensor(scores.key).transpose(-1, -2)}
        arguments = (scores.query, key, value, scores.mask, 0.0, False)
        attention = graph.call_function(aten.scaled_dot_product_attention.default, arguments, {"scale": scores.scale})
    attention.meta = dict(product.meta)
    product.replace_all_uses_with(attention)
    return None


def _follow_casts(node: Node) -> Node:
    """The last of a chain of casts that starts at ``node``."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if not is_op(user, *CASTS):
            break
        node = user
    return node


def _inactive_dropout(node: Node) -> bool:
    return is_op(node, aten.dropout.default) and not (args(node)[1] and args(node)[2])


def _look_through(value: Any) -> Any:
    while is_op(value, *CASTS):
        value = args(value)[0]
    return value


def _match_scores(value: Any) -> Scores | None:
    """Walk up from the softmax's input over scaling and mask addition to the product."""
    value = _look_through(value)
    if not isinstance(value, Node):
        return None
    if is_op(value, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor) and isinstance(args(value)[1], (int, float)):
        scores = _match_scores(args(value)[0])
        if scores is None or scores.mask is not None:
            return None
        factor = args(value)[1] if not is_op(value, aten.div.Tensor) else 1.0 / args(value)[1]
        scores.scale *= factor
        return scores
    if is_op(value, aten.add.Tensor) and not value.kwargs:
        for product, mask in (args(value)[:2], args(value)[1::-1]):
            scores = _match_scores(product)
            if scores is not None and scores.mask is None and isinstance(mask, Node):
                scores.mask = mask
                return scores
        return None
    return _match_product(value)


def _match_product(value: Node) -> Scores | None:
    if is_op(value, aten.einsum.default):
        left, right, out = _einsum(value)
        if left[:-1] == out[:-1] and right[:-2] == left[:-2] and (left[-1], right[-2]) == (right[-1], out[-1]):
            return Scores(args(value)[1][0], args(value)[1][1], transposed=False)
        return None
    if is_op(value, aten.baddbmm.default):
        bound = bound_arguments(value)
        mask = bound["self"] if bound["beta"] else None
        if bound["beta"] not in (0, 1):
            return None
        return Scores(bound["batch1"], bound["batch2"], True, float(bound["alpha"]), mask)
    if is_op(value, *PRODUCTS) and tensor(args(value)[0]).dim() >= 3:
        return Scores(args(value)[0], args(value)[1], True)
    return None


def _match_value(product: Node, weights: Node) -> Node | None:
    if is_op(product, *PRODUCTS) and args(product)[0] is weights:
        return args(product)[1]
    if is_op(product, aten.einsum.default) and args(product)[1][0] is weights:
        left, right, out = _einsum(product)
        if left[:-2] == right[:-2] == out[:-2] and left[-1] == right[-2] and out[-2:] == left[-2] + right[-1]:
            return args(product)[1][1]
    return None


def _einsum(node: Node) -> tuple[str, str, str]:
    """The subscripts of a two-operand einsum; empty strings where it is another kind."""
    inputs, _, out = str(args(node)[0]).replace(" ", "").partition("->")
    parts = inputs.split(",")
    return (parts[0], parts[1], out) if len(parts) == 2 and min(map(len, parts)) >= 3 else ("   ", "   ", "???")
