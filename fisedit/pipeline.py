"""``EditPipeline``: generate, then edit by changing words, over any diffusers text-to-image pipeline."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from typing import Any

import torch

from fisedit.alignment import TokenAlignment, align_prompts
from fisedit.api import compile
from fisedit.config import CompileConfig, DetectConfig
from fisedit.edit import Edit
from fisedit.errors import NotRecordedError, RecordingMismatchError, UnknownOptionError
from fisedit.results import EditResult, Generation

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


OURS = ("prompt", "generator", "latents", "prompt_embeds", "return_dict")
"""Arguments of the pipeline that ``EditPipeline`` sets itself."""


class EditPipeline:
    """Generate images that can be edited by changing words of their prompt.

    Args:
        pipe: a diffusers pipeline with ``unet``, ``tokenizer`` and ``scheduler``, called as ``pipe(prompt, ...)``.
            It is copied shallowly and not changed; weights are shared.
        config, options: as for :func:`fisedit.compile`.
    """

    def __init__(self, pipe: Any, config: CompileConfig | None = None, **options: Any) -> None:
        self.pipe = copy.copy(pipe)
        self.pipe.unet = compile(pipe.unet, config, **options)

    def generate(
        self, prompt: str, *, seed: int | None = None, generator: torch.Generator | None = None, **settings: Any
    ) -> Generation:
        """Generate an image and keep its feature maps.

        Args:
            prompt: one prompt.
            seed: seed of the noise; drawn if neither it nor ``generator`` is given.
            generator: takes the place of ``seed``; its state is kept, so that edits start from the same noise.
            settings: any other argument of the pipeline (``num_inference_steps``, ``guidance_scale``, ...).

        Raises:
            PromptTooLongError: the prompt has more tokens than the text encoder takes.
            UnknownOptionError: an argument that the pipeline does not have, or several prompts.
        """
        self._check(prompt, settings)
        if generator is None:
            generator = torch.Generator().manual_seed(torch.seed() % 2**32 if seed is None else seed)
        state, device = generator.get_state(), generator.device
        start = time.perf_counter()
        with self.pipe.unet.record() as recording:
            images = self._run(prompt, state, device, settings, recording.on_step_end)
        return Generation(
            prompt, images, recording, self._settings(settings), state, device, time.perf_counter() - start, self
        )

    def edit(
        self,
        base: Generation | EditResult,
        prompt: str,
        *,
        mask: Any = "auto",
        detect: DetectConfig | None = None,
        alignment: TokenAlignment | None = None,
        record: bool = True,
        **settings: Any,
    ) -> EditResult:
        """Edit an image by changing the words of its prompt; the background stays bit for bit (in latents).

        Args:
            base: what to edit: a generation, or a former edit.
            prompt: the new prompt.
            mask: ``"auto"`` finds the region; or a tensor, array or PIL image of any size, true where it may change.
            detect: how the region is found.
            alignment: which token continues which; found word by word by default.
            record: keep what a further edit of this result needs (costs memory in proportion to the active share).
            settings: may repeat the generation's settings; of these only what does not change the latents may differ
                (``output_type``, ``callback_on_step_end``).

        Raises:
            RecordingMismatchError: a setting, or the pipeline's scheduler, differs from the generation's.
            InvalidMaskError, PromptTooLongError, NotRecordedError, ForeignRecordingError.
        """
        self._check(prompt, settings)
        self._check_same(base, settings)
        if base.recording is None:
            raise NotRecordedError
        alignment = alignment or align_prompts(self.pipe.tokenizer, base.prompt, prompt)
        given = None if isinstance(mask, str) and mask == "auto" else mask
        start = time.perf_counter()
        with self.pipe.unet.edit(base.recording, given, alignment=alignment, detect=detect, record=record) as edit:
            images = self._run_edit(base, prompt, edit, {**base.settings["given"], **settings})
        recording = edit.recording if edit.recording is not None and edit.recording.calls else None
        if edit.mask is not None and not edit.mask.any():
            recording = base.recording
        return EditResult(
            prompt, images, recording, base.settings, base.state, base.device, time.perf_counter() - start, self,
            base=base, edit_handle=edit,
        )  # fmt: skip

    def rerun(self, base: Generation | EditResult, prompt: str) -> tuple[list[Any], float]:
        """The dense way: generate ``prompt`` from the same noise, whole. Returns the images and the seconds it took."""
        start = time.perf_counter()
        images = self._run(prompt, base.state, base.device, base.settings["given"], lambda *args: args[-1])
        return images, time.perf_counter() - start

    def _run_edit(self, base: Generation | EditResult, prompt: str, edit: Edit, settings: dict[str, Any]) -> list[Any]:
        if edit.mask is not None and not edit.mask.any():
            return list(base.images)
        return self._run(prompt, base.state, base.device, settings, edit.on_step_end)

    def _run(self, prompt: str, state: torch.Tensor, device: Any, settings: dict[str, Any], on_step: Callback) -> Any:
        generator = torch.Generator(device)
        generator.set_state(state)
        theirs = settings.get("callback_on_step_end")
        both = on_step if theirs is None else _chain(on_step, theirs)
        ours: dict[str, Any] = {"generator": generator, "callback_on_step_end": both}
        if "callback_on_step_end_tensor_inputs" in settings:  # ours reads the latents, whatever theirs reads
            ours["callback_on_step_end_tensor_inputs"] = list(
                dict.fromkeys(["latents", *settings["callback_on_step_end_tensor_inputs"]])
            )
        return self.pipe(prompt, **{**settings, **ours}).images

    def _check(self, prompt: Any, settings: dict[str, Any]) -> None:
        if not isinstance(prompt, str):
            raise UnknownOptionError(option="prompt", given=prompt, allowed="one string: edit one image at a time")
        known = inspect.signature(self.pipe.__call__).parameters
        for name in settings:
            if name not in known or name in OURS:
                raise UnknownOptionError(option="argument", given=name, allowed=[n for n in known if n not in OURS])
        align_prompts(self.pipe.tokenizer, prompt, prompt)

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """What an edit must share with its base: the pipeline's arguments, and the scheduler."""
        known = inspect.signature(self.pipe.__call__).parameters
        compared = ("height", "width", "num_inference_steps", "guidance_scale", "num_images_per_prompt",
                    "negative_prompt", "eta", "timesteps", "sigmas", "guidance_rescale", "clip_skip",
                    "cross_attention_kwargs")  # fmt: skip
        settings = {n: given.get(n, known[n].default) for n in compared if n in known}
        scheduler = self.pipe.scheduler
        settings["scheduler"] = type(scheduler).__name__
        settings["scheduler config"] = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        settings["dtype"] = str(next(self.pipe.unet.parameters()).dtype)
        return {"compared": settings, "given": given}

    def _check_same(self, base: Generation | EditResult, settings: dict[str, Any]) -> None:
        now = self._settings({**base.settings["given"], **settings})["compared"]
        then = base.settings["compared"]
        differences = {name: (then[name], now[name]) for name in then if then[name] != now[name]}
        if differences:
            raise RecordingMismatchError(differences=differences)


def _chain(first: Callback, second: Callback) -> Callback:
    def both(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = first(pipe, step, timestep, kwargs)
        return {**kwargs, **(second(pipe, step, timestep, kwargs) or {})}

    return both
