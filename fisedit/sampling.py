"""How a base was sampled, and how its edits are: everything of a diffusers run but the words."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fisedit.errors import RecordingMismatchError, UnknownOptionError

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]

OURS = ("prompt", "generator", "latents", "prompt_embeds", "return_dict")
"""Arguments of a pipeline that ``EditPipeline`` sets itself."""
WORDS = ("negative_prompt", "negative_prompt_2", "prompt_2")
PICTURES = ("image", "mask_image", "control_image")
"""With the words, what goes with a prompt: one stands for all of several prompts, a list has one for each."""
ALONE = (
    "ip_adapter_image", "ip_adapter_image_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
    "masked_image_latents", "depth_map",
)  # fmt: skip
"""Inputs that pipelines do not spread over several prompts: with them, prompts run one after the other."""
FREE = ("prompt_2", "output_type", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
"""Settings that an edit may change: they do not move the latents outside its mask."""


@dataclass(frozen=True)
class Run:
    """What an edit must share with its base.

    Attributes:
        settings: arguments of the pipeline as they were given.
        state, device: of the generator at the start: noise of the first latents and of stochastic samplers.
        scheduler: a copy, as it was.
        latents: the first latents ``[1, C, H, W]`` where they were not drawn (an inverted picture).
    """

    settings: Mapping[str, Any]
    state: Tensor
    device: torch.device
    scheduler: Any
    latents: Tensor | None = None

    def generator(self) -> torch.Generator:
        generator = torch.Generator(self.device)
        generator.set_state(self.state)
        return generator

    @property
    def images(self) -> int:
        """Images for one prompt."""
        return int(self.settings.get("num_images_per_prompt", 1))

    def with_settings(self, pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of an edit that repeats, or may change, some of them.

        Raises:
            RecordingMismatchError: one that may not be changed differs.
        """
        known = inspect.signature(pipe.__call__).parameters
        differences = {}
        for name, value in given.items():
            then = self.settings.get(name, known[name].default)
            if name not in FREE and not same(then, value):
                differences[name] = (then, value)
        if differences:
            raise RecordingMismatchError(differences=differences)
        return {**self.settings, **given}

    def fits(self, other: Run) -> bool:
        """Whether edits of both can run at once: alike in all but noise, one image each."""
        alike = same(dict(self.settings), dict(other.settings)) and self.device == other.device
        sampled = not scheduler_differences(self.scheduler, other.scheduler)
        drawn = (self.latents is None) == (other.latents is None)
        return alike and sampled and drawn and self.images == other.images == 1 and may_share(self.settings)


def sample(
    pipe: Any, prompts: Sequence[str], runs: Sequence[Run], on_step_end: Callback, settings: Mapping[str, Any]
) -> tuple[list[Any], bool]:
    """Run ``pipe`` for one prompt, or for several at once, each from the noise of its own run.

    The pipeline given is not touched: it may serve other threads at the same time.

    Returns:
        The images, and whether the run came to its end (a callback may interrupt it).
    """
    pipe = copy.copy(pipe)
    pipe.scheduler = copy.deepcopy(runs[0].scheduler)
    several = len(prompts) > 1
    arguments = dict(settings)
    for name in (*WORDS, *PICTURES):
        # One for each, so that whatever the pipeline draws for a prompt comes from that prompt's generator.
        if several and name in arguments:
            arguments[name] = _repeat(arguments[name], len(prompts))
    generators = [run.generator() for run in runs]
    arguments["prompt"] = list(prompts) if several else prompts[0]
    arguments["generator"] = generators if several else generators[0]
    if runs[0].latents is not None:
        arguments["latents"] = torch.cat([run.latents for run in runs if run.latents is not None])
    _add_callback(arguments, on_step_end)
    images = pipe(**arguments).images
    return list(images), not getattr(pipe, "interrupt", False)


def _repeat(given: Any, count: int) -> Any:
    """One string or picture for each prompt; lists and batches stay as they are."""
    if isinstance(given, (str, Image.Image)):
        return [given] * count
    if isinstance(given, Tensor) and (given.dim() == 3 or len(given) == 1):
        return torch.cat([given.reshape(1, *given.shape[-3:])] * count)
    if isinstance(given, np.ndarray) and (given.ndim == 3 or len(given) == 1):
        return np.concatenate([given.reshape(1, *given.shape[-3:])] * count)
    return given


def may_share(settings: Mapping[str, Any]) -> bool:
    """Whether a pipeline runs several prompts at once with these settings as it runs each alone."""
    return all(settings.get(name) is None for name in ALONE)


def split_settings(pipe: Any, settings: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The settings of each of ``count`` prompts: of a list of words or pictures each takes its own.

    Raises:
        UnknownOptionError: a list of another length, or several images of each of several prompts.
    """
    if count > 1 and settings.get("num_images_per_prompt", 1) != 1:
        allowed = "1 with several prompts; repeat the prompts instead"
        raise UnknownOptionError(
            option="num_images_per_prompt", given=settings["num_images_per_prompt"], allowed=allowed
        )
    each: list[dict[str, Any]] = [dict(settings) for _ in range(count)]
    # Several ControlNets, or one of several modes, take a list of pictures for one prompt.
    several_controls = hasattr(getattr(pipe, "controlnet", None), "nets") or "control_mode" in settings
    for name in WORDS if several_controls else (*WORDS, *PICTURES):
        given: Any = settings.get(name)
        if not _is_batch(given):
            continue
        if len(given) != count:
            allowed = f"one, or one for each of {count} prompts" if count > 1 else "one for a prompt"
            raise UnknownOptionError(option=name, given=f"{len(given)} of them", allowed=allowed)
        for number, own in enumerate(each):
            own[name] = given[number : number + 1] if isinstance(given, (Tensor, np.ndarray)) else given[number]
    return each


def _is_batch(given: Any) -> bool:
    """Whether a setting has several values: a list, or an array ``[N, ...]`` of several pictures."""
    if isinstance(given, (Tensor, np.ndarray)):
        return given.ndim == 4 and len(given) > 1
    return isinstance(given, (list, tuple))


def _add_callback(arguments: dict[str, Any], ours: Callback) -> None:
    """Call ``ours`` before the user's own ``callback_on_step_end``."""
    theirs = arguments.get("callback_on_step_end")
    inputs = getattr(theirs, "tensor_inputs", arguments.get("callback_on_step_end_tensor_inputs"))
    if inputs is not None:  # ours reads the latents, whatever theirs reads
        arguments["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys(["latents", *inputs]))

    def both(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = ours(pipe, step, timestep, kwargs)
        return kwargs if theirs is None else {**kwargs, **(theirs(pipe, step, timestep, kwargs) or {})}

    arguments["callback_on_step_end"] = both


def check_settings(pipe: Any, settings: Mapping[str, Any]) -> None:
    """Raise unless the pipeline takes these settings from a user.

    Raises:
        UnknownOptionError: an argument that it does not have, or that is ours; a number of steps below 1.
    """
    known = inspect.signature(pipe.__call__).parameters
    for name in settings:
        if name not in known or name in OURS:
            raise UnknownOptionError(option="argument", given=name, allowed=[n for n in known if n not in OURS])
    for name in ("num_inference_steps", "num_images_per_prompt"):
        given = settings.get(name, 1)
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise UnknownOptionError(option=name, given=given, allowed="a whole number of at least 1")


def make_generator(seed: Any, generator: Any) -> torch.Generator:
    """The generator of a run, from a seed, or a random one.

    Raises:
        UnknownOptionError: neither a seed nor a generator.
    """
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise UnknownOptionError(option="generator", given=generator, allowed="a torch.Generator, one for a prompt")
        return generator
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise UnknownOptionError(option="seed", given=seed, allowed="a whole number in 0..2**63-1")
    return torch.Generator().manual_seed(torch.seed() % 2**32 if seed is None else seed)


def scheduler_differences(mine: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
    """What differs between two schedulers: name -> (of the first, of the second)."""
    if type(mine) is not type(theirs):
        return {"scheduler": (type(mine).__name__, type(theirs).__name__)}
    names = [name for name in {**mine.config, **theirs.config} if not name.startswith("_")]
    pairs = {f"scheduler.{name}": (mine.config.get(name), theirs.config.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if not same(*pair)}


def same(a: Any, b: Any) -> bool:
    """Whether two settings are equal; arrays, tensors and pictures by their values, also within lists and dicts."""
    if a is b:
        return True
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (Tensor, np.ndarray)) or isinstance(b, (Tensor, np.ndarray)):
        if a is None or b is None or isinstance(a, str) or isinstance(b, str):
            return False
        x, y = (value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value) for value in (a, b))
        return np.array_equal(x, y)
    if isinstance(a, Image.Image) and isinstance(b, Image.Image):  # whichever file or class they came from
        return a.mode == b.mode and a.size == b.size and a.getpalette() == b.getpalette() and a.tobytes() == b.tobytes()
    return bool(a == b)
