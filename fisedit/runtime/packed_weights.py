"""Weights as kernels want them (packed, merged), made once for a model, however many of its graphs read them."""

from __future__ import annotations

from collections.abc import Hashable
from functools import reduce
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

Made = WeakValueDictionary[Hashable, Tensor]
"""What was made, by how and of which tensors; kept while a graph uses it. It holds for one state of a model: not every
write to a weight can be told from its tensor."""


def pack_weights(module: GraphModule, made: Made) -> tuple[Any, ...]:
    """Run a stage without inputs, taking what other graphs have ``made`` alike."""
    values: dict[Node, Any] = {}
    keys: dict[Node, Hashable] = {}
    for node in module.graph.nodes:
        keys[node] = _key(module, node, keys)
    results: Any = module.graph.output_node().args[0]
    with torch.no_grad():
        return tuple(_value(module, result, values, keys, made) for result in results)


def _value(module: GraphModule, node: Node, values: dict[Node, Any], keys: dict[Node, Hashable], made: Made) -> Any:
    if node in values:
        return values[node]
    value = made.get(keys[node])
    if value is None:
        value = _compute(module, node, values, keys, made)
        if isinstance(value, Tensor) and node.op == "call_function":
            made[keys[node]] = value
    values[node] = value
    return value


def _compute(module: GraphModule, node: Node, values: dict[Node, Any], keys: dict[Node, Hashable], made: Made) -> Any:
    if node.op == "get_attr":
        return _attribute(module, node)
    assert callable(node.target)
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: _value(module, n, values, keys, made))
    return node.target(*args, **kwargs)


def _attribute(module: GraphModule, node: Node) -> Any:
    return reduce(getattr, str(node.target).split("."), module)


def _key(module: GraphModule, node: Node, keys: dict[Node, Hashable]) -> Hashable:
    """How a value comes about: the op and its arguments, down to the parameters and their state."""
    if node.op == "get_attr":
        tensor = _attribute(module, node)
        version = object() if tensor.is_inference() else tensor._version  # which does not count writes
        return id(tensor), tensor.data_ptr(), version, tensor.stride()
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    return node.target, str(spec), tuple(keys[leaf] if isinstance(leaf, Node) else repr(leaf) for leaf in leaves)
