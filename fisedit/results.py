"""What generating and editing return: images with the handles to edit them further."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from fisedit.contact_sheet import draw_contact_sheet, overlay_mask
from fisedit.edit import Edit
from fisedit.recording import Recording
from fisedit.report import EditReport

if TYPE_CHECKING:
    from fisedit.pipeline import EditPipeline


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
    pipeline: EditPipeline = field(repr=False)

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

    def _repr_html_(self) -> str:
        return f"{_html_image(self.image)}<br><i>{_escape(self.prompt)}</i>"


@dataclass
class EditResult(Generation):
    """An edited image: all that a generation has, with the mask and the report of the edit.

    Attributes:
        base: what was edited. edit_handle: the handle that ``unet.edit`` gave.
    """

    base: Generation
    edit_handle: Edit = field(repr=False)

    @property
    def mask(self) -> Tensor:
        """Bool ``[H, W]`` over the latent: where the image was computed again."""
        mask = self.edit_handle.mask
        return mask if mask is not None else torch.zeros(self.edit_handle.base.latents[-1].shape[-2:], dtype=torch.bool)

    @property
    def latents(self) -> Tensor:
        """The final latents ``[B, C, H, W]``; outside the mask they are the base's, bit for bit."""
        return self.edit_handle.latents[-1] if self.edit_handle.latents else self.base.latents

    @property
    def report(self) -> EditReport:
        """What was computed and moved, and how long it took."""
        return self.edit_handle.report()

    def overlay(self) -> Image.Image:
        """The edited image with the region outside the mask dimmed."""
        return overlay_mask(self.image, self.mask)

    def contact_sheet(self, dense: Image.Image | bool = False) -> Image.Image:
        """Before, after, mask and dense rerun side by side.

        Args:
            dense: the dense rerun's image; ``True`` computes it now, ``False`` leaves it out.
        """
        panels = [(self.base.prompt, self.base.image), (self.prompt, self.image), ("mask", self.overlay())]
        if dense is True:
            dense = self.pipeline.rerun(self.base, self.prompt)[0][0]
        if isinstance(dense, Image.Image):
            panels.append(("dense rerun", dense))
        return draw_contact_sheet([panels])

    def _repr_html_(self) -> str:
        return f"{_html_image(self.contact_sheet())}<pre>{_escape(str(self.report))}</pre>"


def _html_image(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
