"""Mark what need not be computed in every step: ``meta["stage"]``.

- ``weights``: depends on weights only (packed and merged weights): once per model;
- ``edit``: depends on the text too (its keys and values): once per edit;
- ``timestep``: depends on the timestep too, but on nothing that varies over the image (time embeddings);
- ``step``: everything else.
``lower`` cuts the graph along these marks.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fisedit.passes.base import PassResult
from fisedit.passes.ir import aten, fisedit, is_op, layout_of

STAGES = ("weights", "edit", "timestep", "step")
RANDOM = {aten.rand_like.default, aten.randn_like.default, aten.dropout.default}
"""Ops that give something new in every call."""


def hoist_step_invariant(gm: GraphModule) -> PassResult:
    hoisted = 0
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        stage = max((STAGES.index(arg.meta["stage"]) for arg in node.all_input_nodes), default=0)
        node.meta["stage"] = STAGES[max(stage, _own_stage(node))]
        hoisted += node.op == "call_function" and node.meta["stage"] != "step"
    return PassResult(hoisted)


def is_before_steps(node: Node) -> bool:
    """Whether a node by itself makes nothing that changes from step to step within an edit."""
    return _own_stage(node) <= STAGES.index("edit")


def _own_stage(node: Node) -> int:
    if node.op == "placeholder":
        if node.meta.get("role") == "timestep":
            return STAGES.index("timestep")
        return STAGES.index("step" if layout_of(node) is not None or node.meta.get("role") == "step" else "edit")
    reads_edit = is_op(node, fisedit.table.default, fisedit.cache_load.default, fisedit.cache_view.default,
                       fisedit.cache_store.default)  # fmt: skip
    return STAGES.index("step" if reads_edit or node.target in RANDOM else "weights")
