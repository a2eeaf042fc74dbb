"""How code bases that are not diffusers write their U-Nets: attention by channels first, maps that grow, and more."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import check_equivalence
from torch import Tensor, nn

import fisedit
from fisedit.errors import UnsupportedCaptureError

SIZE = (6, 8)


class Block(nn.Module):
    """``forward(x, t)``: a convolution, what the subclass does to its map ``[B, 16, H, W]``, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Linear(1, 16)
        self.stem, self.out = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.qkv, self.project = nn.Conv1d(16, 48, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.stem(x) + self.time(t[:, None] / 1000)[:, :, None, None]
        return self.out(self.body(h))

    def body(self, h: Tensor) -> Tensor:
        attended = self.attend(*self.qkv(self.norm(h).flatten(2)).chunk(3, 1))  # [B, 16, H*W]
        return h + self.project(attended.view(h.shape))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class HeadsWithinTheBatch(Block):
    """``[B*h, d, T]``, scaled before the product: the attention of guided-diffusion and what came of it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.reshape(-1, 4, t.shape[-1]) for t in (q, k, v))
        weights = torch.einsum("bct,bcs->bts", q * 4**-0.25, k * 4**-0.25)
        weights = torch.softmax(weights.float(), dim=-1).type(weights.dtype)
        return torch.einsum("bts,bcs->bct", weights, v).reshape(-1, 16, q.shape[-1])


class HeadsLast(Block):
    """``[B, T, h, d]``, the map's heads behind its keys: the attention of annotated implementations."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2).unflatten(-1, (4, 4)) for t in (q, k, v))
        weights = (torch.einsum("bihd,bjhd->bijh", q, k) * 4**-0.5).softmax(dim=2)
        return torch.einsum("bijh,bjhd->bihd", weights, v).flatten(2).transpose(1, 2)


class ValuesFirst(Block):
    """``V W^T`` of one head: the attention of DDPM's and of the first autoencoders."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (torch.bmm(q.permute(0, 2, 1), k) * 16**-0.5).softmax(dim=2)
        return torch.bmm(v, weights.permute(0, 2, 1))


@pytest.mark.supports("Models", "attention written out, heads and channels in any order")
@pytest.mark.parametrize("build", [HeadsWithinTheBatch, HeadsLast, ValuesFirst])
def test_attention_is_packed(build: type[Block]) -> None:
    h = check_equivalence(build().eval(), {"x": torch.randn(2, 4, *SIZE), "t": torch.tensor([5, 5])})
    assert not h.program.islands


class Growing(Block):
    """A convolution padded by 2 makes a map of 8 x 10 out of 6 x 8; the next one, without padding, shrinks it again."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(16, 16, 3, padding=2), nn.Conv2d(16, 16, 3)

    def body(self, h: Tensor) -> Tensor:
        return h + self.narrow(self.norm(self.wide(h)).relu())


class Enlarging(Block):
    """A level twice the latent's size, as in models that upscale within."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)

    def body(self, h: Tensor) -> Tensor:
        return h + self.narrow(self.norm(self.wide(nn.functional.interpolate(h, scale_factor=2))).relu())


@pytest.mark.supports("Models", "maps larger than the latent")
@pytest.mark.parametrize("build", [Growing, Enlarging])
def test_levels_larger_than_the_latent(build: type[Block]) -> None:
    h = check_equivalence(build().eval(), {"x": torch.randn(2, 4, *SIZE), "t": torch.tensor([5, 5])})
    assert not h.program.islands


class Modulated(nn.Module):
    """Reads the embedding from a dict that it shares with the model, as k-diffusion's predecessors do."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state = state

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 + self.state["embedding"][:, :, None, None])


class SharedState(Block):
    """Hands the embedding down in a dict; its first argument is named ``input``."""

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Tensor] = {}
        self.modulated = Modulated(self.state)

    def forward(self, input: Tensor, sigma: Tensor) -> Tensor:
        self.state["embedding"] = self.time(sigma[:, None].log())
        out = self.out(self.modulated(self.stem(input)))
        self.state.clear()
        return out


@pytest.mark.supports("Models", "an argument named `input`; state handed down in a dict that modules share")
def test_state_in_a_shared_dict() -> None:
    """Tracing must leave the dict shared: the model is called again afterwards, and gives what it gave."""
    model = SharedState().eval()
    call = {"input": torch.randn(2, 4, *SIZE), "sigma": torch.tensor([0.7, 0.7])}
    with torch.no_grad():
        before = model(**call)
    h = check_equivalence(model, call)
    assert not h.program.islands and model.modulated.state is model.state
    with torch.no_grad():
        assert torch.equal(model(**call), before)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "mT": lambda h: h.flatten(2).mT.square().mT.view_as(h),
    "swapaxes": lambda h: h.flatten(2).swapaxes(1, 2).square().swapdims(2, 1).reshape_as(h),
    "movedim": lambda h: h.movedim(1, -1).square().moveaxis((-1,), (1,)),
    "cat with nothing": lambda h: torch.cat((h, torch.Tensor([]).type_as(h)), 1),
    "narrow": lambda h: torch.cat([h.narrow(1, 4, 12), h.narrow(-3, -16, 4)], 1),
}


class Moving(Block):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def body(self, h: Tensor) -> Tensor:
        return nn.functional.hardswish(MOVES[self.name](h))


@pytest.mark.parametrize("name", MOVES)
def test_other_names_of_permute_and_slice(name: str) -> None:
    h = check_equivalence(Moving(name).eval(), {"x": torch.randn(2, 4, *SIZE), "t": torch.tensor([5, 5])})
    assert not h.program.islands


class Unnamed(Block):
    """Forwards whatever it is given, as wrappers do."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return super().forward(*args, **kwargs)


class Packed(Block):
    def forward(self, batch: Any, t: Tensor) -> Tensor:
        return super().forward(batch["x"], t)


class Late(Block):
    def forward(self, x: Tensor, options: Any) -> Tensor:
        return super().forward(x, options["sigma"])


@pytest.mark.parametrize(
    ("model", "arguments", "reason"),
    [
        (Unnamed, (torch.zeros(2, 4, *SIZE), torch.zeros(2)), "arguments without names"),
        (Packed, ({"x": torch.zeros(2, 4, *SIZE)}, torch.zeros(2)), "(batch, t) is a map [B, C, H, W]"),
        (Late, (torch.zeros(2, 4, *SIZE), {"sigma": torch.zeros(2)}), "(x, options) is a timestep"),
    ],
)
def test_arguments_that_cannot_be_told_apart(model: type[Block], arguments: tuple[Any, ...], reason: str) -> None:
    unet = fisedit.compile(model().eval())
    with unet.record(), pytest.raises(UnsupportedCaptureError, match=re.escape(reason)):
        unet(*arguments)
