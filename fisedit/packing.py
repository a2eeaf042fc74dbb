"""Values as JSON, with tensors and pictures in files beside it: no pickle, so that reading runs nothing."""

from __future__ import annotations

import io
import math
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fisedit.errors import CacheReadError, UnsavableSettingError
from fisedit.manifest import MANIFEST, WriteFile
from fisedit.runtime.cache.disk import DTYPES, write_file, write_tensors

VALUES = "values.safetensors"
"""The file of all tensors but the cached feature maps."""
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Kinds of PIL images that a PNG gives back as they were."""


class Packer:
    """Turns values into JSON, and gathers the tensors and pictures among them."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.pictures: dict[str, Image.Image] = {}
        self._known: dict[tuple[Any, ...], str] = {}

    def tensor(self, tensor: Tensor, name: str) -> str:
        """The name that a tensor is kept under; the same elements in memory are kept once.

        Raises:
            UnsavableSettingError: it is sparse, on no device, or of a dtype that no file holds.
        """
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
        if not plain or tensor.dtype not in DTYPES:
            kind = f"{tensor.layout}, {tensor.dtype}, {tensor.device}"
            raise UnsavableSettingError(setting=name, given=f"a {type(tensor).__name__} of {kind}")
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place not in self._known:
            while name in self.tensors:
                name += "_"
            self.tensors[name] = tensor.detach()  # kept, so that no other tensor comes to lie in its place
            self._known[place] = name
        return self._known[place]

    def value(self, value: Any, name: str) -> Any:
        """A value as JSON.

        Args:
            name: what to call it in an error.

        Raises:
            UnsavableSettingError: it is, or holds, something else than plain values, tensors, arrays and PIL images.
        """
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, dict):
            pairs = [[self.value(key, name), self.value(item, f"{name}[{key!r}]")] for key, item in value.items()]
            return {"dict": pairs}
        if isinstance(value, (list, tuple)):
            items = [self.value(item, f"{name}[{number}]") for number, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor(value, name), "device": str(value.device)}
        if isinstance(value, (np.ndarray, np.generic)):
            kind = "array" if isinstance(value, np.ndarray) else "scalar"
            return {kind: self.tensor(_as_tensor(value, name), name)}
        if isinstance(value, Image.Image):
            return {"picture": self.picture(value, name)}
        functions = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
        given = "a function" if isinstance(value, functions) else f"an object of {type(value).__name__}"
        raise UnsavableSettingError(setting=name, given=given)

    def picture(self, image: Image.Image, name: str) -> str:
        """The file that a picture goes to.

        Raises:
            UnsavableSettingError: a PNG does not hold its mode.
        """
        if image.mode not in MODES:
            given = f"a PIL image of mode {image.mode}"
            raise UnsavableSettingError(setting=name, given=given, allowed=f"pictures of mode {', '.join(MODES)}")
        file = f"picture-{len(self.pictures)}.png"
        self.pictures[file] = image
        return file

    def files(self) -> dict[str, WriteFile]:
        """What writes the gathered tensors and pictures."""
        tensors, made = dict(self.tensors), {name: _writer(image) for name, image in self.pictures.items()}
        return {VALUES: lambda path: write_tensors(path, tensors), **made}


def _as_tensor(value: Any, name: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError) as error:
        raise UnsavableSettingError(setting=name, given=f"an array of {value.dtype}") from error


def _writer(image: Image.Image) -> WriteFile:
    def write(path: Path) -> str:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return write_file(path, [buffer.getbuffer()])

    return write


class Unpacker:
    """The inverse of :class:`Packer`.

    Args:
        tensors: those of the file of values, mapped. What is taken of them is copied and needs the file no more.
        move: where to put a tensor that was on a device of that name.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], move: Callable[[str], torch.device]) -> None:
        self.folder = folder
        self._tensors = tensors
        self._move = move
        self._made: dict[tuple[str, torch.device], Tensor] = {}

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """A tensor by its name; what was one tensor when it was saved is one again."""
        if (name, device) not in self._made:
            self._made[name, device] = self._tensors[name].to(device, copy=True)
        return self._made[name, device]

    def value(self, packed: Any) -> Any:
        """What :meth:`Packer.value` was given.

        Raises:
            CacheReadError: a picture that is none.
            KeyError, TypeError, ValueError: it is not what that returned.
        """
        if isinstance(packed, list):
            return [self.value(item) for item in packed]
        if not isinstance(packed, dict):
            return packed
        kind, held = next(iter(packed.items()))
        if kind == "float":
            return float(held)
        if kind == "dict":
            return {self.value(key): self.value(item) for key, item in held}
        if kind == "tuple":
            return tuple(self.value(item) for item in held)
        if kind == "tensor":
            return self.tensor(held, self._move(packed["device"]))
        if kind in ("array", "scalar"):
            array = self._tensors[held].numpy().copy()
            return array if kind == "array" else array[()]
        if kind == "picture":
            return self._picture(held)
        raise ValueError(f"{kind!r} is nothing that is saved")

    def _picture(self, name: str) -> Image.Image:
        if Path(name).name != name:
            raise CacheReadError(path=str(self.folder / MANIFEST), reason=f"it lists {name!r}, which no save writes")
        try:
            with Image.open(self.folder / name, formats=("PNG",)) as image:
                return image.copy()
        except OSError as error:
            raise CacheReadError(path=str(self.folder / name), reason=f"it is no picture ({error})") from error
