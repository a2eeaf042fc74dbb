"""Run the calls of one or several edits: dense while a mask is sought, then only the active rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisedit.alignment import align_embeddings
from fisedit.capture import Call
from fisedit.edit import Edit, Edits
from fisedit.edit_lanes import Group, Lane, Stored, Values
from fisedit.errors import IncompleteRecordingError, RecordingMismatchError
from fisedit.program import Program
from fisedit.recording import CallCounter, CallKey, RecordedCall
from fisedit.runtime import trace
from fisedit.runtime.cache.block import Use, take_samples
from fisedit.runtime.cache.store import StackedCache, StepCache, clone_detached
from fisedit.runtime.cache.tiers import Tiers
from fisedit.runtime.cache.writer import Writer
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.cuda_graph import Replays
from fisedit.runtime.executor import Keep
from fisedit.runtime.plan import MaskPlan, Table
from fisedit.runtime.prefetch import Prefetch, Wants
from fisedit.runtime.row_plan import Halos, LevelMasks
from fisedit.runtime.timetable import Timetable
from fisedit.runtime.timing import Span
from fisedit.sameness import Same


class EditSession:
    """Runs the calls of edits: detect, then sparse (or dense under a full mask, or none under an empty one).

    Each call is cut into groups of edits that are at the same point; most often that is one group, the whole call.
    """

    name = "edit"

    def __init__(
        self, edits: Edits, programs: Callable[[Call], Program], cost_model: CostModel,
        tiers: Callable[[torch.device], Tiers],
    ) -> None:  # fmt: skip
        self.tiers = tiers
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
        for (kind, _), group in self.groups.items():
            if kind == "detect" and all(group is not other for other in groups):
                group.give_back()  # its masks are found: it comes no more
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
        program, stored = self.programs(call), dict[int, Stored]()
        for lane in group.lanes:
            lane.edit.base.check_program(key, program)
        kind = self._kind(group, call, program, recorded)

        def keep(values: Values) -> None:
            for lane in group.lanes:
                if lane.edit.recording is not None:
                    stored[id(lane)] = self._store(kind, group, lane, call, recorded, program, values)

        records = any(lane.edit.recording is not None for lane in group.lanes)
        compute = self._choose(kind, group, call, key, program, recorded, keep if records else None)
        span = Span.start(call.device)
        with trace.span("compute", f"{kind} t={call.timestep_value:g}", call.device, {"samples": call.batch}):
            outputs = compute()
        span.end(share=1 / len(group.lanes))
        for lane in group.lanes:
            lane.program, lane.batch = program, call.batch
            if kind in lane.edit.spans:
                lane.edit.spans[kind].append(span)
            if lane.edit.recording is not None:
                self._record(kind, group, lane, call, key, outputs, stored.get(id(lane)), span)
        return outputs, program

    def _kind(self, group: Group, call: Call, program: Program, recorded: dict[int, RecordedCall]) -> str:
        """How a group is computed: dense as well where its bases kept no feature maps (``CacheConfig.steps``)."""
        kind = group.lanes[0].kind
        if kind == "sparse":
            slots = program.wanted("edit")
            for lane in group.lanes:
                if not recorded[id(lane)].cache.has_any(slots):
                    lane.reason = "the recording kept no feature maps of some steps (CacheConfig.steps)"
                    kind = "dense"
        elif kind == "detect" and self.calls == 1:
            self._check_queries(group, program)
        return kind

    def _check_queries(self, group: Group, program: Program) -> None:
        """Raise, before anything is computed, unless the steps that seek a mask have what that takes.

        Raises:
            IncompleteRecordingError: they have not.
        """
        slots = program.wanted("detect")
        for lane in group.lanes:
            base = lane.edit.base
            lacking = [
                base.step_of(key) + 1 for key, call in base.calls.items()
                if base.step_of(key) < lane.edit.detect_steps and slots and not call.cache.has_any(slots)
            ]  # fmt: skip
            if lacking and lane.edit.config.control:
                missing = [f"the queries of cross-attention at step {step}" for step in dict.fromkeys(lacking)]
                raise IncompleteRecordingError(
                    missing=missing, recorded="those of earlier steps (CacheConfig.detect_steps sets how many)"
                )

    def _choose(
        self, kind: str, group: Group, call: Call, key: CallKey, program: Program, recorded: dict[int, RecordedCall],
        keep: Keep | None,
    ) -> Callable[[], list[Tensor]]:  # fmt: skip
        """How a group is computed, its graph built already, so that a call's time is its own."""
        store = keep is not None
        device = call.tensors[call.sample].device
        if kind == "recorded":
            return lambda: group.recorded_outputs(recorded)
        if kind == "dense":
            dense = program.executable("record")
            return lambda: group.keep_background(dense.run(call.tensors, keep=keep), recorded)
        source = _Loading(group.source(recorded, device))
        if kind == "detect":
            detect = program.executable("detect", store)
            inputs = {**call.tensors, **self._control(group, call, key, recorded)}
            if not lacks_queries(program, recorded):
                self._fetch_queries(group, call, program)
                return self._fetching(group, source, lambda of: detect.run(inputs, source=of, keep=keep))
            plain = program.executable("record")  # nothing is controlled
            return lambda: plain.run(call.tensors, keep=keep)
        group.memo.timetable = group.memo.timetable or Timetable(group.lanes[0].edit.base.timesteps)
        group.memo.timetable.now = key[0]
        if program.fused:
            return self._replay(group, call, program, source, keep)
        sparse = program.executable("edit", store)
        plan = group.plan = group.plan or MaskPlan(group.stack_masks(device), self.cost_model)

        def compute() -> list[Tensor]:
            before = group.memo.bytes_loaded
            result = sparse.run(call.tensors, plan=plan, source=source, memo=group.memo, keep=keep)
            for lane in group.lanes:
                lane.bytes_loaded.append((group.memo.bytes_loaded - before) // len(group.lanes))
            return result

        return compute

    def _replay(
        self, group: Group, call: Call, program: Program, source: _Loading, keep: Keep | None
    ) -> Callable[[], list[Tensor]]:
        """A sparse call on a GPU: a captured graph for masks of these sizes, which the session keeps until it ends."""
        replays = program.replays(keep is not None)
        if group.replay is None or group.replays is not replays:
            group.give_back()
            group.replays = replays
            masks = LevelMasks(group.stack_masks(torch.device("cpu")), replays.levels)
            halos = self._fetch_halos(group, call, program, replays, masks)
            group.replay = replays.take(masks, call.batch, call.device, halos)
        replay, prefetch, number = group.replay, group.prefetch, self.calls - 1
        fetched = self._fetching(group, source, lambda of: replays.run(replay, call.tensors, of, group.memo, keep))
        if prefetch is None:
            return fetched

        def compute() -> list[Tensor]:
            outputs = fetched()
            for lane in group.lanes:
                lane.bytes_fetched.append(prefetch.bytes_loaded.pop(number, 0) // len(group.lanes))
            return outputs

        return compute

    def _fetch_halos(
        self, group: Group, call: Call, program: Program, replays: Replays, masks: LevelMasks
    ) -> Halos | None:
        """Have what sparse calls read fetched, of maps the rows around the masks; ``None`` if all is read in place."""
        wants = Wants(*replays.reads, program.uses)
        sources = self._sources(group, call, (*wants.views, *wants.loads), len(group.lanes[0].edit.base.calls))
        if sources is None:
            return None
        halos = Halos.of(masks, wants.geometries, wants.whole_levels)
        group.prefetch = Prefetch(wants, halos, sources, call.batch, self.tiers(call.device))
        return halos

    def _fetch_queries(self, group: Group, call: Call, program: Program) -> None:
        """Have what the calls read fetched that seek a mask, unless it is read in its place."""
        if group.settled or not program.fused:
            return
        base, steps = group.lanes[0].edit.base, min(lane.edit.detect_steps for lane in group.lanes)
        slots = tuple(program.wanted("detect"))
        wants = Wants((), slots, dict.fromkeys(slots, Use("queries")))
        seeking = sum(base.step_of(key) < steps for key in base.calls)
        sources = self._sources(group, call, slots, seeking)
        group.prefetch = sources and Prefetch(wants, None, sources, call.batch, self.tiers(call.device))
        group.settled = True

    def _sources(
        self, group: Group, call: Call, slots: tuple[str, ...], calls: int
    ) -> Callable[[int], StepCache | StackedCache | None] | None:
        """What the first so many calls of the run read, by number; ``None`` if all from now on is read in its place."""
        keys = list(group.lanes[0].edit.base.calls)[:calls]
        bases = [{id(lane): lane.edit.base.calls[key] for lane in group.lanes} for key in keys]
        kept = [not any(made.cache.lacks(slots) for made in calls.values()) for calls in bases]

        def source(number: int) -> StepCache | StackedCache | None:
            return group.source(bases[number], call.device) if number < len(keys) and kept[number] else None

        coming = [of for number in range(self.calls - 1, len(keys)) if (of := source(number)) is not None]
        return None if all(of.is_resident(slots) for of in coming) else source

    def _fetching(
        self, group: Group, source: _Loading, run: Callable[[Any], list[Tensor]]
    ) -> Callable[[], list[Tensor]]:
        """A call that reads ``source``, or what the group has fetched of it, and begins to fetch for the next one."""
        prefetch, number = group.prefetch, self.calls - 1
        if prefetch is None or not prefetch.covers(number):
            return lambda: run(source)

        def compute() -> list[Tensor]:
            outputs = run(prefetch.source(number))
            prefetch.done()
            return outputs

        return compute

    def close(self) -> None:
        """Give the captured graphs back; wait for what is written to files, as it is known then whether it is whole."""
        for group in self.groups.values():
            group.give_back()
        for lane in self.lanes:
            if lane.writer is not None:
                lane.writer.tiers.finish()

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

    def _store(
        self, kind: str, group: Group, lane: Lane, call: Call, recorded: dict[int, RecordedCall], program: Program,
        values: Values,
    ) -> Stored:  # fmt: skip
        """Keep a lane's part of what a call stores."""
        assert lane.edit.recording is not None
        lane.edit.recording.writer = lane.edit.recording.writer or Writer(self.tiers(call.device))
        root = recorded[id(lane)].cache.chain[0].values  # it may hold more, if it was saved under another kv
        lane.kinds = frozenset(program.uses[slot].kind for slot in root if slot in program.uses)
        plan, own = group.plan, group.own(lane)
        if len(group.lanes) > 1 or group.replay is not None:
            values = {store: take_samples(value, call.batch, own) for store, value in values.items()}
            if kind == "sparse":
                plan = lane.plan(call.tensors[call.sample].device)
                values = {store: _unpadded(value, plan, store.rows) for store, value in values.items()}
        return lane.store(kind, values, program.uses, plan)

    def _record(
        self, kind: str, group: Group, lane: Lane, call: Call, key: CallKey, outputs: list[Tensor],
        stored: Stored | None, span: Span,
    ) -> None:  # fmt: skip
        """Add a call to the recording of a lane's edit."""
        base, own, recording = lane.edit.base.calls[key], group.own(lane), lane.edit.recording
        assert recording is not None
        mine = replace(call, tensors={n: _own(t, call.batch, own) for n, t in call.tensors.items()})
        kept = [clone_detached(take_samples(output, call.batch, own)) for output in outputs]
        whole = kind == "dense" and lane.whole
        cache = StepCache(len(own), base=None if whole else base.cache, device=call.device)
        made = recording.calls[key] = recording.keep(mine, cache, kept, span, lane.texts)
        made.graph, made.kv = base.graph, base.kv
        if lane.program is not None and kind != "recorded":
            made.kv = lane.program.kv
        if stored is not None and kind == "detect":
            lane.unsettled.append((key, stored, made))
        elif stored is not None:
            cache.values = stored.values


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


def lacks_queries(program: Program, recorded: dict[int, RecordedCall]) -> bool:
    """Whether bases did not keep what controls their attention maps; :meth:`EditSession._check_queries` let it pass."""
    slots = program.wanted("detect")
    return bool(slots) and any(not made.cache.has_any(slots) for made in recorded.values())


def _aligned(edit: Edit, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Control of one sample: the recorded token of each token ``[L]``, and 1 where its map is kept."""
    changed = edit.config.control and not torch.equal(new, old)
    if not changed:
        return torch.arange(len(new)), torch.zeros(len(new))
    alignment = edit.alignment or align_embeddings(old, new)
    alignment.check_length(len(new))
    return alignment.index, alignment.weight


def _unpadded(value: Tensor, plan: MaskPlan, rows: Table | None) -> Tensor:
    """A lane's stored rows without those that pad them to another lane's number, or to a bucket."""
    index = plan.table(rows) if rows else None
    return value if index is None else value[:, : index.shape[1]]


def _own(tensor: Tensor, batch: int, own: Sequence[int]) -> Tensor:
    return tensor if tensor.dim() == 0 or len(tensor) % batch else take_samples(tensor, batch, own)
