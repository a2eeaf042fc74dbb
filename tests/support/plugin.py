"""A pytest plugin: ``@pytest.mark.supports(group, feature)`` makes a row of ``docs/support.md``.

``--write-support`` writes the page from the tests that passed. Without it, a whole run fails if the page differs from
what passed. Works under pytest-xdist: outcomes travel in the reports, left-out nightly tests in the workers' output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.table import GROUPS, Proof, page

PROPERTY = "supports"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-support", action="store_true", help="write docs/support.md from the tests that passed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "supports(group, feature): proves a row of docs/support.md")
    config.pluginmanager.register(SupportTable(config), "support-table")


def _claims(item: pytest.Item) -> Iterator[tuple[str, str]]:
    """The (group, feature) pairs that a test is marked with."""
    for mark in item.iter_markers("supports"):
        if len(mark.args) != 2 or mark.kwargs or mark.args[0] not in GROUPS:
            raise pytest.UsageError(f"{item.nodeid}: supports(group, feature), the group one of {', '.join(GROUPS)}")
        yield mark.args


class SupportTable:
    """Gathers the proofs of one run."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.planned: dict[str, list[list[Any]]] = {}
        self.proofs: dict[tuple[str, str, str], Proof] = {}
        self.message = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Before tests are deselected: who claims what."""
        for index, item in enumerate(items):
            nightly = item.get_closest_marker("nightly") is not None
            claims = [[group, feature, item.nodeid, index, nightly] for group, feature in _claims(item)]
            if claims:
                self.planned[item.nodeid] = claims
                item.user_properties.extend((PROPERTY, claim) for claim in claims)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test: it passed if its call did and no phase failed or skipped."""
        for name, claim in report.user_properties:
            if name != PROPERTY:
                continue
            assert isinstance(claim, list)
            key = (claim[0], claim[1], claim[2])
            before = self.proofs[key].passed if key in self.proofs else True
            self.proofs[key] = Proof(*claim, passed=bool(before and report.passed))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        left_out = [c for name, claims in self.planned.items() for c in claims if c[4] and not self._ran(name)]
        if (output := getattr(self.config, "workeroutput", None)) is not None:
            output[PROPERTY] = left_out  # this is a worker: the controller decides
            return
        self._add_left_out(left_out)
        path = self.config.rootpath / "docs" / "support.md"
        wanted = page(self.proofs.values())
        holds = path.exists() and path.read_text(encoding="utf-8") == wanted
        if self.config.getoption("--write-support"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted, encoding="utf-8")
            self.message = "docs/support.md is written" + (", as it was" if holds else "")
        elif exitstatus == 0 and self._whole_run(session) and not holds and (self.proofs or path.exists()):
            self.message = "docs/support.md differs from what the tests prove: run `make support` and commit it"
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self._add_left_out(getattr(node, "workeroutput", {}).get(PROPERTY, ()))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.message:
            terminalreporter.section("support table")
            terminalreporter.write_line(self.message)

    def _ran(self, test: str) -> bool:
        return any(key[2] == test for key in self.proofs)

    def _add_left_out(self, claims: Any) -> None:
        for claim in claims:
            self.proofs.setdefault((claim[0], claim[1], claim[2]), Proof(*claim, passed=None))

    def _whole_run(self, session: pytest.Session) -> bool:
        """Whether everything but nightly tests was run: no files named, nothing deselected by hand, not stopped."""
        option = self.config.option
        narrowed = (option.keyword, option.deselect, option.ignore, option.ignore_glob, option.collectonly,
                    getattr(option, "lf", False), getattr(option, "stepwise", False), session.shouldstop)  # fmt: skip
        by_default = self.config.args_source is pytest.Config.ArgsSource.TESTPATHS
        return by_default and not any(narrowed) and option.markexpr in ("", "not nightly")
