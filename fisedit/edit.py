"""An edit: find the region that the new words touch, and keep everything outside it as it was recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fisedit import mask as masks
from fisedit.alignment import TokenAlignment
from fisedit.capture import timestep_value
from fisedit.config import DetectConfig
from fisedit.errors import IncompleteRecordingError, RecordingMismatchError
from fisedit.recording import Recording
from fisedit.report import EditReport
from fisedit.runtime.cache.store import clone_detached
from fisedit.runtime.timing import Span
from fisedit.warnings import EmptyMaskWarning, warn


class Carrier(Protocol):
    """What runs the calls of an edit."""

    def settle(self) -> None: ...

    def report(self) -> EditReport: ...


@dataclass
class Edit:
    """What ``edit()`` yields.

    Attributes:
        base: the recording that is edited.
        masks: bool ``[1 or K, H, W]`` over the latent, one for all K images or one each, true where an image may
            change; ``None`` until they are found.
        detect_steps: steps that run dense to find the masks; 0 with a given mask.
        window: the first and last step (1-based) whose latents are compared.
        recording: this edit's own recording, if asked for; complete when the ``with`` block ends.
        latents: the latents after each step, if :meth:`on_step_end` was given to the pipeline.
        corrections: these less what the sampler made, where the base is an inverted picture.
        spans: the time of each U-Net call by kind; :attr:`timings` reads them.
    """

    base: Recording
    config: DetectConfig
    recording: Recording | None = None
    alignment: TokenAlignment | None = None
    masks: Tensor | None = None
    latents: list[Tensor] = field(default_factory=list)
    corrections: list[Tensor] = field(default_factory=list)
    spans: dict[str, list[Span]] = field(default_factory=lambda: {"detect": [], "sparse": [], "dense": []})
    detect_steps: int = field(init=False, default=0)
    window: tuple[int, int] = field(init=False, default=(0, 0))
    _samples: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _carrier: Carrier | None = None
    _moved: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        # Counted now: the recording, and with it the schedule, may be released before the report is asked for.
        if self.masks is None:
            self.detect_steps, self.window = self.config.resolve(len(self.base.timesteps))
        self._warn_if_empty()

    @property
    def mask(self) -> Tensor | None:
        """Bool ``[H, W]``: where any of the images may change; ``None`` until it is found."""
        return None if self.masks is None else self.masks.any(0)

    @property
    def timings(self) -> dict[str, list[float]]:
        """Seconds of each U-Net call by kind: ``detect``, ``sparse``, ``dense``. Waits for a GPU that is not done."""
        return {kind: [span.seconds for span in spans] for kind, spans in self.spans.items()}

    def masks_on(self, device: torch.device) -> Tensor:
        """The masks, once they are found, on a device; moved there once."""
        assert self.masks is not None
        if self._moved is None or self._moved[0] is not self.masks or self._moved[1].device != device:
            self._moved = self.masks, self.masks.to(device)
        return self._moved[1]

    def on_step_end(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A diffusers ``callback_on_step_end``: outside the mask the latents are the recorded ones, bit for bit.

        Raises:
            IncompleteRecordingError: the recording was made without its own ``on_step_end``.
            RecordingMismatchError: latents of another shape.
        """
        if step >= len(self.base.latents):
            kept = f"the latents of {len(self.base.latents)} steps (its own on_step_end, given to that run, keeps them)"
            raise IncompleteRecordingError(missing=[f"the latents after step {step + 1}"], recorded=kept)
        latents, recorded = kwargs["latents"], self.base.latents[step]
        if latents.shape != recorded.shape:
            raise RecordingMismatchError(differences={"latents": (tuple(recorded.shape), tuple(latents.shape))})
        made = latents
        if self.masks is None:
            if self.base.corrections:
                kwargs["latents"] = latents = made + self.base.corrections[step]
            number = self._step_number(step, timestep)
            self._samples[number] = (recorded, clone_detached(latents))
            if number >= self.detect_steps:
                self.find_mask()
        if self.masks is not None:
            kwargs["latents"] = latents = torch.where(self.masks_on(latents.device)[:, None], latents, recorded)
        self.latents.append(clone_detached(latents))
        if self.base.corrections:
            self.corrections.append(latents - made)
        return kwargs

    def _step_number(self, step: int, timestep: Any) -> int:
        """The 1-based step of the schedule: second-order samplers end two iterations at one timestep."""
        timesteps = self.base.timesteps
        value = float("nan") if timestep is None else timestep_value(timestep)
        return timesteps.index(value) + 1 if value in timesteps else step + 1

    def find_mask(self) -> Tensor:
        """Make the masks from the latents compared so far (the paper's section "Fine-Grained Mask Generation")."""
        pairs = [self._samples[i] for i in range(1, self.detect_steps + 1)]
        recorded, edited = [a for a, _ in pairs], [b for _, b in pairs]
        if self.config.method == "paper":
            per_sample = torch.stack([
                masks.paper_mask([a[b : b + 1] for a in recorded], [e[b : b + 1] for e in edited], self.window)
                for b in range(recorded[0].shape[0])
            ])  # fmt: skip
        else:
            options = {k: getattr(self.config, k) for k in ("threshold", "smooth", "dilation", "min_area")}
            per_sample = masks.automatic_mask(recorded, edited, window=self.window, **options)  # [B or K, H, W]
        # Latents that reached the U-Net come once for each part of guidance.
        self.masks = per_sample.unflatten(0, (-1, self.base.images)).any(0)  # [K, H, W]
        self._samples.clear()
        self._warn_if_empty()
        if self._carrier is not None:
            self._carrier.settle()
        return self.masks

    def compare(self, step: int, recorded: Tensor, sample: Tensor) -> None:
        """Keep the latents that reached the U-Net at 0-based ``step``, in both runs."""
        if step > 0 and self.masks is None:
            self._samples.setdefault(step, (recorded, clone_detached(sample)))

    def report(self) -> EditReport:
        """What was computed and moved, and how long it took."""
        if self._carrier is None:
            return EditReport(detect_steps=self.detect_steps, bytes_cached=self.base.nbytes)
        return self._carrier.report()

    def _warn_if_empty(self) -> None:
        if self.masks is not None and not self.masks.any():
            warn("The mask is empty: the edit is the recorded image.", EmptyMaskWarning)

    def __repr__(self) -> str:
        state = "mask not found yet" if self.masks is None else f"{float(self.masks.float().mean()):.1%} active"
        return f"Edit({state}, of {self.base!r})"


class Edits(list[Edit]):
    """Several edits that run as one: each U-Net call carries all of them.

    A call's samples are ordered as in diffusers: the parts of guidance outermost, then the edits, then the images of
    an edit.
    """

    def on_step_end(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A ``callback_on_step_end`` over the latents of all edits; see :meth:`Edit.on_step_end`."""
        parts = kwargs["latents"].split([edit.base.images for edit in self])
        kept = [
            edit.on_step_end(pipe, step, timestep, {"latents": part})["latents"]
            for edit, part in zip(self, parts, strict=True)
        ]
        return {**kwargs, "latents": torch.cat(kept)}
