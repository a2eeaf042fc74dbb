"""What generating and editing return: images with the handles to edit them further."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from fisedit.contact_sheet import Panel, changed_words, draw_contact_sheet, overlay_mask
from fisedit.edit import Edit
from fisedit.errors import UnknownOptionError
from fisedit.recording import Recording
from fisedit.report import EditReport
from fisedit.sampling import Run


class Editor(Protocol):
    """What a result needs of the pipeline that made it (:class:`fisedit.EditPipeline`)."""

    pipe: Any

    def edit(self, base: Any, prompt: Any, **options: Any) -> Any: ...

    def rerun(self, base: Any, prompt: str) -> tuple[list[Any], float]: ...

    def save(self, base: Any, folder: Path | str, *, overwrite: bool = False) -> None: ...


@dataclass
class Generation:
    """A generated image that can be edited.

    Attributes:
        prompt: its prompt. images: PIL images, one per image of the prompt (or what ``output_type`` asked for).
        recording: its cached feature maps. run: how it was sampled. seconds: wall-clock time.
        latents: the final latents ``[K, C, H, W]``.
    """

    prompt: str
    images: list[Any]
    recording: Recording | None
    run: Run = field(repr=False)
    seconds: float
    pipeline: Editor = field(repr=False)
    latents: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.recording is not None
        self.latents = self.recording.latents[-1]

    @property
    def image(self) -> Any:
        """The first image."""
        return self.images[0]

    @property
    def pictures(self) -> list[Image.Image]:
        """The images as PIL images.

        Raises:
            UnknownOptionError: the pipeline was asked for latents, which are no pictures.
        """
        if isinstance(self.images[0], Image.Image):
            return self.images
        values = torch.stack([torch.as_tensor(image) for image in self.images]).float().cpu()
        if values.dim() == 4 and values.shape[1] == 3:
            values = values.permute(0, 2, 3, 1)  # [K, H, W, 3]
        if values.dim() != 4 or values.shape[-1] != 3:
            raise UnknownOptionError(option="output_type", given="latent", allowed="'pil', 'np' or 'pt' for pictures")
        return VaeImageProcessor.numpy_to_pil(values.numpy())

    def edit(self, prompt: Any, **options: Any) -> Any:
        """Edit this image, or with a list of prompts make many edits of it; see :meth:`EditPipeline.edit`."""
        return self.pipeline.edit(self, prompt, **options)

    def save(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Keep this base in a folder, for ``EditPipeline.load``; see :meth:`EditPipeline.save`."""
        self.pipeline.save(self, folder, overwrite=overwrite)

    def contact_sheet(self) -> Image.Image:
        """All images of the prompt side by side, with the prompt."""
        panels = [Panel(image) for image in self.pictures]
        panels[0] = Panel.plain(self.pictures[0], self.prompt)
        return draw_contact_sheet([panels])

    def _repr_html_(self) -> str:
        return _html_image(self.contact_sheet(), self.prompt)


HEADINGS = ("before", "after", "computed again", "dense rerun")
"""The columns of an edit's contact sheet."""


@dataclass
class EditResult(Generation):
    """An edited image: all that a generation has, with the mask and the report of the edit.

    Attributes:
        base: what was edited. edit_handle: the handle that ``unet.edit`` gave.
    """

    base: Generation = field(repr=False)
    edit_handle: Edit

    def __post_init__(self) -> None:
        kept = self.edit_handle.latents
        self.latents = kept[-1] if kept else self.base.latents

    @property
    def mask(self) -> Tensor:
        """Bool ``[H, W]`` over the latent: where an image was computed again."""
        return self.masks.any(0)

    @property
    def masks(self) -> Tensor:
        """Bool ``[1 or K, H, W]``: where each image was computed again."""
        masks = self.edit_handle.masks
        return masks if masks is not None else torch.zeros(1, *self.base.latents.shape[-2:], dtype=torch.bool)

    @property
    def background_is_identical(self) -> bool:
        """Whether the final latents outside the masks are the base's, compared bit for bit."""
        inside = self.masks[:, None].to(self.latents.device)
        return bool((inside | (self.latents == self.base.latents)).all())

    @property
    def report(self) -> EditReport:
        """What was computed and moved, and how long it took."""
        return self.edit_handle.report()

    def overlay(self, number: int = 0) -> Image.Image:
        """Edited image ``number`` with all that lies outside the mask grey and pale, and the mask's edge drawn."""
        return overlay_mask(self.pictures[number], self.masks[number % len(self.masks)])

    def panels(self, dense: list[Image.Image] | None = None) -> list[list[Panel]]:
        """The rows of :meth:`contact_sheet`, one per image of the prompt."""
        before, after = changed_words(self.base.prompt, self.prompt)
        share = f"{float(self.mask.float().mean()):.1%} of the latent"
        rows = []
        for number, (old, new) in enumerate(zip(self.base.pictures, self.pictures, strict=True)):
            row = [Panel(old, before), Panel(new, after), Panel.plain(self.overlay(number), share)]
            rows.append(row + [Panel(dense[number], after)] if dense else row)
        return rows

    def contact_sheet(self, dense: list[Image.Image] | Image.Image | bool = False) -> Image.Image:
        """Before, after, mask and dense rerun side by side.

        Args:
            dense: the dense rerun's images; ``True`` computes them now, ``False`` leaves them out.
        """
        if dense is True:
            dense = self.pipeline.rerun(self.base, self.prompt)[0]
        images = [dense] if isinstance(dense, Image.Image) else dense or None
        return draw_contact_sheet(self.panels(images), HEADINGS[: 4 if images else 3])

    def _repr_html_(self) -> str:
        figures = html.escape(str(self.report))
        return f'{_html_image(self.contact_sheet(), self.prompt)}<pre style="line-height:1.3">{figures}</pre>'


def _html_image(image: Image.Image, description: str) -> str:
    """An ``<img>`` that no notebook cell overflows. JPEG: a sheet as PNG weighs some megabytes in a saved notebook."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" style="max-width:100%" src="data:image/jpeg;base64,{data}">'
