"""``EditPipeline``: generate or invert, then edit by changing words, over any diffusers pipeline with a U-Net."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from fisedit.alignment import TokenAlignment, align_prompts
from fisedit.api import compile
from fisedit.config import CompileConfig, DetectConfig
from fisedit.edit import Edits
from fisedit.errors import NotRecordedError, UnknownOptionError, UnsupportedPipelineError
from fisedit.inversion import check_invertible, ddim_trajectory, encode, follow
from fisedit.recording import Recording
from fisedit.results import EditResult, Generation
from fisedit.sampling import Run, check_settings, make_generator, may_share, sample, split_settings
from fisedit.saving_generation import load_generation, save_generation


class EditPipeline:
    """Generate images that can be edited by changing words of their prompt.

    Args:
        pipe: a diffusers pipeline with ``unet``, ``tokenizer`` and ``scheduler``, called as ``pipe(prompt=..., ...)``
            (text to image, image to image, inpainting, ControlNet, ...). It is copied shallowly and not changed;
            weights are shared.
        config, options: as for :func:`fisedit.compile`.

    Raises:
        UnsupportedPipelineError: it has no U-Net, or no ``callback_on_step_end``.
    """

    def __init__(self, pipe: Any, config: CompileConfig | None = None, **options: Any) -> None:
        missing = [] if isinstance(getattr(pipe, "unet", None), nn.Module) else ["a U-Net (`unet`)"]
        for name in ("scheduler", "tokenizer"):
            missing += [] if hasattr(pipe, name) else [f"`{name}`"]
        if "callback_on_step_end" not in inspect.signature(pipe.__call__ if callable(pipe) else pipe).parameters:
            missing.append("the argument `callback_on_step_end`")
        if missing:
            raise UnsupportedPipelineError(pipeline=type(pipe).__name__, missing=missing)
        self.pipe = copy.copy(pipe)
        self.pipe.unet = compile(pipe.unet, config, **options)

    @overload
    def generate(
        self, prompt: str, *, seed: int | None = None, generator: torch.Generator | None = None, **settings: Any
    ) -> Generation: ...

    @overload
    def generate(
        self, prompt: Sequence[str], *, seed: int | Sequence[int] | None = None,
        generator: Sequence[torch.Generator] | None = None, **settings: Any,
    ) -> list[Generation]: ...  # fmt: skip

    def generate(self, prompt: Any, *, seed: Any = None, generator: Any = None, **settings: Any) -> Any:
        """Generate an image and keep its feature maps.

        Args:
            prompt: one prompt, or a list of prompts, drawn at once.
            seed: seed of the noise; drawn if neither it nor ``generator`` is given. For a list of prompts a list, or
                one number: the seed of the first, and those that follow it.
            generator: takes the place of ``seed``; its state is kept, so that edits start from the same noise.
            settings: any other argument of the pipeline (``num_inference_steps``, ``guidance_scale``, ...). For a list
                of prompts, ``negative_prompt``, ``image`` and the like are one for all, or a list with one for each.

        Returns:
            A :class:`Generation`; for a list of prompts a list of them, each to be edited by itself.

        Raises:
            PromptTooLongError: the prompt has more tokens than the text encoder takes.
            UnknownOptionError: an argument that the pipeline does not have, a seed that is none.
            UnsupportedPipelineError: it draws an image in views that are smaller than it.
        """
        several = isinstance(prompt, (list, tuple))
        prompts = list(prompt) if several else [prompt]
        self._check_prompts(prompts)
        check_settings(self.pipe, settings)
        if several and isinstance(seed, int) and not isinstance(seed, bool):
            seed = [seed + number for number in range(len(prompts))]
        seeds, generators = (
            _each(name, given, prompts, several) for name, given in (("seed", seed), ("generator", generator))
        )
        split = split_settings(self.pipe, settings, len(prompts))
        runs = [self._run(make_generator(*each[:2]), each[2]) for each in zip(seeds, generators, split, strict=True)]
        if may_share(settings) and len(prompts) > 1:
            made = self._generate(prompts, runs, settings)
        else:
            made = [self._generate([prompt], [run], run.settings)[0] for prompt, run in zip(prompts, runs, strict=True)]
        return made if several else made[0]

    def _generate(self, prompts: list[str], runs: list[Run], settings: Mapping[str, Any]) -> list[Generation]:
        """Generations that run at once."""
        start = time.perf_counter()
        with self.pipe.unet.record() as recording:
            images, finished = sample(self.pipe, prompts, runs, recording.on_step_end, settings)
        recording.complete &= finished
        self._check_whole(recording)
        seconds = (time.perf_counter() - start) / len(prompts)
        parts = recording.split() if len(prompts) > 1 else [recording]
        shared = [images] if len(prompts) == 1 else [[image] for image in images]
        return [Generation(*each, seconds, self) for each in zip(prompts, shared, parts, runs, strict=True)]

    def invert(
        self, image: Any, prompt: str, *, num_inference_steps: int = 50, guidance_scale: float = 7.5, **settings: Any
    ) -> Generation:
        """Make a base of a photograph: edits change what the new words touch, the rest stays the photograph.

        DDIM inversion (Song et al. 2021) carries the encoded picture to noise without guidance; then the run from
        that noise is recorded, with guidance, over the latents of the inversion, so that it ends in the picture
        whatever the guidance.

        Args:
            image: a PIL image. It is scaled to the size that the pipeline draws by default, or to ``height`` and
                ``width``, if given.
            prompt: what it shows; edits change words of it.
            num_inference_steps, guidance_scale, settings: arguments of the pipeline, for the edits too.

        Raises:
            UnknownOptionError: no PIL image; a pipeline whose scheduler is no diffusion over variance-preserving noise.
            UnsupportedPipelineError: a pipeline that does not draw from a prompt and latents alone.
            PromptTooLongError.
        """
        check_invertible(self.pipe)
        self._check_prompts([prompt])
        settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **settings}
        check_settings(self.pipe, settings)
        start = time.perf_counter()
        latents, settings = encode(self.pipe, image, settings)
        scheduler, trajectory = ddim_trajectory(self.pipe, latents, prompt, settings)
        generator = torch.Generator().manual_seed(0)
        run = Run(settings, generator.get_state(), generator.device, scheduler, trajectory[-1])
        with self.pipe.unet.record() as recording:
            images, finished = sample(self.pipe, [prompt], [run], follow(trajectory, recording), settings)
        recording.complete &= finished
        return Generation(prompt, images, recording, run, time.perf_counter() - start, self)

    @overload
    def edit(
        self, base: Generation, prompt: str, *, mask: Any = "auto", detect: DetectConfig | None = None,
        alignment: TokenAlignment | None = None, record: bool = True, **settings: Any,
    ) -> EditResult: ...  # fmt: skip

    @overload
    def edit(
        self, base: Generation | Sequence[Generation], prompt: str | Sequence[str], *, mask: Any = "auto",
        detect: DetectConfig | None = None, alignment: Sequence[TokenAlignment | None] | None = None,
        record: bool = True, batch_size: int = 8, **settings: Any,
    ) -> list[EditResult]: ...  # fmt: skip

    def edit(
        self, base: Any, prompt: Any, *, mask: Any = "auto", detect: DetectConfig | None = None, alignment: Any = None,
        record: bool = True, batch_size: int = 8, **settings: Any,
    ) -> Any:  # fmt: skip
        """Edit an image by changing the words of its prompt; the background stays bit for bit (in latents).

        With a list of bases, or of prompts, many edits run at once, in U-Net calls that carry all of them.

        Args:
            base: what to edit: a generation, an inverted picture, or a former edit; or a list.
            prompt: the new prompt; or a list: each is an edit of its base, or of the one base.
            mask: ``"auto"`` finds the region; or a tensor, array or PIL image of any size, true where it may change;
                or a list of these.
            detect: how the region is found.
            alignment: which token continues which; found word by word by default.
            record: keep what a further edit of this result needs (costs memory in proportion to the active share).
            batch_size: the most edits that one U-Net call carries.
            settings: may repeat the generation's settings; of these only what does not change the latents may differ
                (``output_type``, ``callback_on_step_end``, ``prompt_2``).

        Returns:
            An :class:`EditResult`; a list of them, in order, if a list was given.

        Raises:
            RecordingMismatchError: a setting differs from the generation's.
            InvalidMaskError, PromptTooLongError, NotRecordedError, ForeignRecordingError, UnknownOptionError.
        """
        several = isinstance(base, (list, tuple)) or isinstance(prompt, (list, tuple))
        count = max(len(x) for x in (base, prompt) if isinstance(x, (list, tuple))) if several else 1
        bases, prompts = (_spread(name, x, count) for name, x in (("base", base), ("prompt", prompt)))
        masks = list(mask) if isinstance(mask, (list, tuple)) and several else [mask] * count
        alignments = list(alignment) if isinstance(alignment, (list, tuple)) else [alignment] * count
        for name, given in (("mask", masks), ("alignment", alignments)):
            _spread(name, given, count)
        self._check_prompts(prompts)
        check_settings(self.pipe, settings)
        for each in bases:
            self._check_base(each)
        requests = list(zip(bases, prompts, masks, alignments, strict=True))
        merged = [each.run.with_settings(self.pipe, settings) for each in bases]
        results: list[EditResult] = []
        while len(results) < count:
            first, last = len(results), len(results) + 1
            while last < min(count, first + batch_size) and bases[first].run.fits(bases[last].run):
                last += 1
            results += self._edit(requests[first:last], detect, record, merged[first])
        return results if several else results[0]

    def _edit(
        self, requests: list[tuple[Any, ...]], detect: DetectConfig | None, record: bool, settings: dict[str, Any]
    ) -> list[EditResult]:
        """Edits that run at once."""
        start = time.perf_counter()
        bases, prompts = [request[0] for request in requests], [request[1] for request in requests]
        given = [None if isinstance(mask, str) and mask == "auto" else mask for _, _, mask, _ in requests]
        alignments = [
            alignment or align_prompts(self._tokenizer, base.prompt, prompt) for base, prompt, _, alignment in requests
        ]
        recordings = [base.recording for base in bases]
        with self.pipe.unet.edit(recordings, given, alignment=alignments, detect=detect, record=record) as edits:
            images, finished = self._draw(edits, bases, prompts, settings)
        seconds = (time.perf_counter() - start) / len(requests)
        shared = [images] if len(requests) == 1 else [[image] for image in images]
        results = []
        for base, prompt, edit, drawn in zip(bases, prompts, edits, shared, strict=True):
            recording = edit.recording if edit.recording is not None and edit.recording.calls else None
            if recording is not None:
                recording.complete &= finished
            if edit.mask is not None and not edit.mask.any():
                recording = base.recording
                drawn = list(base.images) if "output_type" not in settings else drawn
            results.append(EditResult(prompt, drawn, recording, base.run, seconds, self, base=base, edit_handle=edit))
        return results

    def _draw(
        self, edits: Edits, bases: list[Generation], prompts: list[str], settings: dict[str, Any]
    ) -> tuple[list[Any], bool]:
        if all(edit.mask is not None and not edit.mask.any() for edit in edits):
            return [image for base in bases for image in base.images], True
        return sample(self.pipe, prompts, [base.run for base in bases], edits.on_step_end, settings)

    def rerun(self, base: Generation, prompt: str) -> tuple[list[Any], float]:
        """The dense way: generate ``prompt`` from the same noise, whole. Returns the images and the seconds it took."""
        start = time.perf_counter()
        images, _ = sample(self.pipe, [prompt], [base.run], lambda *args: args[-1], base.run.settings)
        return images, time.perf_counter() - start

    def save(self, base: Generation, folder: Path | str, *, overwrite: bool = False) -> None:
        """Keep a base in a folder: images, feature maps, and all that an edit of it needs, but not the model.

        The folder holds JSON, safetensors and PNG, and becomes loadable at the very end: a save that is cut off leaves
        nothing that could be taken for a base. An edit is saved as the base of further ones, whole, with what it
        shares with its own base.

        Args:
            base: what ``generate``, ``invert`` or ``edit`` returned; this pipeline must have made it.
            folder: made if it is not there. It must be empty, unless ``overwrite``.
            overwrite: replace what a former save wrote. From the beginning of this one that is gone.

        Raises:
            SavedBaseExistsError: the folder is not empty.
            CacheWriteError: a file cannot be written; what was written so far is removed, ``base`` is as it was.
            UnsavableSettingError: a setting is a function or another object (a callback, say), or the scheduler is
                none of diffusers'.
            NotRecordedError: an edit made with ``record=False``.
            UnknownOptionError, ForeignRecordingError, SessionClosedError, IncompleteRecordingError,
            PartialRecordingError, NestedSessionError, UnreadableWeightsError.
        """
        self._check_base(base)
        save_generation(self.pipe.unet.identify("save"), base, folder, overwrite)

    def load(
        self, folder: Path | str, *, verify: bool = True, any_scheduler: bool = False, **settings: Any
    ) -> Generation:
        """A base that was saved, to be edited as before it was, bit for bit, in this process or another.

        It must have been made by the same U-Net (class, config, weights) in the same dtype, under the scheduler that
        this pipeline has. Feature maps stay in their files until an edit reads them; the files may be removed or
        replaced meanwhile, but must not be written to. For a GPU they are copied now, to the first tier with room
        (``CacheConfig``), and read from their files only where there is none.

        Args:
            verify: whether every file is read and its checksum compared; else only sizes are.
            any_scheduler: take a base of another scheduler than this pipeline's. Its edits run under its own anyway.
            settings: may repeat the generation's settings; one that differs is refused.

        Raises:
            SavedBaseMismatchError: names what differs, as saved and here.
            SavedBaseNotFoundError, UnfinishedSaveError: nothing was saved there, or not to the end.
            CacheReadError: names the file that is missing or damaged.
            SavedFormatError: a newer version of FISEdit saved it.
            NestedSessionError, UnknownOptionError, UnreadableWeightsError.
        """
        check_settings(self.pipe, settings)
        return load_generation(
            self.pipe.unet.identify("load"), self.pipe.unet.tiers, self, folder,
            verify=verify, any_scheduler=any_scheduler, settings=settings,
        )  # fmt: skip

    def _run(self, generator: torch.Generator, settings: dict[str, Any]) -> Run:
        return Run(settings, generator.get_state(), generator.device, copy.deepcopy(self.pipe.scheduler))

    @property
    def _tokenizer(self) -> Any:
        """The tokenizer whose tokens are the U-Net's text: the refiner of SDXL has only the second."""
        return self.pipe.tokenizer if self.pipe.tokenizer is not None else self.pipe.tokenizer_2

    def _check_prompts(self, prompts: list[Any]) -> None:
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise UnknownOptionError(option="prompt", given=prompt, allowed="a string, or a list of strings")
            align_prompts(self._tokenizer, prompt, prompt)
        if not prompts:
            raise UnknownOptionError(option="prompt", given=prompts, allowed="at least one string")

    def _check_whole(self, recording: Recording) -> None:
        """Raise for a pipeline that draws its latents in views: a mask over the latents is none over a view."""
        view = tuple(next(iter(recording.calls.values())).sample.shape[-2:])
        whole = tuple(recording.latents[0].shape[-2:])
        if view != whole:
            missing = [f"U-Net calls over the whole latent {whole} (it draws views of {view})"]
            raise UnsupportedPipelineError(pipeline=type(self.pipe).__name__, missing=missing)

    def _check_base(self, base: Any) -> None:
        if not isinstance(base, Generation):
            raise UnknownOptionError(option="base", given=base, allowed="what generate, invert or edit returned")
        if not isinstance(base.recording, Recording):
            raise NotRecordedError


def _spread(name: str, given: Any, count: int) -> list[Any]:
    """One value for all edits, or one for each."""
    if not isinstance(given, (list, tuple)):
        return [given] * count
    if len(given) != count:
        raise UnknownOptionError(option=name, given=given, allowed=f"one for each of {count} edits")
    return list(given)


def _each(name: str, given: Any, prompts: list[str], several: bool) -> list[Any]:
    """A seed or generator for each prompt."""
    if given is None or not several:
        return [given] * len(prompts)
    if not isinstance(given, (list, tuple)) or len(given) != len(prompts):
        raise UnknownOptionError(option=name, given=given, allowed=f"one for each of {len(prompts)} prompts")
    return list(given)
