"""What keeps a wrong graph from being served: state between calls, randomness and anything that tracing lost.

A captured graph is the model's forward of one call, without Python. It stands for every call only if the forward
depends on its arguments and on the model alone. These checks know ops and state, not the libraries that patch models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fisedit.capture import Call, Captured
from fisedit.errors import UnsupportedCaptureError
from fisedit.fingerprint import Fingerprinter, advise, describe_changes
from fisedit.passes.ir import bound_arguments, module_path

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}
"""How far the graph may be from the model, relative to the largest value: fused and written-out attention round
differently, most in 16 bits. What these checks are for is orders of magnitude further away."""


class _Computed(TorchDispatchMode):
    """Notes every tensor that is computed from ``inputs``."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary(dict.fromkeys(inputs, True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf in self.known for leaf in pytree.tree_leaves((args, kwargs))):
            for leaf in pytree.tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.known[leaf] = True
        return out


class CaptureChecks:
    """The checks of one capture: made before it, asked after it."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        """Run the model as it is, once, or twice if the first run made something that the second one only reads.

        Raises:
            UnsupportedCaptureError: each run changes the model; or its weights are not in memory.
        """
        self.model, self.call = model, call
        self._check_modules()
        fingerprinter = Fingerprinter()
        before, after = None, fingerprinter.read(model)
        for _ in range(3):
            self.expected, self.computed = self._run()
            before, after = after, fingerprinter.read(model)
            if not (changes := before.changes(after)):
                return
        raise self._refusal(
            f"every call changes the model's own state ({describe_changes(changes)})",
            "Undo the patch, hook or attention processor that keeps values from one call to the next before recording.",
        )

    def _run(self) -> tuple[list[Tensor], WeakIdKeyDictionary]:
        tensors = {name: tensor.detach() for name, tensor in self.call.tensors.items()}
        try:
            with torch.no_grad(), _Computed(list(tensors.values())) as computed:
                out = self.model(**self.call.arguments(tensors))
        except Exception as error:
            reason = f"its forward raised {type(error).__name__} ({str(error).strip()})"
            advice = advise(self.model, "It is called with a timestep for each sample.")
            raise self._refusal(reason, advice) from error
        return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)], computed.known

    def _check_modules(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                advice = "Compile the model that it was made from."
                raise self._refusal(f"{name or 'the model'} is TorchScript, whose Python is gone", advice)
        for name, tensor in self.model.named_parameters():
            if tensor.is_meta:
                raise self._refusal(
                    f"its weights are loaded piece by piece during the call ({name} is not in memory now)",
                    "Offload the U-Net as a whole (pipe.enable_model_cpu_offload), or not at all.",
                )

    def check(self, captured: Captured) -> None:
        """Raise unless the graph is the model.

        Raises:
            UnsupportedCaptureError: the graph draws random numbers, holds values of a former call, or gives another
                result than the model.
        """
        graphs = [module for module in captured.module.modules() if isinstance(module, GraphModule)]
        for node in (node for graph in graphs for node in graph.graph.nodes):
            if _is_random(node):
                raise self._random(node)
            if node.op == "get_attr" and isinstance(value := _attribute(captured.module, node), Tensor):
                self._check_constant(node, value)
        self._check_outputs(captured)

    def _random(self, node: Node) -> UnsupportedCaptureError:
        where = f" in {module_path(node)}" if module_path(node) else ""
        if "dropout" in str(node.target):
            return self._refusal(f"dropout is active{where}", "Call .eval() on the U-Net first.")
        advice = "An edit would draw other numbers than its recording. Take the variant without randomness."
        return self._refusal(f"{node.target}{where} draws random numbers in every call", advice)

    def _check_constant(self, node: Node, value: Tensor) -> None:
        pointer = value.untyped_storage().data_ptr()
        if any(pointer and tensor.untyped_storage().data_ptr() == pointer for tensor in self.computed):
            where = ", ".join(sorted({module_path(user) or "the top level" for user in node.users}))
            raise self._refusal(
                f"{where} reads what an earlier call computed",
                "Undo the patch that reuses values between calls (feature caching) before recording.",
            )

    def _check_outputs(self, captured: Captured) -> None:
        try:
            with torch.no_grad():
                outputs = captured.module(*self.call.tensors.values())
        except RuntimeError as error:
            reason = f"its graph does not run outside of it ({str(error).strip().splitlines()[0]})"
            raise self._refusal(reason, advise(self.model, "Undo what patches the model before recording.")) from error
        for mine, theirs in zip(pytree.tree_leaves(outputs), self.expected, strict=True):
            if not _close(mine, theirs):
                reason = "its graph gives another result than the model: its forward depends on more than its arguments"
                raise self._refusal(reason, advise(self.model, "Undo what patches the model before recording."))

    def _refusal(self, reason: str, advice: str) -> UnsupportedCaptureError:
        return UnsupportedCaptureError(model=type(self.model).__name__, reason=reason, advice=advice)


def _is_random(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in tags:
        return False
    bound = bound_arguments(node)
    trains = bound.get("train", bound.get("training", True))
    return bool(trains) and bound.get("dropout_p", bound.get("p", 1.0)) != 0


def _attribute(module: nn.Module, node: Node) -> Any:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def _close(mine: Tensor, theirs: Tensor) -> bool:
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return False
    if not theirs.is_floating_point() or theirs.numel() == 0:
        return torch.equal(mine, theirs)
    largest = float(theirs.double().nan_to_num(0, 0, 0).abs().max())
    limit = largest * TOLERANCE.get(theirs.dtype, 1e-3)
    return torch.allclose(mine.double(), theirs.double(), rtol=0, atol=limit, equal_nan=True)


@contextmanager
def plain_forward(model: nn.Module) -> Iterator[None]:
    """The model without what moves its weights or compiles it: accelerate's hook around its forward, torch.compile.

    The caller has run the hook already. ``torch.compile`` below runs eagerly.
    """
    state = vars(model)
    kept: dict[str, Any] = {key: state[key] for key in ("forward", "_compiled_call_impl") if key in state}
    if "_hf_hook" in state:
        state["forward"] = state["_old_forward"]
    state.pop("_compiled_call_impl", None)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        state.pop("forward", None)
        state.update(kept)


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Leave the attributes of all modules the objects that they are: ``torch.export`` puts copies of dicts and lists in
    their place, and modules that share one would no longer."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for state, attributes in before:
            state.update({name: value for name, value in attributes.items() if state.get(name) is not value})
