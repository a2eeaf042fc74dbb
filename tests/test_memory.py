"""How much a call takes: what is predicted against what is measured while it runs, and the buffers of the plan."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import models  # noqa: E402
from harness import Harness, masks, relative_error  # noqa: E402
from meter import Allocations, Meter  # noqa: E402
from other_unets import LinearAttentionUNet, built  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import fisedit  # noqa: E402
from fisedit.explanation import workspaces  # noqa: E402
from fisedit.passes.plan_memory import planned_bytes, predict_peak  # noqa: E402
from fisedit.runtime import cuda_graph  # noqa: E402
from fisedit.runtime.calibration import Timings  # noqa: E402
from fisedit.runtime.cost_model import CostModel  # noqa: E402
from fisedit.runtime.cuda_graph import Replay, Replays  # noqa: E402
from fisedit.runtime.executor import Memo  # noqa: E402
from fisedit.runtime.plan import MaskPlan  # noqa: E402
from fisedit.runtime.row_plan import LevelMasks  # noqa: E402

SIZE = (6, 8)
Built = tuple[nn.Module, dict[str, Any]]


def openai_style() -> Built:
    torch.manual_seed(0)
    model = models.OpenAIStyleUNet().eval().requires_grad_(False)
    x, context = torch.randn(2, 4, *SIZE), torch.randn(2, 5, models.TEXT)
    return model, {"x": x, "timesteps": torch.tensor([7, 7]), "context": context}


def one_level() -> Built:
    model = models.one_level()
    return model, models.arguments(model, SIZE)


def sdxl() -> Built:
    model = models.sdxl()
    return model, models.arguments(model, (8, 8))


def linear_attention() -> Built:
    """With dense islands: a softmax over all positions."""
    torch.manual_seed(0)
    return built(LinearAttentionUNet(linear=True), 3, SIZE)


def measure(h: Harness, mask: Tensor, meter: Meter, store: bool = False) -> dict[Any, int]:
    """Run the step stage under a mask bool ``[H, W]``, watched by ``meter``; the rows of each level."""
    executable, plan = h.program.executable("edit", store), MaskPlan(mask, CostModel())
    source = h.poisoned(plan)
    if h.program.fused:
        replays = h.program.replays(store)
        projected = LevelMasks(mask.expand(h.call.batch, -1, -1), replays.levels)
        replay = replays.take(projected, h.call.batch, h.call.device)
        with meter.watching(executable.step.module):
            replay.run(h.call.tensors, source, Memo())
        return replay.plan.sizes
    with meter.watching(executable.step.module):
        executable.run(h.call.tensors, plan=plan, source=source)
    levels = {level for wanted in executable.step.inputs if wanted.key is not None for level in wanted.key.levels}
    return {level: plan.rows(level) for level in levels}


def mask_of(h: Harness, name: str) -> Tensor:
    height, width = h.dense.shape[-2:]
    return masks((height, width))[name]


INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where no GPU is")
CASES = [
    pytest.param("reference", openai_style, "blob", False),
    pytest.param("reference", openai_style, "all", False),
    pytest.param("reference", one_level, "blob", False),
    pytest.param("reference", one_level, "all", True),
    pytest.param("reference", sdxl, "corners", False, marks=pytest.mark.nightly),
    pytest.param("reference", linear_attention, "blob", False),
    pytest.param("triton", openai_style, "blob", False, marks=INTERPRETED),
    pytest.param("triton", openai_style, "all", True, marks=INTERPRETED),
    pytest.param("triton", one_level, "blob", False, marks=[INTERPRETED, pytest.mark.nightly]),
]


@pytest.mark.parametrize(("provider", "build", "name", "store"), CASES)
def test_the_peak_is_as_predicted(provider: str, build: Callable[[], Built], name: str, store: bool) -> None:
    """What lives in one buffer is alike, and one dead when the next is made."""
    h, meter = Harness(*build(), provider=provider), Meter()
    rows = measure(h, mask_of(h, name), meter, store)
    graph = h.program.graphs["edit_store" if store else "edit"].graph
    predicted = predict_peak(graph, rows)
    assert abs(meter.peak - predicted) <= 0.1 * predicted
    assert predicted <= planned_bytes(graph, rows) < sum(made.nbytes for made in meter.made)
    assert len(meter.made) > len({made.buffer for made in meter.made}) and None not in {m.buffer for m in meter.made}
    assert not meter.clashes
    sizes: dict[Any, set[int]] = defaultdict(set)
    for made in meter.made:
        sizes[made.buffer].add(made.nbytes)
    assert all(len(alike) == 1 for alike in sizes.values())


@INTERPRETED
def test_the_peak_with_what_products_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a library: of all that a call allocates, without its kernels, whose arguments the interpreter copies."""
    from fisedit.runtime.tuning import choose
    from fisedit.runtime.tuning import multiply_rows as tuning

    h = Harness(*one_level(), provider="triton")
    replays, mask = h.program.replays(), mask_of(h, "blob")
    replay = replays.take(LevelMasks(mask.expand(2, -1, -1), replays.levels), 2, h.call.device)
    for name, module in list(sys.modules.items()):
        if name.startswith("fisedit.runtime.kernels.") and name.endswith(".triton"):
            monkeypatch.setattr(module, "launch", lambda *_, **__: None, raising=False)
    monkeypatch.setattr(tuning, "RULE", tuning.LIBRARY)  # what products run on a CPU
    monkeypatch.setattr(choose, "fastest", lambda _: tuning.LIBRARY)
    replay.run(h.call.tensors, h.poisoned(MaskPlan(mask, CostModel())), Memo())
    graph = h.program.graphs["edit"].graph
    needed = workspaces(graph, replay.plan.sizes, torch.float32, Timings.load("cpu"))
    predicted = predict_peak(graph, replay.plan.sizes, needed)
    with Allocations() as seen:
        replay._call()
    assert abs(seen.peak - predicted) <= 0.1 * predicted
    assert predicted > 1.3 * predict_peak(graph, replay.plan.sizes)


def test_a_leak_is_seen() -> None:
    """One value that is kept although nobody reads it any more: more than predicted, and its buffer is not free."""
    h, meter = Harness(*openai_style(), provider="reference"), Meter()
    rows = measure(h, mask_of(h, "all"), meter)
    peak = meter.made.index(meter.at_peak[-1])
    dead = [made for made in meter.made[:peak] if made not in meter.at_peak]
    leaked = max(
        (made for made in dead if made.buffer in {later.buffer for later in meter.made[peak:]}),
        key=lambda made: made.nbytes,
    )
    again, leaking = Harness(*openai_style(), provider="reference"), Meter(kept={leaked.node.name})
    assert measure(again, mask_of(h, "all"), leaking) == rows
    predicted = predict_peak(again.program.graphs["edit"].graph, rows)
    assert leaking.peak > 1.1 * predicted >= meter.peak and leaking.clashes


def test_inspect_tells() -> None:
    h = Harness(*openai_style(), provider="reference")
    (line,) = (line for line in h.program.inspect().splitlines() if line.startswith("memory of a call"))
    peak = predict_peak(h.program.graphs["edit"].graph, {SIZE: 48, (3, 4): 12})
    assert line == (
        f"memory of a call with all rows active: 60 values in 23 buffers, at most {peak / 2**20:.2f} MiB at once"
    )
    assert "memory of a call" not in h.program.inspect("record") + h.program.inspect("detect")


def test_graphs_that_wait_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the GPU has no memory for a graph of other sizes; if none waits, the caller is told."""
    monkeypatch.setattr(Replays, "_all", WeakSet())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = fisedit.compile(models.one_level().to(device), provider="triton", dense="eager")
    call = models.arguments(unet, SIZE)
    call |= {name: value.to(device) for name, value in call.items() if isinstance(value, Tensor)}
    with unet.record() as base:
        recorded = unet(**call)[0]
    (program,) = unet._live.programs.values()
    replays, run, refused = program.replays(), Replay.run, list[Replay]()

    def crowded(self: Replay, *args: Any, **kwargs: Any) -> list[Tensor]:
        if self.buckets not in known and (replays._idle or not refused):
            refused.append(self)
            raise torch.OutOfMemoryError("no memory")
        return run(self, *args, **kwargs)

    def edited(rows: int) -> Tensor:
        mask = torch.zeros(SIZE)
        mask[:rows] = 1
        with unet.edit(base, mask), torch.no_grad():
            return unet(**call)[0]

    assert relative_error(edited(1), recorded) <= 1e-5
    known = [replay.buckets for replay in replays._idle]
    assert len(known) == 1
    other = Replays(replays.executable)
    other.give_back(other.take(LevelMasks(torch.ones(2, *SIZE) > 0, other.levels), 2, call["sample"].device))
    monkeypatch.setattr(Replay, "run", crowded)
    assert relative_error(edited(5), recorded) <= 1e-5
    assert len(refused) == 1 and replays._idle == refused and other._idle == []
    replays._idle.clear()
    refused.clear()
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        edited(5)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Replays:
    """The graphs of a program, and there are no others; five at most wait, and all that wait hold 40 bytes."""
    monkeypatch.setattr(cuda_graph, "KEPT", 5)
    monkeypatch.setattr(cuda_graph, "gpu_memory", lambda device: 160.0)
    monkeypatch.setattr(Replays, "_all", WeakSet())
    return Harness(*openai_style(), provider="triton").program.replays()


def taken(replays: Replays, rows: int) -> Replay:
    mask = torch.arange(48).view(SIZE) < rows
    return replays.take(LevelMasks(mask.expand(2, -1, -1), replays.levels), 2, torch.device("cpu"))


def used(replays: Replays, rows: int, held: int = 0) -> Replay:
    replay = taken(replays, rows)
    replay.graph_bytes = held
    replays.give_back(replay)
    return replay


@pytest.mark.parametrize(("held", "kept", "left"), [(0, 5, 5), (10, 4, 3), (70, 1, 0)])
def test_graphs_that_wait_are_few(held: int, kept: int, left: int, replays: Replays) -> None:
    """Those used longest ago go, whosever they are on a GPU; the last one stays, whatever it holds."""
    other, elsewhere = Replays(replays.executable), Replays(replays.executable)
    far = used(elsewhere, 8, held)
    far.plan.device = torch.device("meta")
    sizes = 8, 12, 16, 24, 32, 48
    made = [used(replays, rows, held) for rows in sizes]
    assert replays._idle == made[-kept:]
    assert used(replays, 48, held) is made[-1] and replays._idle == made[-kept:]
    last = used(other, 8, held)
    assert other._idle == [last] and replays._idle == made[6 - left :] and elsewhere._idle == [far]
    if left:
        oldest = taken(replays, sizes[6 - left])
        assert oldest is made[6 - left]
        for rows in sizes:  # while it is in use
            assert used(replays, rows, held) is not oldest
        assert oldest not in replays._idle and len(replays._idle) == kept


def test_to_give_a_graph_back_waits_for_nothing(replays: Replays) -> None:
    """A session may end where garbage is collected, in the very thread that looks at what waits."""
    made = [taken(replays, rows) for rows in (8, 12, 16, 24, 32, 48)]
    with Replays._lock:
        for replay in made:
            replays.give_back(replay)
    assert taken(replays, 12) is made[1]
    replays.give_back(made[1])
    assert replays._idle == [made[2], *made[3:], made[1]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_tells_what_its_memory_is() -> None:
    model, arguments = openai_style()
    on_gpu = {name: value.to("cuda") for name, value in arguments.items()}
    h = Harness(model.to("cuda"), on_gpu, provider="triton")
    mask = torch.ones(SIZE, dtype=torch.bool, device="cuda")
    replays = h.program.replays()
    replay = replays.take(LevelMasks(mask.expand(2, -1, -1), replays.levels), 2, h.call.device)
    assert replay.graph_bytes == 0
    replay.run(h.call.tensors, h.poisoned(MaskPlan(mask, CostModel())), Memo())
    assert replay.graph_bytes >= predict_peak(h.program.graphs["edit"].graph, replay.plan.sizes) > 0
