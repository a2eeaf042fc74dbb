"""What the page on `openaimodel` code bases says of checkpoints and of gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import TEXT, OpenAIStyleUNet, ResidualStyle
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fisedit

pytestmark = pytest.mark.supports("Integrations", "A codebase of the `openaimodel` family")

SIZE = (16, 16)


class CheckpointFunction(torch.autograd.Function):
    """As the original code saves memory in training: forward without a graph, run again for the backward."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.run, ctx.inputs = run, inputs
        with torch.no_grad():
            return run(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.inputs]
        with torch.enable_grad():
            out = ctx.run(*inputs)
        return None, *torch.autograd.grad(out, inputs, gradients)


WRAPPERS = {
    "autograd function": lambda run, *inputs: CheckpointFunction.apply(run, *inputs),
    "torch.utils.checkpoint": lambda run, *inputs: checkpoint(run, *inputs, use_reentrant=False),
}


class CheckpointedResidual(ResidualStyle):
    wrapper: Callable[..., Tensor]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.wrapper(super().forward, x, embedding)


def build(seed: int = 0) -> OpenAIStyleUNet:
    torch.manual_seed(seed)
    return OpenAIStyleUNet().eval()


def run(unet: nn.Module, text: Tensor) -> list[Tensor]:
    sample = torch.randn(2, 4, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [unet(sample, torch.full((2,), t), text) for t in (900, 500, 100)]


def texts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randn(2, 7, TEXT, generator=generator) for _ in range(2))
    return first, second


@pytest.mark.parametrize("name", WRAPPERS)
def test_checkpoint_wrappers_are_looked_through(name: str) -> None:
    before, after = texts()
    model = build()
    dense_before, dense_after = run(model, before), run(model, after)
    wrapped = build()
    wrapped.load_state_dict(model.state_dict())
    for module in wrapped.modules():
        if isinstance(module, ResidualStyle):
            module.__class__ = type("Checkpointed", (CheckpointedResidual,), {"wrapper": staticmethod(WRAPPERS[name])})
    unet = fisedit.compile(wrapped)
    with unet.record() as base:
        torch.testing.assert_close(run(unet, before), dense_before)
    everything, region = torch.ones(SIZE), torch.zeros(SIZE)
    region[3:9, 2:7] = 1
    with unet.edit(base, everything):
        torch.testing.assert_close(run(unet, after), dense_after)
    with unet.edit(base, region) as edit:
        torch.testing.assert_close(run(unet, before), dense_before, rtol=1e-4, atol=1e-5)
    assert edit.report().islands == []


def test_a_checkpoint_is_loaded_into_the_compiled_model() -> None:
    """Under the names of the original; a base of the former weights is refused."""
    before, _ = texts()
    unet, other = fisedit.compile(build()), build(seed=7)
    with unet.record() as base:
        run(unet, before)
    assert list(unet.state_dict()) == list(other.state_dict())
    unet.load_state_dict(other.state_dict())
    with unet.record():
        torch.testing.assert_close(run(unet, before), run(other, before))
    with pytest.raises(fisedit.errors.ForeignRecordingError), unet.edit(base):
        pass
