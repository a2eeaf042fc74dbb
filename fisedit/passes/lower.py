"""Turn a finished graph into something to run: choose a provider for every semantic op, cut it into stages.

Index tables and cache loads become inputs of the stage, cache stores become outputs, so that the runtime fills and
drains fixed buffers and the graph itself touches no storage.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fisedit.passes.hoist_step_invariant import STAGES
from fisedit.passes.ir import args, fisedit, is_op
from fisedit.runtime import kernels
from fisedit.runtime.executor import Executable, Input, Stage, Store


def lower(gm: GraphModule, provider: str = "reference") -> Executable:
    """Cut ``gm`` into stages and bind every ``fisedit`` op to ``provider``'s kernel.

    Raises:
        KeyError: the provider has no kernel for an op.
    """
    for node in gm.graph.nodes:
        node.meta.setdefault("stage", "step")
    present = [stage for stage in STAGES if any(node.meta["stage"] == stage for node in gm.graph.nodes)]
    stages = [_cut(gm, stage, provider) for stage in present if stage == "step" or _computes(gm, stage)]
    roles = {node.meta.get("role"): str(node.target) for node in gm.graph.nodes if node.op == "placeholder"}
    return Executable(stages, addressed=provider == "triton", timestep=roles.get("timestep", ""))


def _computes(gm: GraphModule, stage: str) -> bool:
    return any(node.op == "call_function" and node.meta["stage"] == stage for node in gm.graph.nodes)


class _Cutter:
    """Copies the nodes of one stage; values of earlier stages become inputs."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.graph = Graph()
        self.inputs: dict[Input, Node] = {}
        self.mapping: dict[Node, Node] = {}
        self.stores: dict[Store, Node] = {}
        self.views: list[str] = []

    def take(self, node: Node) -> Node:
        if node not in self.mapping:
            self.mapping[node] = self._input(node)
        return self.mapping[node]

    def _input(self, node: Node) -> Node:
        if node.op == "get_attr":
            return self.graph.get_attr(str(node.target))
        if is_op(node, fisedit.table.default):
            return self.add_input(Input.table(node.meta["table"]))
        if is_op(node, fisedit.cache_load.default):
            index = args(node)[1] if len(node.args) > 1 else None
            table = index.meta["table"] if isinstance(index, Node) else None
            return self.add_input(Input.load(str(args(node)[0]), table))
        if is_op(node, fisedit.cache_view.default):
            return self.graph.call_function(operator.getitem, (self.add_input(Input.views()), self.view(node)))
        return self.add_input(Input.user(str(node.target)) if node.op == "placeholder" else Input.value(node.name))

    def view(self, node: Node) -> int:
        """The number of a recorded value among those that the stage reads in place."""
        slot = str(args(node)[0])
        if slot not in self.views:
            self.views.append(slot)
        return self.views.index(slot)

    def add_input(self, source: Input) -> Node:
        if source not in self.inputs:
            first = next((node for node in self.graph.nodes if node.op != "placeholder"), self.graph._root)
            with self.graph.inserting_before(first):
                self.inputs[source] = self.graph.placeholder(f"{source.kind}_{len(self.inputs)}")
        return self.inputs[source]


def _cut(gm: GraphModule, stage: str, provider: str) -> Stage:
    cutter = _Cutter(stage)
    exported: list[Node] = []
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        if node.meta["stage"] == stage and node.op == "call_function":
            _copy(cutter, node, provider)
            if any(user.meta.get("stage") != stage and user.op != "output" for user in node.users):
                exported.append(node)
    results: list[Node] = []
    if stage == "step":
        output = next(node for node in gm.graph.nodes if node.op == "output")
        results = [cutter.take(leaf) for leaf in pytree.tree_leaves(args(output)[0]) if isinstance(leaf, Node)]
    outputs = results + [cutter.mapping[node] for node in exported] + list(cutter.stores.values())
    cutter.graph.output(tuple(outputs))
    cutter.graph.eliminate_dead_code()
    module = GraphModule(gm, cutter.graph, class_name=f"{stage.capitalize()}Stage")
    names = tuple(node.name for node in exported)
    inputs, stores, views = tuple(cutter.inputs), tuple(cutter.stores), tuple(cutter.views)
    return Stage(stage, module, inputs, len(results), names, stores, views)


def _copy(cutter: _Cutter, node: Node, provider: str) -> None:
    if is_op(node, fisedit.table.default, fisedit.cache_load.default, fisedit.cache_view.default):
        return  # becomes an input where it is used
    if is_op(node, fisedit.cache_store.default):
        store = Store(str(args(node)[1]), node.meta.get("table"), node.meta.get("dtype"))
        cutter.stores[store] = cutter.take(args(node)[0])
        return
    if is_op(node, fisedit.fold_group_norms.default):
        copy = _copy_fold(cutter, node)
        copy.meta = dict(node.meta)
    else:
        copy = cutter.graph.node_copy(node, cutter.take)
    found = kernels.find(node.target, provider)
    if found is not None:
        copy.meta["provider"] = node.meta["provider"] = found[0]
        copy.target = found[1]
    cutter.mapping[node] = copy


def _copy_fold(cutter: _Cutter, node: Node) -> Node:
    """It takes all recorded statistics by their numbers, instead of one by one."""
    views, means, rstds, *rest = args(node)
    slots = [cutter.view(view) for view in views]
    numbers = [[slots[place] for place in places] for places in (means, rstds)]
    taken = [cutter.take(value) if isinstance(value, Node) else value for value in rest]
    arguments = (cutter.add_input(Input.views()), *numbers, *taken)
    return cutter.graph.call_function(fisedit.fold_group_norms.default, arguments)
