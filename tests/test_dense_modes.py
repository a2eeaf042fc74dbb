"""What runs dense when it is compiled, with a backend that overwrites its results as CUDA graphs do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from harness import relative_error
from torch import Tensor, nn
from toy_sampler import SIZE, TIMESTEPS, corner, other_text, run

import fisedit
from fisedit import CompiledUNet, DetectConfig
from fisedit.runtime import dense
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.kernels.group_norm_stats.reference import group_norm_stats
from fisedit.warnings import NotCompiledWarning


class Overwriting:
    """A backend of ``torch.compile`` whose results live in buffers that its next call writes again."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.compiled += 1
        buffers: list[Tensor] = []

        def call(*args: Tensor) -> list[Tensor]:
            outputs = graph(*args)
            if not buffers:
                buffers.extend(torch.empty_like(output) for output in outputs)
            for buffer, output in zip(buffers, outputs, strict=True):
                buffer.copy_(output)
            return list(buffers)

        return call


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "DEVICES", ("cpu", "cuda"))
    torch._dynamo.reset()  # it compiles one forward only so many times


@pytest.fixture
def backend(on_a_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Overwriting:
    """Dense graphs are compiled on the CPU too."""
    overwriting = Overwriting()
    monkeypatch.setattr(dense, "STAGE_OPTIONS", {"backend": overwriting, "fullgraph": True, "dynamic": False})
    monkeypatch.setattr(dense, "MODEL_OPTIONS", {"backend": overwriting, "dynamic": False})
    return overwriting


class Small(nn.Module):
    """A map normalized, convolved, and told what to be by a text: compiled in no time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.conv_out = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.norm, self.time = nn.GroupNorm(4, 16), nn.Linear(1, 16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(models.TEXT, 16), nn.Linear(models.TEXT, 16)

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, return_dict: bool = True) -> Any:
        time = torch.as_tensor(timestep, device=sample.device).float().reshape(-1, 1).expand(len(sample), 1)
        x = self.conv_in(sample) + self.time(time / 1000)[:, :, None, None]
        x = nn.functional.silu(self.norm(x))
        rows, text = x.flatten(2).transpose(1, 2), encoder_hidden_states
        operands = (
            part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.query(rows), self.key(text), self.value(text))
        )
        told = nn.functional.scaled_dot_product_attention(*operands).transpose(1, 2).flatten(2)
        out = self.conv_out(x + told.transpose(1, 2).unflatten(2, x.shape[2:]))
        return {"sample": out} if return_dict else (out,)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Small().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def call() -> dict[str, Any]:
    arguments = models.arguments(models.one_level(), SIZE)
    return {"sample": arguments["sample"], "encoder_hidden_states": arguments["encoder_hidden_states"]}


def whole_way(unet: CompiledUNet, call: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that a recording, an edit that seeks its mask, a recorded edit and a full edit give."""
    given: dict[str, Tensor] = {}
    with unet.record() as base:
        given |= {f"recorded {i}": out for i, out in enumerate(run(unet, call))}
    for key, made in base.calls.items():
        given |= {f"{slot} {key[0]:g}": made.cache.load(slot) for slot in made.cache.values}
    with unet.edit(base, detect=DetectConfig(steps=2, dilation=0, smooth=0), record=True) as edit:
        given |= {f"edited {i}": out for i, out in enumerate(run(unet, other_text(call), change=0.8))}
    assert edit.recording is not None and edit.mask is not None
    with unet.edit(edit.recording, ~corner()):
        given |= {f"second {i}": out for i, out in enumerate(run(unet, other_text(call), change=0.8))}
    with unet.edit(base, torch.ones(SIZE)):
        given |= {f"full {i}": out for i, out in enumerate(run(unet, call, change=0.1))}
    return {**given, "mask": edit.mask}


def test_compiled_sessions_give_what_others_give(model: nn.Module, call: dict[str, Any], backend: Overwriting) -> None:
    compiled, eager = fisedit.compile(model), fisedit.compile(model, dense="eager")
    wanted = whole_way(eager, call)
    assert backend.compiled == 0
    given = whole_way(compiled, call)
    assert backend.compiled == 2  # record, which is also what dense edits run, and detect
    assert given.keys() == wanted.keys() and any(name.startswith("rstd:") for name in given)
    for name, value in wanted.items():
        assert given[name].dtype == value.dtype
        torch.testing.assert_close(given[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert "compiled by Inductor: " in compiled.inspect() and "record: " in compiled.inspect()
    assert "compiled by" not in eager.inspect()


def test_what_is_stored_is_copied(model: nn.Module, call: dict[str, Any], backend: Overwriting) -> None:
    """In blocks by kind, nothing of one call in another: the next call overwrites what the graph stores."""
    unet = fisedit.compile(model)
    with unet.record() as base:
        run(unet, call, (900, 700))
    blocks = [made.cache.blocks() for made in base.calls.values()]
    assert [sorted(block.kind for block in of_call) for of_call in blocks] == [["keys", "maps", "queries", "small"]] * 2
    assert len({block.data.data_ptr() for of_call in blocks for block in of_call if block.data is not None}) == 8


def test_what_cannot_be_compiled_runs_as_it_is(
    model: nn.Module, call: dict[str, Any], backend: Overwriting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(dense, "STAGE_OPTIONS", {"backend": fails})
    monkeypatch.setattr(dense, "MODEL_OPTIONS", {"backend": fails})
    unet = fisedit.compile(model)
    with torch.no_grad():
        wanted = run(model, call)
        with pytest.warns(NotCompiledWarning, match="dense graph .*no compiler here.*dense='eager'") as seen:
            outside = run(unet, call)
        with pytest.warns(NotCompiledWarning, match="record graph") as also, unet.record() as base:
            recorded = run(unet, call)
    assert len(seen) == len(also) == 1 and len(base.calls) == len(TIMESTEPS)
    for mine, theirs, alone in zip(outside, wanted, recorded, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(alone, theirs)
    assert "record: not compiled, RuntimeError: no compiler here" in unet.inspect()


def test_a_mistake_of_the_call_is_no_failure_of_the_compiler(
    model: nn.Module, call: dict[str, Any], backend: Overwriting
) -> None:
    unet = fisedit.compile(model)
    with torch.no_grad(), pytest.raises(TypeError, match="encoder_hidden_states"):
        unet(call["sample"], 5)
    with torch.no_grad():
        assert torch.equal(run(unet, call)[0], run(model, call)[0])
    assert backend.compiled > 0


@pytest.mark.parametrize("convert", [int, float, torch.tensor, lambda t: torch.tensor([t, t])])
def test_outside_sessions(model: nn.Module, call: dict[str, Any], backend: Overwriting, convert: Any) -> None:
    """One graph for all timesteps, whose results outlive the next call."""
    unet = fisedit.compile(model)
    timesteps = [convert(t) for t in TIMESTEPS]
    with torch.no_grad():
        for mine, theirs in zip(run(unet, call, timesteps), run(model, call, timesteps), strict=True):
            torch.testing.assert_close(mine, theirs)
        assert backend.compiled == 1
        out = unet(**call, timestep=5)
    assert out["sample"].shape == call["sample"].shape
    with unet.record():
        run(unet, call, (900,))  # what the compiler keeps in the model is no change of it


def test_calls_that_are_not_compiled(model: nn.Module, call: dict[str, Any], backend: Overwriting) -> None:
    """Training, ``dense="eager"``, a model that its user compiled, threads other than the first."""
    compiled = fisedit.compile(Small().eval())
    run(compiled, call, (900,))[0].sum().backward()
    theirs = fisedit.compile(torch.compile(model, backend="eager"))
    with torch.no_grad():
        run(theirs, call, (900,))
        run(fisedit.compile(model, dense="eager"), call, (900,))
    assert backend.compiled == 0 and compiled.conv_in.weight.grad is not None
    unet = fisedit.compile(model)
    with torch.no_grad():
        run(unet, call, (900,))
        assert backend.compiled == 1
        other = threading.Thread(target=run, args=(unet, {name: value[:1] for name, value in call.items()}, (900,)))
        other.start()
        other.join()
    assert backend.compiled == 1


def test_a_changed_model_is_compiled_anew(call: dict[str, Any], backend: Overwriting) -> None:
    unet = fisedit.compile(Small().eval().requires_grad_(False))
    with torch.no_grad():
        before = run(unet, call, (900,))[0]
        unet.conv_out = nn.Conv2d(16, 4, 3, padding=1).requires_grad_(False)
        after = run(unet, call, (900,))[0]
        torch.testing.assert_close(after, run(unet._unet, call, (900,))[0])
    assert not torch.allclose(before, after)


class Hiding(nn.Module):
    """Returns an object whose tensors nobody finds."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return {sample.shape: type("Result", (), {"value": sample * 2})()}


def test_results_that_cannot_be_copied_are_not_compiled(backend: Overwriting) -> None:
    unet = fisedit.compile(Hiding().eval())
    with pytest.warns(NotCompiledWarning, match="returns a Result"), torch.no_grad():
        (result,) = unet(torch.ones(1, 4, 8, 8), 5).values()
    assert torch.equal(result.value, torch.full((1, 4, 8, 8), 2.0))


def written_out(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    """``group_norm_stats`` as a compiler sees it: its results, and the names of the ops."""
    ops: list[str] = []

    def see(graph: Any, inputs: Any) -> Any:
        ops.extend(getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes)
        return graph

    return *torch.compile(group_norm_stats, backend=see, fullgraph=True)(x, groups, weight, bias, 1e-5), ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_for_a_compiler(dtype: torch.dtype, affine: bool) -> None:
    """Statistics are float32 whatever the dtype of the map, and computed once."""
    x = (torch.randn(2, 16, 5, 3, generator=torch.Generator().manual_seed(1)) * 3 + 5).to(dtype)
    weight, bias = (
        (torch.linspace(0.5, 2, 16).to(dtype), torch.linspace(-1, 1, 16).to(dtype)) if affine else (None,) * 2
    )
    out, mean, rstd, ops = written_out(x, 4, weight, bias)
    exact = x.double().view(2, 4, -1)
    variance, wanted = torch.var_mean(exact, -1, correction=0)
    assert ops.count("var_mean") == 1 and "native_group_norm" not in ops
    assert out.dtype == dtype and mean.dtype == rstd.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(mean.double(), wanted) < 1e-6
    assert relative_error(rstd.double(), (variance + 1e-5).rsqrt()) < 1e-6
    normed = torch.nn.functional.group_norm(x.double(), 4, *(p if p is None else p.double() for p in (weight, bias)))
    assert relative_error(out.double(), normed) < {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, 8e-3)


@pytest.fixture
def dense_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a planner on a GPU says of large masks."""
    monkeypatch.setattr(CostModel, "prefers_dense", lambda self, share, device: share > 0.5)


def large() -> Tensor:
    return ~corner()


def test_a_large_edit_runs_dense(model: nn.Module, call: dict[str, Any], dense_is_faster: None) -> None:
    """The new image inside the mask, the recorded one outside, and what is recorded of it can be edited."""
    unet = fisedit.compile(model)
    with unet.record() as base:
        recorded = run(unet, call)
    with unet.edit(base, large(), record=True) as edit:
        outputs = run(unet, other_text(call), change=0.3)
    with torch.no_grad():
        wanted = run(model, other_text(call), change=0.3)
    for number in (0, 3):
        torch.testing.assert_close(outputs[number][..., large()], wanted[number][..., large()], rtol=0.2, atol=0.05)
        assert torch.equal(outputs[number][..., corner()], recorded[number][..., corner()])
    torch.testing.assert_close(outputs[0][..., large()], wanted[0][..., large()])
    report = edit.report()
    assert {kind: len(times) for kind, times in report.timings.items()} == {"detect": 0, "sparse": 0, "dense": 5}
    assert report.dense_because is not None and "86% of the latent is active" in str(report)
    assert edit.recording is not None and 0 < edit.recording.nbytes < base.nbytes
    with unet.edit(edit.recording, corner()):
        again = run(unet, other_text(call), change=0.3)
    for mine, made in zip(again, edit.recording.calls.values(), strict=True):
        assert torch.equal(mine[..., large()], made.outputs[0][..., large()])


def test_a_mask_that_is_found_may_be_large(model: nn.Module, call: dict[str, Any], dense_is_faster: None) -> None:
    unet = fisedit.compile(model)
    with unet.record() as base:
        run(unet, call)
    detect = DetectConfig(steps=2, smooth=0, dilation=3, control=False)
    with unet.edit(base, detect=detect, record=True) as edit:
        outputs = run(unet, call, change=0.8)
    assert edit.mask is not None and edit.mask.float().mean() > 0.5 and not edit.mask.all()
    assert [len(edit.timings[kind]) for kind in ("detect", "sparse", "dense")] == [2, 0, 3]
    kept = list(base.calls.values())[-1].outputs[0]
    assert torch.equal(outputs[-1][..., ~edit.mask], kept[..., ~edit.mask])
    assert edit.recording is not None and edit.recording.nbytes < base.nbytes


def test_large_and_small_edits_at_once(model: nn.Module, call: dict[str, Any], dense_is_faster: None) -> None:
    """Each lane as it would be alone."""
    unet = fisedit.compile(model)
    single = {name: value[:1] for name, value in call.items()}
    with unet.record() as base:
        run(unet, single)
    masks = [large(), corner(), torch.ones(SIZE)]
    with unet.edit([base] * 3, masks, record=True) as edits:
        together = run(
            unet, {name: value.repeat(3, *[1] * (value.dim() - 1)) for name, value in single.items()}, change=0.1
        )
    for number, mask in enumerate(masks):
        with unet.edit(base, mask, record=True) as edit:
            alone = run(unet, single, change=0.1)
        for mine, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(mine[number : number + 1], theirs)
        assert edits[number].report().dense_because == edit.report().dense_because
        pairs = zip(edits[number].recording.calls.values(), edit.recording.calls.values(), strict=True)
        assert all(mine.cache.nbytes == theirs.cache.nbytes for mine, theirs in pairs)


def test_the_planner_prefers_dense_on_a_gpu_alone() -> None:
    model = CostModel(dense_above=0.4)
    assert model.prefers_dense(0.4, torch.device("cuda")) and not model.prefers_dense(0.3, torch.device("cuda"))
    assert not model.prefers_dense(1.0, torch.device("cpu"))


@pytest.mark.nightly
@pytest.mark.parametrize("inductor", [False, True])
def test_a_unet(inductor: bool, call: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """All of a U-Net, also by Inductor itself, on this machine's CPU."""
    request.getfixturevalue("on_a_cpu" if inductor else "backend")
    model = models.one_level()
    wanted = whole_way(fisedit.compile(model, dense="eager"), call)
    given = whole_way(fisedit.compile(model), call)
    for name, value in wanted.items():
        torch.testing.assert_close(
            given[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
