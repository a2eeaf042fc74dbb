"""Rows of the support table, and the page that they make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GROUPS = ("Models", "Features", "Samplers", "Batches and rounds", "Integrations")

HEADER = """\
<!-- Written by `make support`; do not edit. -->

# What is supported

This page is written by the tests themselves (`make support`), and `make test` fails when it no longer says what they
prove. A row stands for something that works: the tests beside it passed, all of them. Such a test runs the untouched
model next to the compiled one, mostly a narrow one with random weights, and wants equal outputs, within the rounding of
its dtype: of the dense recording run, and of a sparse edit whose active cache entries are poisoned with NaN, on the
mask. Where the right answer is a named error, the row says so.

*(nightly)*: takes minutes and is run by `make nightly`, not by `make test`.
"""


@dataclass(frozen=True)
class Proof:
    """One run or planned run of a test that proves ``feature``.

    ``index`` is its place in the collection and orders the rows; ``passed`` is ``None`` for a nightly test that this
    run left out.
    """

    group: str
    feature: str
    test: str
    index: int
    nightly: bool
    passed: bool | None

    @property
    def name(self) -> str:
        """``features/test_models.py::test_sdxl``: no top folder, no parameters."""
        path, _, function = self.test.partition("::")
        return path.removeprefix("tests/") + "::" + function.partition("[")[0]


def page(proofs: Iterable[Proof]) -> str:
    """The page as Markdown: a table per group, a row per feature all of whose tests passed."""
    rows: dict[tuple[str, str], list[Proof]] = {}
    for proof in sorted(proofs, key=lambda proof: proof.index):
        rows.setdefault((proof.group, proof.feature), []).append(proof)
    parts = [HEADER]
    for group in GROUPS:
        lines = [
            f"| {feature} | {_tests(row)} |"
            for (of, feature), row in rows.items()
            if of == group and all(proof.passed is not False for proof in row)
        ]
        if lines:
            parts.append("\n".join([f"## {group}", "", "| feature | proven by |", "| --- | --- |", *lines]) + "\n")
    return "\n".join(parts)


def _tests(row: list[Proof]) -> str:
    names = dict.fromkeys(f"`{proof.name}`" + (" *(nightly)*" if proof.nightly else "") for proof in row)
    return ", ".join(names)
