"""A folder that holds one saved thing: files, and a manifest that is there only while all of them are whole.

A save that is killed at any moment leaves ``manifest.json.partial``, which lists the files that were to come, and no
``manifest.json``. That is written last, under another name first, and holds a checksum of every file and of itself.
"""

from __future__ import annotations

import json
import os
import re
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from fisedit.errors import (
    CacheReadError,
    CacheWriteError,
    SavedBaseExistsError,
    SavedBaseNotFoundError,
    SavedFormatError,
    UnfinishedSaveError,
)
from fisedit.runtime.cache.disk import check_file, write_file

MANIFEST, PARTIAL = "manifest.json", "manifest.json.partial"
FORMAT = 1
"""The version of the format. A change that older code cannot read, or would read wrongly, counts it up."""
THREADS = 4
"""How many files are written, or checked, at once."""
WriteFile = Callable[[Path], str]
"""Writes a file at a path and returns its checksum."""

_BLANK = "0" * 8  # stands for the manifest's own checksum while that is computed
_NAMES = r"(call-\d+|values)\.safetensors|picture-\d+\.png|manifest\.json(\.partial)?"
_OURS = re.compile(rf"({_NAMES})|\.({_NAMES})\.[0-9a-f]{{8}}\.tmp")


def write_folder(
    folder: Path, content: Mapping[str, Any], files: Mapping[str, WriteFile], overwrite: bool = False
) -> None:
    """Write files and, when all of them are there, the manifest that makes them loadable.

    A write that fails leaves the folder without any of the files. What ``overwrite`` replaces is gone by then.

    Args:
        content: JSON values for the manifest. files: by plain name, what writes each.
        overwrite: replace what a former save left in the folder.

    Raises:
        SavedBaseExistsError: the folder is not empty, and ``overwrite`` is not set; or another save began in it.
        CacheWriteError: a file cannot be written.
    """
    partial = _announce(folder, files, overwrite)
    try:
        _remove(folder, (name for name in _former(folder) if name != PARTIAL))
        with ThreadPoolExecutor(THREADS) as pool:
            checksums = list(pool.map(lambda name: files[name](folder / name), files))
        written = {
            name: {"size": (folder / name).stat().st_size, "checksum": checksum}
            for name, checksum in zip(files, checksums, strict=True)
        }
        if not _is_ours(folder, partial):
            raise SavedBaseExistsError(folder=str(folder), holds="another save, which began meanwhile")
        write_file(folder / MANIFEST, [_sealed({**content, "files": written})])
    except BaseException as error:
        if _is_ours(folder, partial):
            with suppress(CacheWriteError):
                _remove(folder, [*files, PARTIAL])
        if isinstance(error, OSError):
            raise CacheWriteError(path=str(folder), reason=error.strerror or str(error)) from error
        raise
    _remove(folder, [PARTIAL])


def read_folder(folder: Path) -> dict[str, Any]:
    """The content that :func:`write_folder` was given, once all files are found to be there in their sizes.

    Raises:
        SavedBaseNotFoundError, UnfinishedSaveError: nothing was saved there, or not to the end.
        SavedFormatError: a newer version wrote it.
        CacheReadError: the manifest was changed; or names the first file that is missing or of another size.
    """
    content = _read_manifest(folder)
    try:
        files = {str(name): (int(kept["size"]), str(kept["checksum"])) for name, kept in content["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheReadError(path=str(folder / MANIFEST), reason="it does not list its files") from error
    for name, (size, _) in files.items():
        _check_size(folder, name, size)
    return content


def verify_folder(folder: Path, content: Mapping[str, Any]) -> None:
    """Read every file that :func:`read_folder` found, and compare its checksum.

    Raises:
        CacheReadError: names the first file that was changed.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: check_file(folder / name, content["files"][name]["checksum"]), content["files"]))


def check_empty(folder: Path) -> None:
    """Raise unless :func:`write_folder` may begin in a folder.

    Raises:
        SavedBaseExistsError: it is not empty. CacheWriteError: it is none, or cannot be looked into.
    """
    try:
        names = os.listdir(folder) if folder.exists() else []
    except OSError as error:
        raise CacheWriteError(path=str(folder), reason=error.strerror or str(error)) from error
    if names:
        raise SavedBaseExistsError(folder=str(folder), holds=_described(names))


def _announce(folder: Path, files: Iterable[str], overwrite: bool) -> bytes:
    """Write down which files are to come, for whoever finds the folder if they do not; returns what was written."""
    text = json.dumps({"id": uuid.uuid4().hex, "files": list(files)}, indent=1).encode()
    path = folder / PARTIAL
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not overwrite:
            check_empty(folder)
        path.unlink(missing_ok=True)
        with open(path, "xb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        if not folder.is_dir():
            raise CacheWriteError(path=str(folder), reason="it is a file, no folder") from error
        raise SavedBaseExistsError(folder=str(folder), holds=_described([PARTIAL])) from error
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise CacheWriteError(path=str(path), reason=error.strerror or str(error)) from error
    return text


def _described(names: Iterable[str]) -> str:
    names = sorted(names)
    if MANIFEST in names:
        return "a saved base"
    if PARTIAL in names:
        return "a save that did not finish, or is still going on"
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _former(folder: Path) -> list[str]:
    """What saves have left in a folder, the manifest first: without it nothing of the rest can be loaded."""
    return sorted((name for name in os.listdir(folder) if _OURS.fullmatch(name)), key=lambda name: name != MANIFEST)


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise CacheWriteError(path=str(folder / name), reason=error.strerror or str(error)) from error


def _is_ours(folder: Path, partial: bytes) -> bool:
    try:
        return (folder / PARTIAL).read_bytes() == partial
    except OSError:
        return False


def _sealed(content: Mapping[str, Any]) -> bytes:
    """A manifest as text, with the checksum of all its bytes but the checksum's own."""
    blank = json.dumps({"format": FORMAT, "checksum": _BLANK, **content}, indent=1).encode() + b"\n"
    return blank.replace(_BLANK.encode(), f"{zlib.crc32(blank):08x}".encode(), 1)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except FileNotFoundError:
        raise _not_saved(folder) from None
    except NotADirectoryError:
        raise SavedBaseNotFoundError(folder=str(folder), reason="it is a file") from None
    except OSError as error:
        raise CacheReadError(path=str(path), reason=error.strerror or str(error)) from error
    except ValueError as error:
        raise CacheReadError(path=str(path), reason=f"it is no JSON ({error})") from error
    if not isinstance(content, dict) or type(content.get("format")) is not int or content["format"] < 1:
        raise CacheReadError(path=str(path), reason="it has no number of a format")
    if content["format"] > FORMAT:
        versions = content.get("versions")
        writer = f"FISEdit {versions['fisedit']}" if isinstance(versions, dict) and "fisedit" in versions else None
        known = {"written_by": writer} if writer else {}
        raise SavedFormatError(folder=str(folder), given=content["format"], known=FORMAT, **known)
    claimed = content.get("checksum")
    blank = data.replace(claimed.encode(), _BLANK.encode(), 1) if isinstance(claimed, str) and claimed else data
    if claimed != (found := f"{zlib.crc32(blank):08x}"):
        reason = f"it was changed since: its checksum is {found}, not {claimed}"
        raise CacheReadError(path=str(path), reason=reason)
    return content


def _not_saved(folder: Path) -> SavedBaseNotFoundError | UnfinishedSaveError:
    """Why a folder has no manifest, and how far a save came in it, if one was begun."""
    if not folder.is_dir():
        return SavedBaseNotFoundError(folder=str(folder), reason="there is no such folder")
    if not (folder / PARTIAL).exists():
        return SavedBaseNotFoundError(folder=str(folder))
    try:
        names = [str(name) for name in json.loads((folder / PARTIAL).read_bytes())["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return UnfinishedSaveError(folder=str(folder), file=PARTIAL, state="half written")
    there = os.listdir(folder)
    missing = next((name for name in [*names, MANIFEST] if name not in there), MANIFEST)
    half = any(name.startswith(f".{missing}.") and name.endswith(".tmp") for name in there)
    return UnfinishedSaveError(folder=str(folder), file=missing, state="half written" if half else "missing")


def _check_size(folder: Path, name: str, size: int) -> None:
    path = folder / name
    if Path(name).name != name or not _OURS.fullmatch(name):
        raise CacheReadError(path=str(folder / MANIFEST), reason=f"it lists {name!r}, which no save writes")
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise CacheReadError(path=str(path), reason="it is missing") from error
    except OSError as error:
        raise CacheReadError(path=str(path), reason=error.strerror or str(error)) from error
    if found != size:
        raise CacheReadError(path=str(path), reason=f"it has {found} bytes, and was saved with {size}")
