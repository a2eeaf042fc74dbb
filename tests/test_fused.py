"""The fused edit graph against the dense model: interpreted without a GPU, in CUDA graphs with one."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import models  # noqa: E402
from equivalence import other_inputs  # noqa: E402
from harness import Harness, masks, relative_error  # noqa: E402
from other_unets import FunctionalUNet, LinearAttentionUNet, SongStyleUNet, TutorialUNet, built  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import fisedit  # noqa: E402
from fisedit.explanation import explain, rows_of_mask, shapes_of  # noqa: E402
from fisedit.passes import transform_convolutions  # noqa: E402
from fisedit.passes.count_macs import count_macs  # noqa: E402
from fisedit.runtime.cache.store import StepCache  # noqa: E402
from fisedit.runtime.calibration import Timings  # noqa: E402
from fisedit.runtime.cost_model import CostModel  # noqa: E402
from fisedit.runtime.executor import Input, Memo  # noqa: E402
from fisedit.runtime.kernels.multiply_rows.triton import Config  # noqa: E402
from fisedit.runtime.plan import MaskPlan  # noqa: E402
from fisedit.runtime.row_plan import LevelMasks  # noqa: E402
from fisedit.runtime.timetable import Timetable  # noqa: E402
from fisedit.runtime.tuning import multiply_rows as tuning  # noqa: E402
from fisedit.runtime.tuning.blocks import run_blocks  # noqa: E402
from fisedit.runtime.tuning.product import LIBRARY, WINOGRAD  # noqa: E402

SIZE = (6, 8)
TOLERANCE = 1e-5


def to_device(arguments: dict[str, Any]) -> dict[str, Any]:
    return torch.utils._pytree.tree_map(lambda v: v.to(DEVICE) if isinstance(v, Tensor) else v, arguments)


def small() -> tuple[nn.Module, dict[str, Any]]:
    """Two levels, six norms, one transformer: the least that has every fused op."""
    torch.manual_seed(0)
    model = models.OpenAIStyleUNet().eval().requires_grad_(False).to(DEVICE)
    x, context = torch.randn(2, 4, *SIZE), torch.randn(2, 5, models.TEXT)
    return model, to_device({"x": x, "timesteps": torch.tensor([7, 7]), "context": context})


@cache
def harness(provider: str, kv: str = "cached") -> Harness:
    return Harness(*small(), provider=provider, kv=kv)


def mask_of(name: str, size: tuple[int, int] = SIZE) -> Tensor:
    return masks(size)[name].to(DEVICE)


def fused(h: Harness, mask: Tensor, tensors: dict[str, Tensor] | None = None) -> Tensor:
    """The output under ``mask`` (bool ``[H, W]`` or ``[B, H, W]``), active rows of the cache NaN."""
    call = h.call
    replays = h.program.replays()
    replay = replays.take(LevelMasks(mask.expand(call.batch, -1, -1), replays.levels), call.batch, call.device)
    outputs = replay.run(tensors or call.tensors, h.poisoned(MaskPlan(mask, CostModel())), Memo())
    replays.give_back(replay)
    return outputs[0]


def check(h: Harness, mask: Tensor) -> None:
    """Dense where the mask is, recorded where it is not, for the inputs of the recording."""
    out = fused(h, mask)
    inside = mask.expand(len(out), *mask.shape[-2:])[:, None].expand_as(out)
    assert relative_error(out[inside], h.dense[inside]) <= TOLERANCE
    assert torch.equal(out[~inside], h.recorded[~inside])


@pytest.mark.parametrize("name", ["blob", *(pytest.param(n, marks=pytest.mark.nightly) for n in ("corners", "pixel"))])
def test_the_fused_graph_equals_the_dense_model(name: str) -> None:
    """Masks of one bucket in turn share a graph; its tables are written anew."""
    check(harness("triton"), mask_of(name))


@pytest.mark.nightly
@pytest.mark.parametrize("build", [models.one_level, *([models.sd1, models.sdxl] if DEVICE == "cuda" else [])])
def test_the_fused_graph_of_diffusers(build: Callable[[], nn.Module]) -> None:
    model = build().to(DEVICE)
    h = Harness(model, to_device(models.arguments(model, (8, 12))), provider="triton")
    for name in ("blob", "all but one") if DEVICE == "cuda" else ("blob",):
        check(h, mask_of(name, (8, 12)))


@pytest.mark.parametrize("apart", [True, False], ids=["two kernels", "one kernel"])
def test_queries_that_attend_to_the_text(apart: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the recorded text and another one. Interpreted, the rule takes two kernels."""
    attend, tile, made = tuning._attend, Config(16, 32, 32, 4, 2), []

    def run(way: Any, given: Any, text: Any) -> Tensor:
        made.append(attend(way if apart else tile, given, text))
        return made[-1]

    monkeypatch.setattr(tuning, "_attend", run)
    model = models.one_level(attention_head_dim=(2, 1)).to(DEVICE)  # one head of 32 in the middle
    given = to_device(models.arguments(model, SIZE))
    h, reference = (Harness(model, given, provider=name) for name in ("triton", "reference"))
    assert "heads of 32, 7 keys" in explain(h.program, mask_of("blob"), CostModel(), Timings.load("cpu", tmp_path))
    check(h, mask_of("blob"))
    tensors = other_inputs(h.call.tensors, h.call.timestep)
    wanted = reference.edit(mask_of("blob"), tensors=tensors)
    assert not torch.equal(tensors["encoder_hidden_states"], h.call.tensors["encoder_hidden_states"])
    assert relative_error(fused(h, mask_of("blob"), tensors), wanted) <= TOLERANCE and made


@pytest.mark.parametrize("name", ["blob", pytest.param("corners", marks=pytest.mark.nightly)])
def test_convolutions_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Interpreted, the rule takes nine taps. Of one level, and of a map that is upsampled."""
    compute, made = tuning._compute, []
    monkeypatch.setattr(transform_convolutions, "LEAST", 1)
    monkeypatch.setattr(transform_convolutions, "NARROW", 4)

    def run(given: Any, blocks: Any = None) -> Any:
        if not blocks:
            return compute(given)
        made.append(blocks["block_sources"].shape[2])
        return run_blocks(**given, blocks=blocks)

    monkeypatch.setattr(tuning, "_compute", run)
    h = Harness(*small(), provider="triton")
    check(h, mask_of(name))
    assert set(made) == {9, 16}
    timings = Timings.load("cpu", tmp_path)
    graph = h.program.graphs["edit"].graph
    rows = rows_of_mask(graph, mask_of(name))
    shapes = [shapes_of(node, rows, torch.float32) for node in graph.nodes if "block_sources" in node.kwargs]
    for _, (blocks, number) in shapes:
        timings.put(blocks, number, WINOGRAD, 3.0)
    assert "winograd" not in explain(h.program, mask_of(name), CostModel(), timings)  # a call takes no blocks then
    for (product, number), _ in shapes:
        timings.put(product, number, LIBRARY, 5.0)
    assert explain(h.program, mask_of(name), CostModel(), timings).count("winograd 3 µs; against library 5") >= 2


@pytest.mark.nightly
def test_a_mask_for_each_sample() -> None:
    """Rows padded to the larger mask's, tables of their own."""
    check(harness("triton"), torch.stack([mask_of("pixel"), mask_of("blob")]))


@pytest.mark.nightly
def test_a_full_level_has_its_own_statistics() -> None:
    """Other inputs than recorded: the lower level is all active, and normalizes what is there now."""
    h, reference = harness("triton"), harness("reference")
    mask = torch.zeros(SIZE, dtype=torch.bool, device=DEVICE)
    mask[::2, ::2] = True
    tensors = other_inputs(h.call.tensors, h.call.timestep)
    wanted = reference.edit(mask, tensors=tensors)
    assert relative_error(fused(h, mask, tensors), wanted) <= TOLERANCE
    assert relative_error(reference.edit(mask), wanted) > 0.01  # the other inputs do tell


def test_each_sample_has_its_own_statistics() -> None:
    """In one call a sample whose lower level is all active, and one whose is not: each as by itself."""
    h, reference = harness("triton"), harness("reference")
    full = torch.zeros(SIZE, dtype=torch.bool, device=DEVICE)
    full[::2, ::2] = True
    mask = torch.stack([mask_of("pixel"), full])
    tensors = other_inputs(h.call.tensors, h.call.timestep)
    wanted = reference.edit(mask, tensors=tensors)
    assert relative_error(fused(h, mask, tensors), wanted) <= TOLERANCE
    assert relative_error(reference.edit(mask[:1], tensors=tensors)[0], wanted[0]) <= TOLERANCE
    assert relative_error(reference.edit(mask[1:], tensors=tensors)[1], wanted[1]) <= TOLERANCE


def test_a_graph_made_in_inference_mode_serves_outside() -> None:
    """Its buffers are not inference tensors, which nothing may write to outside."""
    h = Harness(*small(), provider="triton")
    with torch.inference_mode():
        fused(h, mask_of("blob"))
    tensors = other_inputs(h.call.tensors, h.call.timestep)
    wanted = harness("reference").edit(mask_of("blob"), tensors=tensors)
    out = fused(h, mask_of("blob"), tensors)
    assert relative_error(out, wanted) <= TOLERANCE and not out.is_inference()


def test_a_call_that_failed_is_tried_again() -> None:
    """What it had not copied yet is copied then."""
    h, mask = harness("triton"), mask_of("blob")
    source, memo, replays = h.poisoned(MaskPlan(mask, CostModel())), Memo(), h.program.replays()
    replay = replays.take(LevelMasks(mask.expand(h.call.batch, -1, -1), replays.levels), h.call.batch, h.call.device)
    replay.run(h.call.tensors, source, memo)
    tensors = other_inputs(h.call.tensors, h.call.timestep)
    with pytest.raises(AttributeError):
        replay.run(tensors, object(), memo)  # type: ignore[arg-type]  # a source that has nothing
    outputs = replay.run(tensors, source, memo)
    replays.give_back(replay)
    assert relative_error(outputs[0], harness("reference").edit(mask, tensors=tensors)) <= TOLERANCE


@pytest.mark.nightly
def test_all_active_is_the_dense_model_of_other_inputs() -> None:
    h = harness("triton")
    mask = torch.ones(SIZE, dtype=torch.bool, device=DEVICE)
    tensors = other_inputs(h.call.tensors, h.call.timestep)
    with torch.no_grad():
        wanted = h.model(**h.call.arguments(tensors))
    assert relative_error(fused(h, mask, tensors), wanted) <= TOLERANCE


@pytest.mark.nightly
def test_active_keys_alone() -> None:
    """``kv="active"``: keys that pad the rows of one sample to another's are left out."""
    mask = torch.stack([mask_of("blob"), mask_of("corners")])
    wanted = harness("reference", "active").edit(mask)
    assert relative_error(fused(harness("triton", "active"), mask), wanted) <= TOLERANCE
    assert relative_error(harness("reference").edit(mask), wanted) > TOLERANCE


def test_what_a_replay_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of each timestep is copied to where the captured graph reads; after a move of weights it is captured
    again, and only then."""
    h = Harness(*small(), provider="triton")
    stage, memo = h.program.executable("edit").before["timestep"], Memo(timetable=Timetable([7.0, 3.0]))
    replays = h.program.replays()
    replay = replays.take(LevelMasks(mask_of("blob").expand(2, -1, -1), replays.levels), 2, h.call.device)
    monkeypatch.setattr(replay, "_call", lambda: ([], {}))
    monkeypatch.setattr(replay, "_capture", lambda: setattr(replay, "graph", Graph()))

    class Graph:
        def replay(self) -> None:
            """The kernels are no part of this test."""

    def run(timestep: float) -> list[Tensor]:
        inputs = {**h.call.tensors, "timesteps": torch.full((2,), timestep, device=DEVICE)}
        assert memo.timetable is not None
        memo.timetable.now = timestep
        replay.run(inputs, h.cache, memo)
        wanted = stage.module(*[replay.executable.fetch(i, stage, inputs, None, None, memo) for i in stage.inputs])
        read = [replay._argument(Input.value(name)) for name in stage.values]
        for value, alone in zip(read, wanted, strict=True):
            torch.testing.assert_close(value, alone, rtol=1e-5, atol=1e-6)
        return read

    first = run(7.0)
    captured: Any = Graph()
    replay.graph = captured
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(first, run(3.0), strict=True)) and replay.graph is captured
    weight = next(h.model.parameters())
    weight.data = weight.data.clone()
    run(7.0)
    assert replay.graph is not captured


@pytest.mark.nightly
def test_rounds_as_the_reference() -> None:
    """An edit that is recorded and edited again, through the public interface."""
    model, arguments = small()
    sample, timesteps, text = arguments.values()
    outputs = {}
    for provider in ("reference", "triton"):
        unet = fisedit.compile(model, provider=provider)
        with unet.record() as base:
            first = unet(sample, timesteps, text)
        with unet.edit(base, mask_of("blob"), record=True) as edit:
            second = unet(sample, timesteps, -text)
        assert edit.recording is not None
        with unet.edit(edit.recording, mask_of("corners")):
            outputs[provider] = unet(sample, timesteps, 2 * text)
    assert relative_error(outputs["triton"], outputs["reference"]) <= TOLERANCE
    inside = mask_of("blob")
    assert relative_error(outputs["triton"][..., inside], second[..., inside]) <= TOLERANCE
    assert relative_error(second[..., inside], first[..., inside]) > 100 * TOLERANCE
    assert relative_error(outputs["triton"], second) > 100 * TOLERANCE


def test_macs_are_those_of_the_reference() -> None:
    """Fused or not, the same products: counted over both graphs, with keys of text that are split by heads."""
    plan = MaskPlan(masks(SIZE)["blob"], CostModel("rows"))
    counted = []
    for provider in ("reference", "triton"):
        program = harness(provider).program
        program.executable("edit")
        counted.append(count_macs(program.graphs["edit"].graph, plan))
    assert counted[0] == counted[1] > 0


class Upsampled(nn.Module):
    """An upsampling that no convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Upsample(scale_factor=2)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.up(self.down(x)).sigmoid() * t.cos()[:, None, None, None])


class Wide(nn.Module):
    """Wide enough for products that become one: a shortcut with its convolution, two linear layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(3, 64, 1)
        self.inner, self.outer = nn.Conv2d(128, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.around, self.norm = nn.Conv2d(128, 64, 1), nn.GroupNorm(4, 64)
        self.wide, self.back, self.project = (nn.Conv2d(64, 64, 1) for _ in range(3))
        self.last = nn.Conv2d(64, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = torch.cat([self.first(x), self.second(x)], 1)
        x = self.around(x) + self.outer(self.norm(self.inner(x)).sigmoid())
        return self.last(self.project(x + self.back(self.wide(x).sigmoid() * t.cos()[:, None, None, None])) + x)


class Conditioned(nn.Module):
    """Weights that are made in each call, of its timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = 1 + t.cos().mean()
        x = nn.functional.conv2d(x, self.first.weight * scale, self.first.bias, padding=1).sigmoid()
        y = nn.functional.linear(x.permute(0, 2, 3, 1), self.linear.weight * scale, self.linear.bias * scale)
        return self.last(x + y.permute(0, 3, 1, 2))


def test_no_fused_product_takes_weights_that_the_call_makes() -> None:
    """The kernel asks for weights before the one in front of it, which may have made them, has ended."""
    torch.manual_seed(0)
    model, arguments = built(Conditioned(), 3, SIZE)
    h = Harness(model.to(DEVICE), to_device(arguments), provider="triton")
    check(h, mask_of("corners"))
    nodes = h.program.graphs["edit"].graph.nodes
    products = [node for node in nodes if node.target is torch.ops.fisedit.multiply_rows.default]
    assert len(products) == 1 and sum("multiply" in str(node.target) for node in nodes) == 1


def test_an_edit_finds_where_recorded_values_lie_already_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a call was recorded, when the GPU was busy for long; a call of an edit waits for no table of addresses."""
    model, arguments = small()
    unet, mask = fisedit.compile(model, provider="triton", dense="eager"), mask_of("blob")
    with torch.no_grad(), unet.record() as base:
        unet(**arguments)
    looked: list[tuple[str, ...]] = []

    def look(cache: StepCache, slots: tuple[str, ...], look: Any = StepCache._look) -> Any:
        looked.append(slots)
        return look(cache, slots)

    monkeypatch.setattr(StepCache, "_look", look)
    (cache,) = [call.cache for call in base.calls.values()]
    tables = dict(cache._tables)
    with torch.no_grad(), unet.edit(base, mask):
        unet(**arguments)
    assert not looked and tables and cache._tables == tables
    cache._places.clear()
    with torch.no_grad(), unet.edit(base, mask):
        unet(**arguments)
    assert looked


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "max pooling and transposed convolutions": lambda: TutorialUNet(bilinear=False),
    "an upsampling by itself": Upsampled,
    "products that become one": Wide,
    "grouped filters": SongStyleUNet,
    "linear attention": lambda: LinearAttentionUNet(linear=True),
    "bilinear": lambda: TutorialUNet(bilinear=True),
    "functional": FunctionalUNet,
}
SLOW = {"max pooling and transposed convolutions", "grouped filters", "linear attention", "bilinear", "functional"}


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(build, id=name, marks=[pytest.mark.nightly] if name in SLOW else [])
        for name, build in OTHERS.items()
    ],
)
def test_other_unets(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, arguments = built(build(), 4 if build is FunctionalUNet else 3, SIZE)
    h = Harness(model.to(DEVICE), to_device(arguments), provider="triton")
    check(h, mask_of("corners"))
