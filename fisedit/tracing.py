"""``trace``: a file for https://ui.perfetto.dev that shows what ran when, made of the spans that the library marks."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from fisedit.environment import describe_environment
from fisedit.errors import NestedTraceError, UnwritableTraceError
from fisedit.runtime.trace import HOST, TRACKS, Marked, Trace

PROCESS = 1
"""The only process of a file. Its first row has the same number, which makes it the main thread to a viewer."""


@contextmanager
def trace(path: str | os.PathLike[str]) -> Iterator[Trace]:
    """Write what runs inside the ``with`` block to ``path``, for https://ui.perfetto.dev or chrome://tracing.

    Each U-Net call of ``record()`` and ``edit()`` is a span of the row *compute*; what is moved has rows of its own. A
    GPU's spans are what its streams did, by events that are read when the block ends, so that no call waits for one.

    Args:
        path: a JSON file, replaced if there is one. It is also written if the block fails, once there is a span.

    Yields:
        the trace, whose ``span`` marks spans of your own.

    Raises:
        UnwritableTraceError: nothing can be written there; raised before the block runs, where that shows by then.
        NestedTraceError: inside another trace.
    """
    if (active := Trace.active()) is not None:
        raise NestedTraceError(opened=os.fspath(path), active=active.name)
    file = _writable(path)
    opened = Trace(os.fspath(path))
    try:
        with opened.open():
            yield opened
    except BaseException:
        with suppress(Exception):  # the error to tell is the block's
            if opened.spans():
                _write(file, opened)
        raise
    _write(file, opened)


def _writable(path: str | os.PathLike[str]) -> Path:
    """The file that ``path`` names, whatever becomes of the working folder.

    Raises:
        UnwritableTraceError: it cannot be written.
    """
    try:
        file = Path(path).resolve()
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(file.stat().st_mode):
                raise UnwritableTraceError(path=os.fspath(path), reason="what lies there is no file")
        tempfile.TemporaryFile(dir=file.parent).close()
    except (OSError, ValueError, RuntimeError) as error:  # of the name, too: a loop of links
        raise _unwritable(path, error) from None
    return file


def _unwritable(path: str | os.PathLike[str], error: Exception) -> UnwritableTraceError:
    return UnwritableTraceError(path=os.fspath(path), reason=getattr(error, "strerror", None) or str(error))


def _write(file: Path, opened: Trace) -> None:
    spans = opened.spans()
    gpu = next((span.device for span in spans if span.device is not None and span.device.type == "cuda"), HOST)
    content = {
        "traceEvents": trace_events(spans),
        "displayTimeUnit": "ms",
        "otherData": describe_environment(gpu),
    }
    part = file.with_name(f".{uuid4().hex}.part")
    try:
        part.write_text(json.dumps(content, default=str) + "\n", encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise _unwritable(opened.name, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def trace_events(spans: Sequence[Marked]) -> list[dict[str, Any]]:
    """Spans as events of the Trace Event Format: the rows' names, then complete events in µs, by row and time.

    A track is one row; more, if it has spans that overlap, of several threads or streams.
    """
    tracks = dict.fromkeys([*TRACKS, *(span.track for span in spans)])
    rows = [
        (track if number == 1 else f"{track} {number}", row)
        for track in tracks
        for number, row in enumerate(_rows([span for span in spans if span.track == track]), 1)
    ]
    events = [_metadata("process_name", PROCESS, name="FISEdit")]
    for tid, (name, _) in enumerate(rows, 1):
        events += [_metadata("thread_name", tid, name=name), _metadata("thread_sort_index", tid, sort_index=tid)]
    return events + [_complete(span, tid) for tid, (_, row) in enumerate(rows, 1) for span in row]


def _metadata(kind: str, tid: int, **args: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": PROCESS, "tid": tid, "args": args}


def _complete(span: Marked, tid: int) -> dict[str, Any]:
    # Both ends are rounded, not the time between them: spans that follow one another must not overlap.
    start, end = round(span.start * 1e9), round(span.end * 1e9)
    times = {"ts": start / 1e3, "dur": (end - start) / 1e3}
    where = "host" if span.device is None else str(span.device)
    return {"name": span.name, "cat": where, "ph": "X", **times, "pid": PROCESS, "tid": tid, "args": span.args}


def _rows(spans: Sequence[Marked]) -> list[list[Marked]]:
    """Spans of a track in as few rows as show them: in a row, one follows another, or lies in one of its thread."""
    rows: list[tuple[list[Marked], list[Marked]]] = []  # spans, and those of them that last, the outer ones first
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        row = next((row for row in rows if _fits(span, row[1])), None)
        if row is None:
            rows.append(row := ([], []))
        for part in row:
            part.append(span)
    return [row for row, _ in rows]


def _fits(span: Marked, lasting: list[Marked]) -> bool:
    """Whether a span may come to a row; those are dropped from ``lasting`` that are over when it begins."""
    while lasting and lasting[-1].end <= span.start:
        lasting.pop()
    return not lasting or (lasting[-1].thread == span.thread and span.end <= lasting[-1].end)
