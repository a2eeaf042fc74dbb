"""What FISEdit warns of: nothing is wrong with the image, but something is slower or holds less than it could."""

import inspect
import warnings


class FISEditWarning(UserWarning):
    """The base of every warning of FISEdit."""


class EmptyMaskWarning(FISEditWarning):
    """The mask selects nothing, so the edit is the recorded image."""


class DenseIslandsWarning(FISEditWarning):
    """Much of the model stays dense while editing, so that an edit gains little."""


class NotCompiledWarning(FISEditWarning):
    """Inductor could not compile a dense graph, which runs uncompiled."""


class NotFusedWarning(FISEditWarning):
    """Triton cannot launch kernels on this machine's GPU, so that edits run by plain PyTorch, op by op."""


class PageableMemoryWarning(FISEditWarning):
    """Host memory could not be page-locked, so that copies from and to it hold the GPU up."""


class CacheSpaceWarning(FISEditWarning):
    """Recorded values found no place within the budgets, or the disk did not take them; the recording lacks them."""


def warn(message: str, category: type[FISEditWarning]) -> None:
    """Warn at the line of the user's code that led here: the first that is not ours, diffusers' or torch's."""
    level, frame, passed = 1, inspect.currentframe(), ("fisedit", "diffusers", "torch", "contextlib")
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in passed:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
