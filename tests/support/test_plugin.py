"""The support table's plugin, run over small suites."""

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PAGE = "docs/support.md"
SUITE = """
import pytest

@pytest.mark.supports("Models", "SD1")
@pytest.mark.parametrize("size", [1, 2])
def test_sd1(size):
    pass

@pytest.mark.supports("Models", "SD1")
@pytest.mark.supports("Features", "FreeU")
def test_more():
    pass

@pytest.mark.nightly
@pytest.mark.supports("Models", "big")
def test_big():
    pass

@pytest.mark.supports("Features", "breaks")
def test_breaks():
    {body}

@pytest.mark.supports("Features", "breaks")
def test_holds():
    pass
"""
ROWS = ["| FreeU | `test_suite.py::test_more` |", "| SD1 | `test_suite.py::test_sd1`, `test_suite.py::test_more` |",
        "| big | `test_suite.py::test_big` *(nightly)* |"]  # fmt: skip


@pytest.fixture
def suite(pytester):
    """Writes the suite, whose one test has the given body, and returns a function that runs it."""
    pytester.makeini("[pytest]\ntestpaths = tests\nmarkers = nightly\naddopts = -m 'not nightly'")
    (pytester.path / "tests").mkdir()
    conftest = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\npytest_plugins = ['support.plugin']"
    (pytester.path / "tests" / "conftest.py").write_text(conftest)

    def run(body, *options):
        (pytester.path / "tests" / "test_suite.py").write_text(SUITE.format(body=body))
        return pytester.runpytest_inprocess(*options)

    return run


def rows(pytester):
    lines = (pytester.path / PAGE).read_text().splitlines()
    return sorted(line for line in lines if line.startswith("| ") and "---" not in line and "proven by" not in line)


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_a_page_is_written_and_holds(pytester, suite, workers):
    assert suite("pass", "--write-support", *workers).ret == 0
    breaks = "| breaks | `test_suite.py::test_breaks`, `test_suite.py::test_holds` |"
    assert rows(pytester) == sorted([*ROWS, breaks])
    assert suite("pass", *workers).ret == 0
    page = pytester.path / PAGE
    page.write_text(page.read_text().replace("FreeU", "FreeV"))
    result = suite("pass", *workers)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*run `make support`*"])


@pytest.mark.parametrize("body", ["assert False", "pytest.skip()"])
def test_a_row_needs_all_its_tests(pytester, suite, body):
    suite(body, "--write-support")
    assert rows(pytester) == ROWS


@pytest.mark.parametrize("options", [["-k", "sd1"], ["tests/test_suite.py"], ["--co"], ["-m", "nightly"]])
def test_a_part_of_the_tests_says_nothing_of_the_page(suite, options):
    assert suite("pass").ret == pytest.ExitCode.TESTS_FAILED  # there is no page
    assert suite("pass", *options).ret == 0


def test_a_nightly_test_that_fails_takes_its_row(pytester, suite):
    suite("pass")
    path = pytester.path / "tests" / "test_suite.py"
    path.write_text(path.read_text().replace("def test_big():\n    pass", "def test_big():\n    assert False"))
    pytester.runpytest_inprocess("-m", "", "--write-support")
    assert not any("big" in row for row in rows(pytester))


@pytest.mark.parametrize("arguments", ["'Models'", "'Modells', 'SD1'"])
def test_a_wrong_mark_is_refused(pytester, suite, arguments):
    (pytester.path / "tests" / "test_wrong.py").write_text(
        f"import pytest\n@pytest.mark.supports({arguments})\ndef test_x(): pass\n"
    )
    assert suite("pass").ret == pytest.ExitCode.USAGE_ERROR
