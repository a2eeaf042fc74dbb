"""Run the calls of one or several edits: dense while a mask is sought, then only the active rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisedit.alignment import align_embeddings
from fisedit.capture import Call
from fisedit.edit import Edit, Edits
from fisedit.errors import IncompleteRecordingError, RecordingMismatchError
from fisedit.passes.count_loads import count_loads, levels
from fisedit.passes.count_macs import count_macs
from fisedit.program import Program
from fisedit.recording import CallCounter, CallKey, RecordedCall
from fisedit.report import EditReport
from fisedit.runtime.cache.store import Overlay, StackedCache, StepCache, clone_detached, shrink, take_samples
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.cuda_graph import Replay, Replays
from fisedit.runtime.executor import Memo, Store
from fisedit.runtime.plan import MaskPlan, Table
from fisedit.runtime.timetable import Timetable
from fisedit.sameness import Copies, Same
from fisedit.timing import Span

Computed = tuple[list[Tensor], dict[Store, Tensor]]
"""The outputs of a call, and the values to record."""


@dataclass
class Lane:
    """One edit within the calls of a session.

    Attributes:
        samples: the numbers of its samples in a call: its images, once for each part of guidance.
        program, plan: of its last sparse call, the plan of its own masks alone.
        unsettled: what its detect steps recorded, whole until the mask is known.
        whole: whether its masks are full. reason: why it runs dense, if they are not.
    """

    edit: Edit
    cost_model: CostModel
    samples: list[int] = field(default_factory=list)
    program: Program | None = None
    batch: int = 1
    bytes_loaded: list[int] = field(default_factory=list)
    unsettled: list[tuple[CallKey, dict[Store, Tensor], RecordedCall]] = field(default_factory=list)
    texts: Copies = field(default_factory=Copies)
    whole: bool = False
    reason: str | None = None
    _kind: str | None = None
    _plans: dict[tuple[torch.device, int], MaskPlan] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """How the next call is computed: ``detect``, ``sparse``, ``dense`` or not at all (``recorded``)."""
        masks = self.edit.masks
        if masks is None:
            return "detect"
        if self._kind is None:  # once: the values of masks on a GPU are waited for
            share, device = float(masks.float().mean()), self._device
            self.whole = share == 1
            dense = self.whole or self.cost_model.prefers_dense(share, device)
            self._kind = "recorded" if share == 0 else "dense" if dense else "sparse"
            if dense and not self.whole:
                self.reason = f"{share:.0%} of the latent is active, and a sparse call would take longer"
        return self._kind

    @property
    def _device(self) -> torch.device:
        return next(iter(self.edit.base.calls.values())).sample.device

    @cached_property
    def images(self) -> int:
        """K: the images of its base. Kept, since latents may have to be compared to know it."""
        return self.edit.base.images

    def masks(self, device: torch.device) -> Tensor:
        """Its mask for each of its samples, bool ``[B, H, W]``."""
        masks = self.edit.masks_on(device).expand(self.images, -1, -1)  # [K, H, W]
        return masks.repeat(len(self.samples) // self.images, 1, 1)

    def plan(self, device: torch.device) -> MaskPlan:
        key = device, len(self.samples)
        if key not in self._plans:
            self._plans[key] = MaskPlan(self.masks(device), self.cost_model)
        return self._plans[key]

    def keep(self, key: CallKey, made: RecordedCall, stored: dict[Store, Tensor], plan: MaskPlan | None) -> None:
        """Record a call as an overlay of its base: the active rows where computed, the base everywhere else."""
        assert self.edit.recording is not None
        self.edit.recording.calls[key] = made
        kind = self.kind
        if kind == "detect":
            self.unsettled.append((key, stored, made))
        elif kind == "dense" and self.whole:
            made.cache = whole(len(self.samples), stored)
        elif kind == "dense":
            made.cache.values = self._active_rows(stored)
        elif kind == "sparse":
            assert plan is not None
            for store, value in stored.items():
                index = plan.table(store.rows) if store.rows else None
                made.cache.values[store.slot] = value if index is None else Overlay(value, index)

    def settle(self) -> None:
        """With the mask just found, reduce what the detect steps recorded to the active rows."""
        kind = self.kind
        for key, stored, made in self.unsettled:
            base = self.edit.base.calls[key]
            if self.whole:
                made.cache = whole(len(self.samples), stored)
                continue
            masks = self.masks(made.sample.device)  # [B, H, W]
            made.sample = _inside(masks, made.sample, base.sample)
            made.outputs = [_inside(masks, new, old) for new, old in zip(made.outputs, base.outputs, strict=True)]
            if kind != "recorded":
                made.cache.values = self._active_rows(stored)
        self.unsettled.clear()

    def _active_rows(self, stored: dict[Store, Tensor]) -> dict[str, Tensor | Overlay]:
        """What a dense call stored, reduced to the active rows; group statistics stay the base's."""
        plan = self.plan(self._device)
        return shrink({
            store.slot: (value, plan.table(store.rows) if store.rows else None) for store, value in stored.items()
            if not store.slot.startswith(("mean:", "rstd:"))
        })  # fmt: skip

    def report(self) -> EditReport:
        edit, program = self.edit, self.program
        report = EditReport(detect_steps=edit.detect_steps, timings=edit.timings, bytes_cached=edit.base.nbytes)
        report = replace(report, active_share=None if edit.masks is None else float(edit.masks.float().mean()))
        report = replace(report, dense_because=self.reason)
        report = replace(report, seconds_recorded=[call.seconds for call in edit.base.calls.values()])
        if program is None:
            return report
        own = len(self.samples) / self.batch  # this edit's share of the calls that carried it
        macs = count_macs(program.captured.module.graph)
        report = replace(report, macs_dense=round(macs * own), islands=program.islands)
        if edit.masks is None or "edit" not in program.graphs or self.kind != "sparse":
            return report
        graph, plan, loaded = program.graphs["edit"].graph, self.plan(torch.device("cpu")), self.bytes_loaded
        if program.fused:
            plan = MaskPlan(self.masks(torch.device("cpu")), CostModel("rows"))
            loaded = [round(count_loads(graph, plan) * own)] * len(edit.timings["sparse"])
        macs = count_macs(graph, plan)
        return replace(
            report,
            macs_sparse=round(macs * own),
            bytes_loaded=loaded,
            levels={f"{h}x{w}": plan.share((h, w)) for h, w in levels(graph)},
            tiles={str(geometry): tile for geometry, tile in plan.tiles.items()},
        )


@dataclass
class Group:
    """The lanes of a call that are computed alike, as one call of their samples."""

    lanes: list[Lane]
    numbers: list[int]
    memo: Memo = field(default_factory=Memo)
    plan: MaskPlan | None = None
    replays: Replays | None = None
    replay: Replay | None = None
    _selected: dict[str, tuple[Tensor, int, Tensor]] = field(default_factory=dict)
    _masks: Tensor | None = None

    def select(self, call: Call) -> Call:
        """This group's samples of a call; what did not change since the last call stays the same tensor."""
        batch = call.batch
        if self.numbers == list(range(batch)):
            return call
        tensors = {}
        for name, tensor in call.tensors.items():
            if tensor.dim() == 0 or len(tensor) % batch:
                tensors[name] = tensor
                continue
            version = -1 if tensor.is_inference() else tensor._version
            seen = self._selected.get(name)
            if seen is None or seen[0] is not tensor or seen[1] != version or version < 0:
                self._selected[name] = seen = (tensor, version, take_samples(tensor, batch, self.numbers))
            tensors[name] = seen[2]
        return replace(call, tensors=tensors)

    def origins(self) -> list[tuple[Lane, int]]:
        """For each sample of the group's call: its lane, and its number in the lane's own recording."""
        places = {sample: (lane, n) for lane in self.lanes for n, sample in enumerate(lane.samples)}
        return [places[sample] for sample in self.numbers]

    def own(self, lane: Lane) -> list[int]:
        """The numbers of a lane's samples in the group's call."""
        return [self.numbers.index(sample) for sample in lane.samples]

    def recorded_outputs(self, recorded: dict[int, RecordedCall]) -> list[Tensor]:
        """The outputs that the bases recorded, for the samples of the group's call."""
        origins = [(recorded[id(lane)].outputs, number) for lane, number in self.origins()]
        each = [[output[number] for output in outputs] for outputs, number in origins]
        return [torch.stack(pieces) for pieces in zip(*each, strict=True)]

    def keep_background(self, computed: Computed, recorded: dict[int, RecordedCall]) -> Computed:
        """What a dense call computed, with recorded outputs outside the masks."""
        if all(lane.whole for lane in self.lanes):
            return computed
        outputs, stored = computed
        if self._masks is None:
            self._masks = self.stack_masks(outputs[0].device)
        pairs = zip(outputs, self.recorded_outputs(recorded), strict=True)
        return [_inside(self._masks, new, old) for new, old in pairs], stored

    def source(self, recorded: dict[int, RecordedCall]) -> StepCache | StackedCache:
        if len(self.lanes) == 1:
            return recorded[id(self.lanes[0])].cache
        return StackedCache([(recorded[id(lane)].cache, number) for lane, number in self.origins()])

    def give_back(self) -> None:
        if self.replays is not None and self.replay is not None:
            self.replays.give_back(self.replay)
        self.replays = self.replay = None

    def stack_masks(self, device: torch.device) -> Tensor:
        masks = {id(lane): lane.masks(device) for lane in self.lanes}
        return torch.stack([masks[id(lane)][number] for lane, number in self.origins()])  # [B, H, W]


class EditSession:
    """Runs the calls of edits: detect, then sparse (or dense under a full mask, or none under an empty one).

    Each call is cut into groups of edits that are at the same point; most often that is one group, the whole call.
    """

    name = "edit"

    def __init__(self, edits: Edits, programs: Callable[[Call], Program], cost_model: CostModel) -> None:
        self.lanes = [Lane(edit, cost_model) for edit in edits]
        self.programs = programs
        self.cost_model = cost_model
        self.counter = CallCounter()
        self.calls = 0
        self.groups: dict[tuple[str, tuple[int, ...]], Group] = {}
        self._controls: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._stacked: dict[tuple[int, tuple[int, ...]], tuple[Same, dict[str, Tensor]]] = {}
        for edit, lane in zip(edits, self.lanes, strict=True):
            edit._carrier = lane

    def run(self, call: Call) -> Any:
        key = self.counter.next(call)
        recorded = {id(lane): lane.edit.base.find(key) for lane in self.lanes}
        self._place(call, recorded)
        for lane in self.lanes:
            self._check(lane, call, key, recorded[id(lane)])
        self.calls += 1
        groups = self._groups()
        results = [self._run_group(group, group.select(call), key, recorded) for group in groups]
        if len(groups) == 1:
            return results[0][1].captured.result(results[0][0])
        numbers = [number for group in groups for number in group.numbers]
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        outputs = []
        for pieces in zip(*(outputs for outputs, _ in results), strict=True):
            samples = [sample for piece in pieces for sample in piece]
            outputs.append(torch.stack([samples[place] for place in order]))
        return results[0][1].captured.result(outputs)

    def _place(self, call: Call, recorded: dict[int, RecordedCall]) -> None:
        """Which samples of the call are whose: parts of guidance outermost, then edits, then images."""
        images = [lane.images for lane in self.lanes]
        batches = [len(recorded[id(lane)].sample) for lane in self.lanes]
        if call.batch != sum(batches):
            shape = tuple(call.tensors[call.sample].shape)
            raise RecordingMismatchError(differences={"sample shape": ((sum(batches), *shape[1:]), shape)})
        parts = {batch // own for batch, own in zip(batches, images, strict=True)}
        if len(parts) > 1:
            raise RecordingMismatchError(
                differences={"parts of guidance in a call": (sorted(parts), "one call for all")}
            )
        offset, total = 0, sum(images)
        for lane, own in zip(self.lanes, images, strict=True):
            lane.samples = [part * total + offset + n for part in range(call.batch // total) for n in range(own)]
            offset += own

    def _check(self, lane: Lane, call: Call, key: CallKey, recorded: RecordedCall) -> None:
        base = lane.edit.base
        recorded.check(call)
        base.check_order(self.calls, key)
        if self.calls > 0 and lane.kind != "detect":
            return
        sample = take_samples(call.tensors[call.sample], call.batch, lane.samples)
        if self.calls == 0 and not (lane.kind == "dense" and lane.whole):
            base.check_noise(recorded.sample, sample)
        if lane.kind == "detect":
            step = base.step_of(key)
            lane.edit.compare(step, recorded.sample, sample)
            if step >= lane.edit.detect_steps:
                lane.edit.find_mask()

    def _groups(self) -> list[Group]:
        by_kind: dict[str, list[Lane]] = {}
        for lane in self.lanes:
            by_kind.setdefault(lane.kind, []).append(lane)
        groups = []
        for kind, lanes in by_kind.items():
            numbers = sorted(sample for lane in lanes for sample in lane.samples)
            groups.append(self.groups.setdefault((kind, tuple(numbers)), Group(lanes, numbers)))
        return groups

    def _run_group(
        self, group: Group, call: Call, key: CallKey, recorded: dict[int, RecordedCall]
    ) -> tuple[list[Tensor], Program]:
        program, kind = self.programs(call), group.lanes[0].kind
        for lane in group.lanes:
            lane.edit.base.check_graph(key, program.digest)
        compute = self._choose(group, call, key, program, recorded)
        span = Span.start(call.device)
        outputs, stored = compute()
        span.end(share=1 / len(group.lanes))
        for lane in group.lanes:
            lane.program, lane.batch = program, call.batch
            if kind in lane.edit.spans:
                lane.edit.spans[kind].append(span)
            if lane.edit.recording is not None:
                self._keep(group, lane, call, key, outputs, stored, span)
        return outputs, program

    def _choose(
        self, group: Group, call: Call, key: CallKey, program: Program, recorded: dict[int, RecordedCall]
    ) -> Callable[[], Computed]:
        """How a group is computed, its graph built already, so that a call's time is its own."""
        kind, store = group.lanes[0].kind, any(lane.edit.recording is not None for lane in group.lanes)
        device = call.tensors[call.sample].device
        if kind == "recorded":
            return lambda: (group.recorded_outputs(recorded), {})
        if kind == "dense":
            dense = program.executable("record" if store else "dense")
            return lambda: group.keep_background(dense.run(call.tensors), recorded)
        source = _Loading(group.source(recorded))
        if kind == "detect":
            detect = program.executable("detect", store)
            inputs = {**call.tensors, **self._control(group, call, key, recorded)}
            return lambda: detect.run(inputs, source=source)
        group.memo.timetable = group.memo.timetable or Timetable(group.lanes[0].edit.base.timesteps)
        group.memo.timetable.now = key[0]
        if program.fused:
            return self._replay(group, call, program, source, store)
        sparse = program.executable("edit", store)
        plan = group.plan = group.plan or MaskPlan(group.stack_masks(device), self.cost_model)

        def compute() -> Computed:
            before = group.memo.bytes_loaded
            result = sparse.run(call.tensors, plan=plan, source=source, memo=group.memo)
            for lane in group.lanes:
                lane.bytes_loaded.append((group.memo.bytes_loaded - before) // len(group.lanes))
            return result

        return compute

    def _replay(
        self, group: Group, call: Call, program: Program, source: _Loading, store: bool
    ) -> Callable[[], Computed]:
        """A sparse call on a GPU: a captured graph for masks of these sizes, which the session keeps until it ends."""
        replays = program.replays(store)
        if group.replay is None or group.replays is not replays:
            group.give_back()
            group.replays = replays
            masks = group.stack_masks(torch.device("cpu"))
            group.replay = replays.take(masks, call.batch, call.device)
        replay = group.replay
        return lambda: replay.run(call.tensors, source, group.memo)

    def close(self) -> None:
        """Give the captured graphs back."""
        for group in self.groups.values():
            group.give_back()

    def _control(self, group: Group, call: Call, key: CallKey, recorded: dict[int, RecordedCall]) -> dict[str, Tensor]:
        """The inputs of cross-attention control: none for samples whose text did not change (the empty prompt)."""
        if call.text is None:
            return {}
        text, rows = call.tensors[call.text], []
        stacked = self._stacked.get((key[1], tuple(group.numbers)))
        if stacked is not None and stacked[0].holds(text):
            return stacked[1]
        for number, (lane, own) in enumerate(group.origins()):
            text_recorded, new = recorded[id(lane)].text, text[number]
            assert text_recorded is not None
            old = text_recorded[own]
            known = self._controls.get((key[1], group.numbers[number]))
            if known is None or not torch.equal(known[0], new):
                known = (clone_detached(new), *_aligned(lane.edit, old, new))
                self._controls[key[1], group.numbers[number]] = known
            rows.append(known[1:])
        index, weight = (torch.stack(column).to(text.device) for column in zip(*rows, strict=True))  # [B, L]
        controls = {"control_index": index, "control_weight": weight}
        self._stacked[key[1], tuple(group.numbers)] = Same(text), controls
        return controls

    def _keep(
        self, group: Group, lane: Lane, call: Call, key: CallKey, outputs: list[Tensor], stored: dict[Store, Tensor],
        span: Span,
    ) -> None:  # fmt: skip
        base, own = lane.edit.base.calls[key], group.own(lane)
        assert lane.edit.recording is not None
        alone = len(group.lanes) == 1
        mine = replace(call, tensors={n: _own(t, call.batch, own) for n, t in call.tensors.items()})
        plan = group.plan
        if not alone or group.replay is not None:
            stored = {store: take_samples(value, call.batch, own) for store, value in stored.items()}
            if plan is not None or group.replay is not None:
                plan = lane.plan(call.tensors[call.sample].device)
                stored = {store: _unpadded(value, plan, store.rows) for store, value in stored.items()}
        kept = [clone_detached(take_samples(output, call.batch, own)) for output in outputs]
        made = lane.edit.recording.keep(mine, StepCache(len(own), base=base.cache), kept, span, lane.texts)
        made.graph = base.graph
        lane.keep(key, made, stored, plan)


@dataclass
class _Loading:
    """A source that says what a recording lacks in our words."""

    source: StepCache | StackedCache

    def load(self, slot: str, index: Tensor | None = None) -> Tensor:
        with self._explained():
            return self.source.load(slot, index)

    def addresses(self, slots: tuple[str, ...]) -> tuple[Tensor, list[Tensor]]:
        with self._explained():
            return self.source.addresses(slots)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except KeyError as error:
            recorded = "the slots of another batch size, for which this model traces to another graph"
            raise IncompleteRecordingError(missing=[f"the cache slot {error.args[0]}"], recorded=recorded) from error


def whole(batch: int, stored: dict[Store, Tensor]) -> StepCache:
    """A cache of everything that a dense call stored."""
    return StepCache(batch, {store.slot: value for store, value in stored.items()})


def _aligned(edit: Edit, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Control of one sample: the recorded token of each token ``[L]``, and 1 where its map is kept."""
    changed = edit.config.control and not torch.equal(new, old)
    if not changed:
        return torch.arange(len(new)), torch.zeros(len(new))
    alignment = edit.alignment or align_embeddings(old, new)
    alignment.check_length(len(new))
    return alignment.index, alignment.weight


def _unpadded(value: Tensor, plan: MaskPlan, rows: Table | None) -> Tensor:
    """A copy of a lane's stored rows without those that pad them to another lane's number."""
    index = plan.table(rows) if rows else None
    return value.clone() if index is None else value[:, : index.shape[1]].clone()


def _own(tensor: Tensor, batch: int, own: Sequence[int]) -> Tensor:
    return tensor if tensor.dim() == 0 or len(tensor) % batch else take_samples(tensor, batch, own)


def _inside(masks: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` within the masks ``[B, H, W]``, ``old`` elsewhere, for maps ``[B, C, H, W]``."""
    if new.dim() != 4 or new.shape[-2:] != masks.shape[-2:]:
        return new
    return torch.where(masks[:, None], new, old)
