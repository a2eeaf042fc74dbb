"""Captured graphs that share the memory of their values: each one's results are its own."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

import models
from harness import Harness, masks

from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.cuda_graph import Replay
from fisedit.runtime.executor import Memo
from fisedit.runtime.graph_memory import GraphMemory
from fisedit.runtime.plan import MaskPlan
from fisedit.runtime.row_plan import LevelMasks

SIZE = (6, 8)


class Graphs:
    """Replays of a small U-Net, one for each of some masks of different sizes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = models.OpenAIStyleUNet().eval().requires_grad_(False).to("cuda")
        x, context = torch.randn(2, 4, *SIZE), torch.randn(2, 5, models.TEXT)
        given: dict[str, Any] = {"x": x, "timesteps": torch.tensor([7, 7]), "context": context}
        self.harness = Harness(model, {name: value.to("cuda") for name, value in given.items()}, provider="triton")
        self.masks = {name: masks(SIZE)[name].to("cuda") for name in ("pixel", "blob", "all but one")}
        self.replays = self.harness.program.replays()
        self.of = {name: self.take(mask) for name, mask in self.masks.items()}

    def take(self, mask: torch.Tensor) -> Replay:
        levels = LevelMasks(mask.expand(2, -1, -1), self.replays.levels)
        return self.replays.take(levels, 2, self.harness.call.device)

    def run(self, name: str) -> torch.Tensor:
        source = self.harness.poisoned(MaskPlan(self.masks[name], CostModel()))
        return self.of[name].run(self.harness.call.tensors, source, Memo())[0]


@pytest.fixture
def graphs() -> Graphs:
    return Graphs()


def test_graphs_in_turn_give_what_each_gives_alone(graphs: Graphs) -> None:
    names = [*graphs.masks]
    alone = {name: Graphs().run(name) for name in names}
    for name in (*names, *reversed(names), *names):
        assert torch.equal(graphs.run(name), alone[name])


def test_their_memory_is_about_that_of_the_largest(graphs: Graphs) -> None:
    graphs.run("all but one")
    largest = graphs.replays.memory.bytes
    for name in ("blob", "pixel"):
        graphs.run(name)
    assert 0 < graphs.replays.memory.bytes < 1.5 * largest


def test_on_another_stream(graphs: Graphs) -> None:
    wanted = {name: graphs.run(name).clone() for name in graphs.masks}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        for name in graphs.masks:
            with torch.cuda.stream(side if name == "blob" else torch.cuda.current_stream()):
                found = graphs.run(name)
                assert torch.equal(found, wanted[name])


def test_a_pool_whose_graphs_are_gone_is_not_taken_again(graphs: Graphs) -> None:
    wanted = graphs.run("blob").clone()
    for replay in graphs.of.values():
        replay.graph, replay._results = None, ()
    gc.collect()
    assert torch.equal(graphs.run("blob"), wanted)


def test_a_capture_that_finds_too_little_memory_is_tried_again() -> None:
    """Once: what others do not use is given back before."""
    memory, made = GraphMemory(), []

    def call() -> torch.Tensor:
        made.append(torch.ones(1024, device="cuda"))
        if len(made) == 1:
            raise torch.OutOfMemoryError("too little")
        return made[-1] * 2

    graph, result = memory.capture(call)
    graph.replay()
    assert len(made) == 2 and float(result.sum()) == 2048.0

    def never() -> None:
        raise torch.OutOfMemoryError("too little")

    with pytest.raises(torch.OutOfMemoryError, match="too little"):
        memory.capture(never)
