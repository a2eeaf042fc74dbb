"""What generating and editing return: images with the handles to edit them further."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from fisedit.contact_sheet import Panel, changed_words, draw_contact_sheet, overlay_mask
from fisedit.edit import Edit
from fisedit.recording import Recording
from fisedit.report import EditReport


class Editor(Protocol):
    """What a result needs of the pipeline that made it (:class:`fisedit.EditPipeline`)."""

    pipe: Any

    def edit(self, base: Any, prompt: str, **options: Any) -> EditResult: ...

    def rerun(self, base: Any, prompt: str) -> tuple[list[Any], float]: ...


@dataclass
class Generation:
    """A generated image that can be edited.

    Attributes:
        prompt: its prompt. images: PIL images, one per image of the prompt. recording: its cached feature maps.
        settings: the pipeline's arguments. seconds: wall-clock time.
    """

    prompt: str
    images: list[Any]
    recording: Recording | None
    settings: dict[str, Any] = field(repr=False)
    state: Tensor = field(repr=False)
    device: Any = field(repr=False)
    seconds: float
    pipeline: Editor = field(repr=False)

    @property
    def image(self) -> Image.Image:
        """The first image."""
        return self.images[0]

    @property
    def latents(self) -> Tensor:
        """The final latents ``[B, C, H, W]``."""
        assert self.recording is not None
        return self.recording.latents[-1]

    def edit(self, prompt: str, **options: Any) -> EditResult:
        """Edit this image; see :meth:`EditPipeline.edit`."""
        return self.pipeline.edit(self, prompt, **options)

    def contact_sheet(self) -> Image.Image:
        """All images of the prompt side by side, with the prompt."""
        panels = [Panel(image) for image in self.images]
        panels[0] = Panel.plain(self.image, self.prompt)
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

    @property
    def mask(self) -> Tensor:
        """Bool ``[H, W]`` over the latent: where the image was computed again."""
        mask = self.edit_handle.mask
        return mask if mask is not None else torch.zeros(self.base.latents.shape[-2:], dtype=torch.bool)

    @property
    def latents(self) -> Tensor:
        """The final latents ``[B, C, H, W]``; outside the mask they are the base's, bit for bit."""
        return self.edit_handle.latents[-1] if self.edit_handle.latents else self.base.latents

    @property
    def background_is_identical(self) -> bool:
        """Whether the final latents outside the mask are the base's, compared bit for bit."""
        outside = ~self.mask.to(self.latents.device)
        return torch.equal(self.latents[..., outside], self.base.latents[..., outside])

    @property
    def report(self) -> EditReport:
        """What was computed and moved, and how long it took."""
        return self.edit_handle.report()

    def overlay(self, number: int = 0) -> Image.Image:
        """Edited image ``number`` with all that lies outside the mask grey and pale, and the mask's edge drawn."""
        return overlay_mask(self.images[number], self.mask)

    def panels(self, dense: list[Image.Image] | None = None) -> list[list[Panel]]:
        """The rows of :meth:`contact_sheet`, one per image of the prompt."""
        before, after = changed_words(self.base.prompt, self.prompt)
        share = f"{float(self.mask.float().mean()):.1%} of the latent"
        rows = []
        for number, (old, new) in enumerate(zip(self.base.images, self.images, strict=True)):
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
