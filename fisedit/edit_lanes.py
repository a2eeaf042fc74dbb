"""The edits of a session as lanes of samples, and the groups of lanes that are computed alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisedit.capture import Call
from fisedit.edit import Edit
from fisedit.passes.count_loads import count_loads, levels
from fisedit.passes.count_macs import count_macs
from fisedit.passes.slot_uses import STATISTICS
from fisedit.program import Program
from fisedit.recording import CallKey, RecordedCall
from fisedit.report import EditReport
from fisedit.runtime.cache.block import Kept, Kind, Use, take_samples
from fisedit.runtime.cache.store import Overlay, StackedCache, StepCache
from fisedit.runtime.cache.writer import Writer
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.cuda_graph import Replay, Replays
from fisedit.runtime.executor import Memo, Store
from fisedit.runtime.kernels.gather_rows.reference import gather_rows
from fisedit.runtime.plan import MaskPlan, Table
from fisedit.runtime.prefetch import Prefetch
from fisedit.sameness import Copies

Values = dict[Store, Tensor]
"""What a graph stores."""


@dataclass(frozen=True)
class Stored:
    """What a lane kept of a call by slot, and of which level's rows each is."""

    values: Mapping[str, Kept | Overlay]
    rows: dict[str, Table | None]


@dataclass
class Lane:
    """One edit within the calls of a session.

    Attributes:
        samples: the numbers of its samples in a call: its images, once for each part of guidance.
        program, plan: of its last sparse call, the plan of its own masks alone.
        unsettled: what its detect steps recorded, whole until the mask is known.
        kinds: what its base kept of the call under way: that much of it is recorded.
        whole: whether its masks are full. reason: why it runs dense, if they are not.
    """

    edit: Edit
    cost_model: CostModel
    samples: list[int] = field(default_factory=list)
    program: Program | None = None
    batch: int = 1
    bytes_loaded: list[int] = field(default_factory=list)
    bytes_fetched: list[int] = field(default_factory=list)
    unsettled: list[tuple[CallKey, Stored, RecordedCall]] = field(default_factory=list)
    kinds: frozenset[Kind] = frozenset()
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
    def writer(self) -> Writer | None:
        """What keeps this edit's own recording."""
        return self.edit.recording.writer if self.edit.recording is not None else None

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

    def store(self, kind: str, values: Values, uses: Mapping[str, Use], plan: MaskPlan | None) -> Stored:
        """Keep what a call of this ``kind`` stored: active rows where computed, the base has everything else; whole,
        if everything was, and while the mask is sought.

        Args:
            values: of this lane's samples, its own rows alone.
        """
        assert self.writer is not None
        if kind == "dense" and not self.whole:
            plan = self.plan(self._device)
            values = {store: _rows(value, plan, store) for store, value in values.items() if not _is_statistic(store)}
        kept = self.writer.keep(values, uses, len(self.samples), self.kinds)
        rows = {store.slot: store.rows for store in values}
        if kind == "detect" or self.whole or plan is None:
            return Stored(kept, rows)
        indexes = {slot: plan.table(table) if table is not None else None for slot, table in rows.items()}
        return Stored({s: v if (index := indexes[s]) is None else Overlay(v, index) for s, v in kept.items()}, rows)

    def settle(self) -> None:
        """With the mask just found, reduce what the detect steps recorded to the active rows."""
        kind = self.kind
        for key, stored, made in self.unsettled:
            base = self.edit.base.calls[key]
            if self.whole:
                made.cache = replace(made.cache, values=stored.values, base=None)
                continue
            masks = self.masks(made.sample.device)  # [B, H, W]
            made.sample = _inside(masks, made.sample, base.sample)
            made.outputs = [_inside(masks, new, old) for new, old in zip(made.outputs, base.outputs, strict=True)]
            if kind != "recorded":
                made.cache.values = self._active_rows(stored)
        self.unsettled.clear()

    def _active_rows(self, stored: Stored) -> dict[str, Any]:
        """What a detect step stored, reduced to the active rows; group statistics stay the base's. What found no place
        stays lost."""
        assert self.writer is not None
        values: dict[Store, Tensor] = {}
        lost: dict[str, Any] = {}
        uses, indexes = {}, {}
        for slot, value in stored.values.items():
            assert isinstance(value, Kept)
            table = stored.rows[slot]
            if slot.startswith(STATISTICS):
                continue
            if value.block.lost is not None:
                lost[slot] = value
                continue
            on_host = value.block.data is None or not value.block.data.is_cuda
            index = None
            if table is not None:
                index = self.plan(torch.device("cpu") if on_host else self._device).table(table)
                indexes[slot] = self.plan(self._device).table(table)
            values[Store(slot, table)] = value.read(self._device, index)
            uses[slot] = Use(value.block.kind)
        kept = self.writer.keep(values, uses, len(self.samples))
        return lost | {s: v if (index := indexes.get(s)) is None else Overlay(v, index) for s, v in kept.items()}

    def report(self) -> EditReport:
        edit, program = self.edit, self.program
        report = EditReport(detect_steps=edit.detect_steps, timings=edit.timings, bytes_cached=edit.base.nbytes)
        report = replace(report, active_share=None if edit.masks is None else float(edit.masks.float().mean()))
        report = replace(report, dense_because=self.reason, placement=edit.base.placement())
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
            bytes_fetched=self.bytes_fetched,
            levels={f"{h}x{w}": plan.share((h, w)) for h, w in levels(graph)},
            tiles={str(geometry): tile for geometry, tile in plan.tiles.items()},
        )


@dataclass
class Group:
    """The lanes of a call that are computed alike, as one call of their samples.

    ``settled``: whether it is known if calls that seek a mask have to fetch.
    """

    lanes: list[Lane]
    numbers: list[int]
    memo: Memo = field(default_factory=Memo)
    plan: MaskPlan | None = None
    replays: Replays | None = None
    replay: Replay | None = None
    prefetch: Prefetch | None = None
    settled: bool = False
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

    def keep_background(self, outputs: list[Tensor], recorded: dict[int, RecordedCall]) -> list[Tensor]:
        """What a dense call computed, with recorded outputs outside the masks."""
        if all(lane.whole for lane in self.lanes):
            return outputs
        if self._masks is None:
            self._masks = self.stack_masks(outputs[0].device)
        pairs = zip(outputs, self.recorded_outputs(recorded), strict=True)
        return [_inside(self._masks, new, old) for new, old in pairs]

    def source(self, recorded: dict[int, RecordedCall], device: torch.device) -> StepCache | StackedCache:
        """The recorded values of the samples of the group's call, for a device."""
        caches = {name: call.cache if call.cache.device == device else call.cache.on(device)
                  for name, call in recorded.items()}  # fmt: skip
        if len(self.lanes) == 1:
            return caches[id(self.lanes[0])]
        return StackedCache([(caches[id(lane)], number) for lane, number in self.origins()])

    def give_back(self) -> None:
        if self.prefetch is not None:
            self.prefetch.close()
        if self.replays is not None and self.replay is not None:
            self.replays.give_back(self.replay)
        self.replays = self.replay = self.prefetch = None

    def stack_masks(self, device: torch.device) -> Tensor:
        masks = {id(lane): lane.masks(device) for lane in self.lanes}
        return torch.stack([masks[id(lane)][number] for lane, number in self.origins()])  # [B, H, W]


def _is_statistic(store: Store) -> bool:
    return store.slot.startswith(STATISTICS)


def _rows(value: Tensor, plan: MaskPlan, store: Store) -> Tensor:
    """The active rows of a stored value, or of its scales ``[B, R]``."""
    index = plan.table(store.rows) if store.rows is not None else None
    if index is None:
        return value
    return gather_rows(value, index) if value.dim() == 3 else gather_rows(value[..., None], index)[..., 0]


def _inside(masks: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` within the masks ``[B, H, W]``, ``old`` elsewhere, for maps ``[B, C, H, W]``."""
    if new.dim() != 4 or new.shape[-2:] != masks.shape[-2:]:
        return new
    return torch.where(masks[:, None], new, old)
