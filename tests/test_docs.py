"""Every ```python block of README.md and docs/*.md runs, so that the documentation stays true.

The blocks of one page run in order, in one namespace, in an empty folder. Words after `python` in a block's info
string (which no renderer shows) change that:

- `no-run`: the block is only compiled, for code that needs a GPU, a downloaded model or a person;
- `steps=N`: every `steps=<number>` or `num_inference_steps=<number>` of the block becomes N. The page shows the
  number that makes a good picture, the test takes fewer steps over the same code.
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]

FENCE = re.compile(r"^(?P<indent> *)```python(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```[ ]*$", re.M | re.S)
STEPS = re.compile(r"\b((?:num_inference_)?steps)=\d+")


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is the 1-based line of its first code line in the page."""

    code: str
    line: int
    run: bool


def blocks_of(page: str) -> list[Block]:
    """The ```python blocks of a Markdown page.

    Raises:
        ValueError: an info string has an unknown word, or `steps=N` stands over a block that names no steps.
    """
    blocks = []
    for match in FENCE.finditer(page):
        code, run = textwrap.dedent(match["code"]), True
        line = page.count("\n", 0, match.start("code")) + 1
        for word in match["info"].split():
            if word == "no-run":
                run = False
            elif re.fullmatch(r"steps=\d+", word):
                code, replaced = STEPS.subn(rf"\1={word.removeprefix('steps=')}", code)
                if not replaced:
                    raise ValueError(f"line {line}: `{word}` over a block that sets no number of steps")
            else:
                raise ValueError(f"line {line}: unknown word `{word}` after ```python")
        blocks.append(Block(code, line, run))
    return blocks


def run_page(path: Path) -> dict[str, object]:
    """Runs a page's blocks and returns their namespace; a traceback points into the page."""
    namespace: dict[str, object] = {"__name__": f"docs:{path.name}"}
    for block in blocks_of(path.read_text(encoding="utf-8")):
        code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
        if block.run:
            exec(code, namespace)
    return namespace


def _parameter(path: Path) -> object:
    """An integration page whose blocks run is a row of the support table, under its title."""
    page = path.read_text(encoding="utf-8")
    proves = path.parent.name == "integrations" and any(block.run for block in blocks_of(page))
    marks = [pytest.mark.supports("Integrations", page.splitlines()[0].removeprefix("# "))] if proves else []
    return pytest.param(path, id=str(path.relative_to(ROOT)), marks=marks)


@pytest.mark.parametrize("page", [_parameter(page) for page in PAGES])
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)


def broken_links(path: Path) -> list[str]:
    """The relative links of a page that lead to no file."""
    code = re.compile(r"^```.*?^```|`[^`\n]*`", re.M | re.S)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", code.sub("", path.read_text(encoding="utf-8")))
    return [target for target in targets if "://" not in target and not (path.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](page.md) [b](page.md#part) [c](https://example.org) `[d](none)` [e](gone.md) ![f](gone.png)\n")
    assert broken_links(page) == ["gone.md", "gone.png"]


SAMPLE = """\
# Title

```python
first = 1
```

- in a list

  ```python steps=2
  second = dict(num_inference_steps=50)
  ```

```python no-run
undefined_name(steps=3)
```

```bash
not python
```
"""


def test_blocks_share_a_namespace_and_obey_their_info_string(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(SAMPLE)
    namespace = run_page(page)
    assert namespace["first"] == 1
    assert namespace["second"] == {"num_inference_steps": 2}
    assert [block.line for block in blocks_of(SAMPLE)] == [4, 10, 14]


def test_a_failing_block_is_located_in_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\na = 1\nb = a / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_page(page)
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (page, 5)


@pytest.mark.parametrize("info", ["norun", "steps=4", "steps=four"])
def test_an_info_string_that_does_nothing_is_refused(info):
    with pytest.raises(ValueError, match="line 2"):
        blocks_of(f"```python {info}\na = 1\n```\n")


def test_a_block_that_only_compiles_must_compile(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python no-run\na = = 1\n```\n")
    with pytest.raises(SyntaxError):
        run_page(page)
