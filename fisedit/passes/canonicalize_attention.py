"""Rewrite hand-written attention to ``scaled_dot_product_attention``, and clean what capture leaves behind.

Anchored on softmax, walking both ways: ``softmax(scale * Q K^T + mask) V`` written with einsum, bmm, baddbmm or
matmul, over dimensions in any order, with dtype casts, dropout and contiguous calls between. The mask and scale of the
found product are kept.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit.passes.base import PassResult, Refusal
from fisedit.passes.ir import args, aten, bound_arguments, is_op, tensor

CASTS = (aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default, aten.alias.default)
PERMUTES = (aten.permute.default, aten.transpose.int)


@dataclass
class Product:
    """A product of two tensors, with a label for each of their dimensions, as einsum writes it."""

    left: Node
    right: Node
    labels: tuple[str, str, str]  # of left, right and result


@dataclass
class Scores:
    """``scale * product + mask``."""

    product: Product
    scale: float = 1.0
    mask: Node | None = None


@dataclass
class Operands:
    """The operands of attention, each with the labels of its dimensions, and the labels that they shall have."""

    query: tuple[Node, str]
    key: tuple[Node, str]
    value: tuple[Node, str]
    lead: str
    row: str
    column: str
    width: str
    value_width: str


class _NoAttention(Exception):
    """Why a softmax is not that of attention."""


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
        try:
            _rewrite(graph, softmax)
            matched += 1
        except _NoAttention as reason:
            refused.append(Refusal(softmax.name, str(reason)))
    graph.eliminate_dead_code()
    return PassResult(matched, tuple(refused))


def _rewrite(graph: Graph, softmax: Node) -> None:
    """Replace one attention.

    Raises:
        _NoAttention: it is none.
    """
    scores = _match_scores(args(softmax)[0])
    if scores is None:
        raise _NoAttention("its input is not a product of queries and keys")
    weights, labels = _follow(softmax, scores.product.labels[2])
    if len(weights.users) != 1:
        raise _NoAttention("the attention map is used elsewhere too")
    node = next(iter(weights.users))
    product = _match_product(node)
    if product is None or (product.left is weights) == (product.right is weights):
        raise _NoAttention("its result is not multiplied by values")
    product = _relabeled(product, weights, labels)
    summed = scores.product.labels[2][int(args(softmax)[1])]
    operands = _operands(scores.product, product, weights, summed)
    if scores.mask is not None and scores.product.labels[2] != operands.lead + operands.row + operands.column:
        raise _NoAttention("a mask over dimensions in another order")
    _replace(graph, node, operands, scores, product.labels[2])


def _operands(first: Product, second: Product, weights: Node, summed: str) -> Operands:
    """Which operand is what: keys and values are summed over ``summed``."""
    query, key = (first.left, first.labels[0]), (first.right, first.labels[1])
    if summed in query[1]:
        query, key = key, query
    value = (second.right, second.labels[1]) if second.left is weights else (second.left, second.labels[0])
    out = first.labels[2]
    lead = "".join(label for label in query[1] if label in key[1] and label in out)
    width = [label for label in query[1] if label in key[1] and label not in out]
    row = [label for label in query[1] if label not in key[1]]
    value_width = [label for label in value[1] if label not in lead + summed]
    if summed in second.labels[2] or summed not in value[1]:
        raise _NoAttention("softmax is not over what the values are summed over")
    if len(lead) not in (1, 2) or any(len(labels) != 1 for labels in (width, row, value_width)):
        raise _NoAttention("its operands have other dimensions than batch, heads, rows and channels")
    found = Operands(query, key, value, lead, row[0], summed, width[0], value_width[0])
    wanted = {query[1]: lead + row[0] + width[0], key[1]: lead + summed + width[0],
              value[1]: lead + summed + value_width[0], second.labels[2]: lead + row[0] + value_width[0]}  # fmt: skip
    if any(sorted(labels) != sorted(expected) for labels, expected in wanted.items()) or not _sizes_agree(found):
        raise _NoAttention("its operands broadcast")
    return found


def _sizes_agree(operands: Operands) -> bool:
    sizes: dict[str, int] = {}
    for node, labels in (operands.query, operands.key, operands.value):
        for label, size in zip(labels, tensor(node).shape, strict=True):
            if sizes.setdefault(label, int(size)) != int(size):
                return False
    return True


def _replace(graph: Graph, node: Node, operands: Operands, scores: Scores, out: str) -> None:
    lead = operands.lead
    with graph.inserting_before(node):
        query = _permuted(graph, *operands.query, lead + operands.row + operands.width)
        key = _permuted(graph, *operands.key, lead + operands.column + operands.width)
        value = _permuted(graph, *operands.value, lead + operands.column + operands.value_width)
        value = _cast(graph, value, tensor(query).dtype)  # queries and keys may have been raised to float32
        arguments = (query, key, value, scores.mask, 0.0, False)
        attention = graph.call_function(aten.scaled_dot_product_attention.default, arguments, {"scale": scores.scale})
        made = lead + operands.row + operands.value_width
        shaped = tensor(node).permute([out.index(label) for label in made])
        attention.meta = {**node.meta, "val": shaped.to(tensor(query).dtype)}
        result = _permuted(graph, _cast(graph, attention, tensor(node).dtype), made, out)
    node.replace_all_uses_with(result)


def _cast(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    if tensor(node).dtype == dtype:
        return node
    cast = graph.call_function(aten.to.dtype, (node, dtype))
    cast.meta = {**node.meta, "val": tensor(node).to(dtype)}
    return cast


def _permuted(graph: Graph, node: Node, labels: str, wanted: str) -> Node:
    if labels == wanted:
        return node
    order = [labels.index(label) for label in wanted]
    permuted = graph.call_function(aten.permute.default, (node, order))
    permuted.meta = {key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta}
    permuted.meta["val"] = tensor(node).permute(order)
    return permuted


def _follow(node: Node, labels: str) -> tuple[Node, str]:
    """The last of a chain of casts and permutes that starts at ``node``, and the labels of its dimensions."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if is_op(user, *PERMUTES):
            labels = _permute_labels(user, labels)
        elif not is_op(user, *CASTS):
            break
        node = user
    return node, labels


def _permute_labels(node: Node, labels: str) -> str:
    if is_op(node, aten.permute.default):
        return "".join(labels[int(dim)] for dim in args(node)[1])
    order = list(labels)
    a, b = (int(dim) for dim in args(node)[1:3])
    order[a], order[b] = order[b], order[a]
    return "".join(order)


def _relabeled(product: Product, weights: Node, labels: str) -> Product:
    """``product`` with the dimensions of ``weights`` labeled as in ``labels``, all others anew."""
    own = product.labels[0 if product.left is weights else 1]
    fresh = iter(string.ascii_uppercase)
    names = dict(zip(own, labels, strict=True))
    for label in "".join(product.labels):
        names.setdefault(label, next(fresh))
    left, right, out = ("".join(names[label] for label in each) for each in product.labels)
    return Product(product.left, product.right, (left, right, out))


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
    if is_op(value, aten.baddbmm.default):
        bound = bound_arguments(value)
        if bound["beta"] not in (0, 1):
            return None
        mask = bound["self"] if bound["beta"] else None
        return Scores(Product(bound["batch1"], bound["batch2"], ("abc", "acd", "abd")), float(bound["alpha"]), mask)
    found = _match_product(value)
    return None if found is None else Scores(found)


def _match_product(value: Node) -> Product | None:
    if is_op(value, aten.einsum.default):
        labels = _einsum(value)
        return None if labels is None else Product(args(value)[1][0], args(value)[1][1], labels)
    if not is_op(value, aten.bmm.default, aten.matmul.default):
        return None
    left, right = args(value)[:2]
    shapes: list[torch.Size] = [tensor(left).shape, tensor(right).shape]
    if len(shapes[0]) < 3 or len(shapes[0]) != len(shapes[1]) or shapes[0][:-2] != shapes[1][:-2]:
        return None
    lead = string.ascii_lowercase[: len(shapes[0]) - 2]
    return Product(left, right, (lead + "xy", lead + "yz", lead + "xz"))


def _einsum(node: Node) -> tuple[str, str, str] | None:
    """The subscripts of an einsum of two operands, each dimension with a label of its own."""
    inputs, arrow, out = str(args(node)[0]).replace(" ", "").partition("->")
    parts = inputs.split(",")
    if not arrow or len(parts) != 2 or "." in inputs or any(len(set(each)) < len(each) for each in (*parts, out)):
        return None
    return parts[0], parts[1], out
