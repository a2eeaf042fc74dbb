"""An edit: find the region that the new words touch, then compute only that region and read the rest from the cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fisedit import mask as masks
from fisedit.alignment import TokenAlignment, align_embeddings
from fisedit.capture import Call
from fisedit.config import DetectConfig
from fisedit.errors import EmptyMaskWarning, IncompleteRecordingError
from fisedit.passes.count_macs import count_macs
from fisedit.program import Program
from fisedit.recording import CallCounter, CallKey, RecordedCall, Recording, now, text_of
from fisedit.report import EditReport
from fisedit.runtime.cache.store import Overlay, StepCache, clone_detached, shrink
from fisedit.runtime.cost_model import CostModel
from fisedit.runtime.executor import Memo, Store
from fisedit.runtime.plan import MaskPlan

Computed = tuple[list[Tensor], dict[Store, Tensor]]
"""The outputs of a call, and the values to record."""


@dataclass
class Edit:
    """What ``edit()`` yields.

    Attributes:
        base: the recording that is edited.
        mask: bool ``[H, W]`` over the latent, true where the image may change; ``None`` until it is found.
        detect_steps: steps that run dense to find the mask; 0 with a given mask.
        window: the first and last step (1-based) whose latents are compared.
        recording: this edit's own recording, if asked for; complete when the ``with`` block ends.
        latents: the latents after each step, if :meth:`on_step_end` was given to the pipeline.
    """

    base: Recording
    config: DetectConfig
    recording: Recording | None
    alignment: TokenAlignment | None = None
    mask: Tensor | None = None
    latents: list[Tensor] = field(default_factory=list)
    timings: dict[str, list[float]] = field(default_factory=lambda: {"detect": [], "sparse": [], "dense": []})
    _samples: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _session: EditSession | None = None

    def __post_init__(self) -> None:
        # Counted now: the recording, and with it the schedule, may be released before the report is asked for.
        self.detect_steps, self.window = 0, (0, 0)
        if self.mask is None:
            self.detect_steps, self.window = self.config.resolve(len(self.base.timesteps))
        self._warn_if_empty()

    def on_step_end(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A diffusers ``callback_on_step_end``: outside the mask the latents are the recorded ones, bit for bit.

        Raises:
            IncompleteRecordingError: the recording was made without its own ``on_step_end``.
        """
        if step >= len(self.base.latents):
            kept = f"the latents of {len(self.base.latents)} steps (its own on_step_end, given to that run, keeps them)"
            raise IncompleteRecordingError(missing=[f"the latents after step {step + 1}"], recorded=kept)
        latents, recorded = kwargs["latents"], self.base.latents[step]
        if self.mask is None:
            self._samples[step + 1] = (recorded, clone_detached(latents))
            if step + 1 >= self.detect_steps:
                self.find_mask()
        if self.mask is not None:
            kwargs["latents"] = latents = torch.where(self.mask.to(latents.device), latents, recorded)
        self.latents.append(clone_detached(latents))
        return kwargs

    def find_mask(self) -> Tensor:
        """Make the mask from the latents compared so far (the paper's section "Fine-Grained Mask Generation")."""
        window = self.window
        pairs = [self._samples[i] for i in range(1, self.detect_steps + 1)]
        recorded, edited = [a for a, _ in pairs], [b for _, b in pairs]
        if self.config.method == "paper":
            per_sample = [
                masks.paper_mask([a[b : b + 1] for a in recorded], [e[b : b + 1] for e in edited], window)
                for b in range(recorded[0].shape[0])
            ]
        else:
            options = {k: getattr(self.config, k) for k in ("threshold", "smooth", "dilation", "min_area")}
            per_sample = list(masks.automatic_mask(recorded, edited, window=window, **options))
        self.mask = torch.stack(per_sample).any(0)  # [H, W]: one mask for the batch, the union
        self._samples.clear()
        self._warn_if_empty()
        if self._session is not None:
            self._session.settle()
        return self.mask

    def compare(self, step: int, recorded: Tensor, sample: Tensor) -> None:
        """Keep the latents that reached the U-Net at 0-based ``step``, in both runs."""
        if step > 0 and self.mask is None:
            self._samples.setdefault(step, (recorded, clone_detached(sample)))

    def report(self) -> EditReport:
        """What was computed and moved, and how long it took."""
        assert self._session is not None
        return self._session.report()

    def _warn_if_empty(self) -> None:
        if self.mask is not None and not self.mask.any():
            warnings.warn("The mask is empty: the edit is the recorded image.", EmptyMaskWarning, stacklevel=4)

    def __repr__(self) -> str:
        state = "mask not found yet" if self.mask is None else f"{float(self.mask.float().mean()):.1%} active"
        return f"Edit({state}, of {self.base!r})"


class EditSession:
    """Runs the calls of an edit: detect, then sparse (or dense under a full mask, or none under an empty one)."""

    name = "edit"

    def __init__(self, edit: Edit, programs: Callable[[Call], Program], cost_model: CostModel) -> None:
        self.edit = edit
        self.programs = programs
        self.cost_model = cost_model
        self.counter = CallCounter()
        self.calls = 0
        self.memo = Memo()
        self.plan: MaskPlan | None = None
        self.program: Program | None = None
        self.controls: dict[str, Tensor] | None = None
        self.bytes_loaded: list[int] = []
        self._unsettled: list[tuple[CallKey, dict[Store, Tensor], RecordedCall]] = []
        edit._session = self

    def run(self, call: Call) -> Any:
        edit = self.edit
        edit.base.check_call(call)
        key = self.counter.next(call)
        recorded = edit.base.find(key)
        edit.base.check_order(self.calls, key)
        if self.calls == 0 and not (edit.mask is not None and edit.mask.all()):
            edit.base.check_noise(recorded.sample, call.tensors[call.sample])
        self.calls += 1
        step = edit.base.step_of(key)
        self.program = self.programs(call)
        if edit.recording is not None and edit.recording.signature is None:
            edit.recording.signature, edit.recording.text = call.signature, text_of(call)
        if edit.mask is None:
            edit.compare(step, recorded.sample, call.tensors[call.sample])
            if step >= edit.detect_steps:
                edit.find_mask()
        kind, compute = self._choose(call, recorded)
        start = now(call)
        outputs, stored = compute()
        seconds = now(call) - start
        if kind in edit.timings:
            edit.timings[kind].append(seconds)
        self._keep(key, call, outputs, stored, seconds)
        return self.program.captured.result(outputs)

    def _choose(self, call: Call, recorded: RecordedCall) -> tuple[str, Callable[[], Computed]]:
        """How this call is computed, its graph built already, so that a call's time is its own."""
        assert self.program is not None
        mask, store = self.edit.mask, self.edit.recording is not None
        if mask is None:
            detect, inputs = self.program.executable("detect", store), {**call.tensors, **self._controls(call)}
            return "detect", lambda: detect.run(inputs, source=recorded.cache)
        if not mask.any():
            return "recorded", lambda: ([output.clone() for output in recorded.outputs], {})
        if mask.all():
            dense = self.program.executable("record")
            return "dense", lambda: dense.run(call.tensors)
        sparse = self.program.executable("edit", store)
        plan = self.plan = self.plan or MaskPlan(mask.to(call.tensors[call.sample].device), self.cost_model)

        def compute() -> Computed:
            before = self.memo.bytes_loaded
            result = sparse.run(call.tensors, plan=plan, source=recorded.cache, memo=self.memo)
            self.bytes_loaded.append(self.memo.bytes_loaded - before)
            return result

        return "sparse", compute

    def _controls(self, call: Call) -> dict[str, Tensor]:
        """The inputs of cross-attention control: no control for rows whose text did not change (the empty prompt)."""
        text, recorded = text_of(call), self.edit.base.text
        if text is None or recorded is None:
            return {}
        if self.controls is None:
            index, weight = [], []
            for new, old in zip(text, recorded, strict=True):
                changed = self.edit.config.control and not torch.equal(new, old)
                alignment = (self.edit.alignment or align_embeddings(old, new)) if changed else None
                length = text.shape[1]
                index.append(alignment.index if alignment else torch.arange(length))
                weight.append(alignment.weight if alignment else torch.zeros(length))
            stacked = {"control_index": torch.stack(index), "control_weight": torch.stack(weight)}  # [B, L]
            self.controls = {name: value.to(text.device) for name, value in stacked.items()}
        return self.controls

    def _keep(
        self, key: CallKey, call: Call, outputs: list[Tensor], stored: dict[Store, Tensor], seconds: float
    ) -> None:
        """Record this call as an overlay of its base: the active rows where computed, the base everywhere else."""
        if self.edit.recording is None:
            return
        base = self.edit.base.calls[key]
        sample, kept = clone_detached(call.tensors[call.sample]), [clone_detached(output) for output in outputs]
        made = RecordedCall(StepCache(base=base.cache), sample, kept, seconds)
        self.edit.recording.calls[key] = made
        if self.edit.mask is None:
            self._unsettled.append((key, stored, made))
        elif self.edit.mask.all():
            made.cache = StepCache({store.slot: value for store, value in stored.items()})
        elif self.plan is not None:
            made.cache.values = overlay(stored, self.plan)

    def settle(self) -> None:
        """With the mask just found, reduce what the detect steps recorded to the active rows."""
        mask = self.edit.mask
        assert mask is not None
        if self._unsettled and not mask.all() and mask.any():
            plan = MaskPlan(mask.to(self._unsettled[0][2].sample.device), self.cost_model)
        for key, stored, made in self._unsettled:
            base = self.edit.base.calls[key]
            if mask.all():
                made.cache = StepCache({store.slot: value for store, value in stored.items()})
                continue
            made.sample = _inside(mask, made.sample, base.sample)
            made.outputs = [_inside(mask, new, old) for new, old in zip(made.outputs, base.outputs, strict=True)]
            if mask.any():
                rows = {s.slot: (v, plan.table(s.rows) if s.rows else None) for s, v in stored.items()
                        if not s.slot.startswith(("mean:", "rstd:"))}  # fmt: skip
                made.cache.values = shrink(rows)
        self._unsettled.clear()

    def report(self) -> EditReport:
        edit, program, plan = self.edit, self.program, self.plan
        report = EditReport(detect_steps=edit.detect_steps, timings=edit.timings, bytes_cached=edit.base.nbytes)
        report = replace(report, active_share=None if edit.mask is None else float(edit.mask.float().mean()))
        report = replace(report, seconds_recorded=[call.seconds for call in edit.base.calls.values()])
        if program is None:
            return report
        report = replace(report, macs_dense=count_macs(program.captured.module.graph), islands=program.islands)
        if plan is None or "edit" not in program.graphs:
            return report
        levels = dict.fromkeys(level for geometry in plan.tiles for level in (geometry.source, geometry.target))
        return replace(
            report,
            macs_sparse=count_macs(program.graphs["edit"].graph, plan),
            bytes_loaded=self.bytes_loaded,
            levels={f"{h}x{w}": plan.share((h, w)) for h, w in levels},
            tiles={str(geometry): tile for geometry, tile in plan.tiles.items()},
        )


def overlay(stored: dict[Store, Tensor], plan: MaskPlan) -> dict[str, Any]:
    """Stored active rows as overlays of their slots."""
    out: dict[str, Any] = {}
    for store, value in stored.items():
        index = plan.table(store.rows) if store.rows else None
        out[store.slot] = value if index is None else Overlay(value, index)
    return out


def _inside(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    if new.dim() < 2 or new.shape[-2:] != mask.shape:
        return new
    return torch.where(mask.to(new.device), new, old)
