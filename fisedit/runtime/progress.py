"""Shows that a first mask waits for its kernels, which can take minutes."""

from __future__ import annotations

from types import TracebackType

from tqdm.auto import tqdm

DELAY = 2.0
"""Seconds before anything is shown."""
TEXT = "fisedit: compiling and timing kernels for this GPU, kept for later"


class Progress:
    """A bar on the terminal or in a notebook, gone when its block ends; threads may share it.

    Hidden by ``TQDM_DISABLE=1`` in the environment.
    """

    def __init__(self) -> None:
        self._bar: tqdm[None] = tqdm(
            total=0, desc=TEXT, leave=False, delay=DELAY, bar_format="{desc}: {n_fmt} of {total_fmt} [{elapsed}]"
        )

    def expect(self) -> None:
        """Something more is to be done."""
        self._bar.total += 1

    def done(self) -> None:
        """Something that was expected is."""
        self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()
