"""Tensors in files: written whole or not at all, told by a checksum, and read by mapping them into memory.

The format is safetensors, which holds numbers and names and runs nothing when it is read.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisedit.errors import CacheReadError, CacheWriteError

CHUNK = 2**24
"""Bytes that are written, or read for a checksum, at once."""
ALIGNMENT = 64
"""Where tensors begin, in bytes: as PyTorch's own, so that products over a mapped tensor round as over any other."""
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip
"""What can be written, under the names that safetensors has for it."""
NAMES = {name: dtype for dtype, name in DTYPES.items()}
ORDERS = "fisedit.orders"
"""The metadata key under which the order of dimensions in memory is kept, where it is not that of the shape."""
PREFIX = "fisedit-"
"""What folders of :func:`own_folder` are called, before the process and a random name."""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, lasting: bool = True
) -> str:
    """Write a safetensors file, whole or not at all; a file that was there is replaced at once.

    Args:
        tensors: by name. They may be views of one storage; each is written by its own elements, one after the other,
            without a copy of them all. The order of dimensions in memory (channels last, say) comes back with them.
        metadata: texts to keep with them.
        lasting: whether the file is to survive a power cut, for which the disk is waited for.

    Returns:
        The checksum of the file, see :func:`checksum_of`.

    Raises:
        CacheWriteError: the file cannot be written. What was there before it still is, and nothing else.
        TypeError: a tensor has a dtype that is not in :data:`DTYPES`.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}, which no safetensors file holds")
    orders = {name: order for name, tensor in tensors.items() if (order := _order(tensor)) is not None}
    # Those of whole multiples of the alignment first, so that nothing moves them off it; then by size of elements.
    names = sorted(tensors, key=lambda n: (tensors[n].nbytes % ALIGNMENT > 0, -tensors[n].element_size()))
    kept = {**(metadata or {}), **({ORDERS: json.dumps(orders)} if orders else {})}
    header = _header({name: tensors[name] for name in names}, orders, kept)
    return write_file(path, chain([header], (_bytes(tensors[name], orders.get(name)) for name in names)), lasting)


def write_file(path: Path, pieces: Iterable[bytes | memoryview], lasting: bool = True) -> str:
    """Write a file of these pieces, whole or not at all: under another name first, which then takes its place.

    Returns:
        The checksum of the file, see :func:`checksum_of`.

    Raises:
        CacheWriteError: the file cannot be written. What was there before it still is, and nothing else.
    """
    temporary, checksum = temporary_name(path), 0
    try:
        file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o666)
        try:
            for piece in pieces:
                checksum = _write(file, memoryview(piece), checksum)
            if lasting:
                os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
        if lasting:
            _sync_folder(path.parent)
    except OSError as error:
        raise CacheWriteError(path=str(path), reason=error.strerror or str(error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return f"{checksum:08x}"


def temporary_name(path: Path) -> Path:
    """Under which name a file is written, beside where it is to be."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def open_tensors(path: Path, checksum: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file, mapped: what is not read is not loaded, and writes to them do not reach the file.

    Args:
        checksum: what :func:`write_tensors` returned, to be checked first, for which the file is read once.

    Raises:
        CacheReadError: the file is missing, cut short, no safetensors file, or has another checksum.
    """
    if checksum is not None:
        check_file(path, checksum)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("its header is longer than the file")
            described = json.loads(file.read(length))
        orders = json.loads(described.pop("__metadata__", {}).get(ORDERS, "{}"))
        # Not by safetensors' own reader, which looks at a page of every tensor.
        storage = torch.UntypedStorage.from_file(str(path), False, size)
        mapped = {name: _mapped(storage, 8 + length, **entry) for name, entry in described.items()}
        return mapped | {name: _reordered(mapped[name], order) for name, order in orders.items()}
    except FileNotFoundError as error:
        raise CacheReadError(path=str(path), reason="it is missing") from error
    except OSError as error:
        raise CacheReadError(path=str(path), reason=error.strerror or str(error)) from error
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = f"it is cut short, or no safetensors file ({str(error).splitlines()[0] if str(error) else error!r})"
        raise CacheReadError(path=str(path), reason=reason) from error


def check_file(path: Path, checksum: str) -> None:
    """Raise unless a file is as it was written.

    Raises:
        CacheReadError: it is missing, cannot be read, or has another checksum.
    """
    found = checksum_of(path)
    if found != checksum:
        raise CacheReadError(path=str(path), reason=f"it was changed since: its checksum is {found}, not {checksum}")


def checksum_of(path: Path) -> str:
    """The CRC-32 of a file's bytes, as 8 hexadecimal digits. Other threads run meanwhile.

    Raises:
        CacheReadError: the file is missing or cannot be read.
    """
    checksum, buffer = 0, bytearray(CHUNK)
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                checksum = zlib.crc32(memoryview(buffer)[:count], checksum)
    except FileNotFoundError as error:
        raise CacheReadError(path=str(path), reason="it is missing") from error
    except OSError as error:
        raise CacheReadError(path=str(path), reason=error.strerror or str(error)) from error
    return f"{checksum:08x}"


def _mapped(storage: Any, start: int, *, dtype: str, shape: Sequence[int], data_offsets: Sequence[int]) -> Tensor:
    """A tensor within a mapped file, as the file's header describes it.

    Raises:
        ValueError, KeyError, RuntimeError: it does not lie in the file, or is of a dtype that is not known.
    """
    kind, (begin, end) = NAMES[dtype], data_offsets
    tensor = torch.empty(0, dtype=kind)
    if begin < 0 or start + end > storage.nbytes() or math.prod(shape) * tensor.element_size() != end - begin:
        raise ValueError(f"a tensor of {shape} at {begin} to {end} does not lie in it")
    offset, rest = divmod(start + begin, tensor.element_size())
    if rest:
        raise ValueError(f"a tensor at {begin} is not aligned")
    return tensor.set_(storage, offset, (math.prod(shape),), (1,)).view(tuple(shape))


def _header(tensors: Mapping[str, Tensor], orders: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with: its length (8 bytes), JSON, and spaces up to the alignment."""
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        shape = [tensor.shape[dim] for dim in orders.get(name, range(tensor.dim()))]
        described[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _order(tensor: Tensor) -> list[int] | None:
    """A tensor's dimensions as they lie in memory, the slowest first; ``None`` if that is the order of its shape."""
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    return None if order == list(range(tensor.dim())) else order


def _reordered(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The inverse of permuting by ``order``."""
    return tensor.permute([order.index(dim) for dim in range(len(order))])


def _bytes(tensor: Tensor, order: Sequence[int] | None) -> memoryview:
    tensor = tensor.detach() if order is None else tensor.detach().permute(*order)
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(file: int, data: memoryview, checksum: int) -> int:
    """Write all of ``data``; returns the checksum of what was written so far."""
    while len(data):
        count = os.write(file, data[:CHUNK])
        checksum = zlib.crc32(data[:count], checksum)
        data = data[count:]
    return checksum


def _sync_folder(folder: Path) -> None:
    """Let a new name survive a power cut, where the system can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def own_folder(within: Path) -> Path:
    """A new folder of this process, once those are removed that killed processes left beside it.

    Raises:
        CacheWriteError: it cannot be made.
    """
    try:
        within.mkdir(parents=True, exist_ok=True)
        _sweep(within)
        return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=within))
    except OSError as error:
        raise CacheWriteError(path=str(within), reason=error.strerror or str(error)) from error


def _sweep(folder: Path) -> None:
    """Remove what processes left behind that were killed."""
    for left in folder.glob(f"{PREFIX}*"):
        pid = left.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
