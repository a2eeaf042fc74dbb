"""Edits over HTTP: users generate pictures, the server holds their feature maps, edits are computed sparsely.

    pip install fisedit fastapi uvicorn
    uvicorn --factory fastapi_server:demo_app

One process serves one model. A base is the feature maps of one picture; it belongs to the user who made it. The server
keeps the `max_bases` that were used last and frees the others.
"""

import io
import threading
import uuid
from collections import OrderedDict
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import Base64Bytes, BaseModel, Field

from fisedit import EditPipeline, FISEditError, errors
from fisedit.results import Generation

GONE = (errors.ForeignRecordingError, errors.SessionClosedError, errors.IncompleteRecordingError)
"""The base is there, but the model that made it is not any more: the client has to generate it again."""


class NewBase(BaseModel):
    prompt: str
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(25, ge=2, le=100)
    guidance: float = Field(5.0, ge=0, le=30, allow_inf_nan=False)


class NewEdit(BaseModel):
    prompt: str
    mask: Base64Bytes | None = None
    """A picture, white where the image may change; without one, the region is found."""


class Bases:
    """Generations by user and number; of more than `limit`, the one used longest ago is freed."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept: OrderedDict[tuple[str, str], Generation] = OrderedDict()

    def add(self, user: str, base: Generation) -> str:
        number = uuid.uuid4().hex
        self.kept[user, number] = base
        while len(self.kept) > self.limit:
            _, oldest = self.kept.popitem(last=False)
            oldest.recording.release()
        return number

    def get(self, user: str, number: str) -> Generation:
        if (user, number) not in self.kept:
            raise HTTPException(404, f"There is no base {number!r} of yours: it was freed, or never made.")
        self.kept.move_to_end((user, number))
        return self.kept[user, number]

    def drop(self, user: str, number: str) -> None:
        self.get(user, number).recording.release()
        del self.kept[user, number]


def current_user(x_user: Annotated[str, Header(min_length=1)]) -> str:
    """Who asks. Put your authentication here; a header that anybody can write is none."""
    return x_user


User = Annotated[str, Depends(current_user)]


def create_app(editor: EditPipeline, max_bases: int = 8) -> FastAPI:
    """The application. Endpoints are plain functions, which FastAPI runs in threads, so the event loop stays free."""
    app = FastAPI(title="FISEdit")
    bases = Bases(max_bases)
    model = threading.Lock()  # one picture at a time: a second would only slow both, and could free the first's base

    @app.post("/bases", status_code=201)
    def generate(new: NewBase, user: User) -> Response:
        with model:
            base = editor.generate(
                new.prompt, seed=new.seed, num_inference_steps=new.steps, guidance_scale=new.guidance
            )
            number = bases.add(user, base)
        return _png(base.image, 201, {"Location": f"/bases/{number}"})

    @app.post("/bases/{number}/edits")
    def edit(number: str, new: NewEdit, user: User) -> Response:
        mask = "auto" if new.mask is None else _picture(new.mask)
        with model:
            result = editor.edit(bases.get(user, number), new.prompt, mask=mask, record=False)
        return _png(result.image, 200, {"X-Active-Share": f"{result.mask.float().mean():.4f}"})

    @app.delete("/bases/{number}", status_code=204)
    def free(number: str, user: User) -> None:
        with model:
            bases.drop(user, number)

    @app.exception_handler(FISEditError)
    def refuse(request: Request, error: FISEditError) -> JSONResponse:
        status = 409 if isinstance(error, GONE) else 422
        return JSONResponse({"detail": str(error), "error": type(error).__name__}, status)

    return app


def _png(image: Image.Image, status: int, headers: dict[str, str]) -> Response:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Response(buffer.getvalue(), status, headers, "image/png")


def _picture(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except OSError as error:
        raise errors.InvalidMaskError(given="no picture", expected="a PNG or JPEG file in base64") from error


def demo_app() -> FastAPI:
    """The application over the model that ships with the package."""
    from fisedit.demo import load_pipeline

    return create_app(EditPipeline(load_pipeline()))
