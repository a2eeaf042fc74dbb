"""The structure of the source: which part may import which, how long a file and a function may be."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON_FILES = [
    path for folder in ("fisedit", "tests", "bench", "examples") for path in sorted((ROOT / folder).rglob("*.py"))
]

# Parts that know nothing of the others; every part may use them.
FOUNDATION = ("fisedit.errors", "fisedit.warnings", "fisedit.mask", "fisedit.alignment")
# Imports run one way: api -> passes -> config -> runtime -> torch.
MAY_IMPORT = {
    **dict.fromkeys(FOUNDATION, FOUNDATION),
    "fisedit.runtime": ("fisedit.runtime", *FOUNDATION),
    "fisedit.config": ("fisedit.runtime", *FOUNDATION),
    "fisedit.passes": ("fisedit.passes", "fisedit.config", "fisedit.runtime", *FOUNDATION),
}
KERNELS = "fisedit.runtime.kernels"
SHARED = {
    f"{KERNELS}.{name}" for name in ("activate", "launch", "row_tile", "share_out", "stages")
}  # what all of them may use
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60
# A GPU kernel is one function: what it calls is compiled into it, and sees nothing that is not passed.
MAX_KERNEL_LINES = 160


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


class ImportCollector(ast.NodeVisitor):
    """The modules of `known` that one module imports, wherever in the file; not those under TYPE_CHECKING."""

    def __init__(self, module: str, is_package: bool, known: set[str]):
        self.package = module.split(".") if is_package else module.split(".")[:-1]
        self.known = known
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found.update(alias.name for alias in node.names if alias.name in self.known)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = ".".join(self.package[: len(self.package) - node.level + 1]) if node.level else ""
        source = ".".join(filter(None, [base, node.module]))
        for alias in node.names:
            submodule = f"{source}.{alias.name}"
            self.found.update({submodule if submodule in self.known else source} & self.known)


def import_graph(sources: dict[str, str], packages: set[str]) -> dict[str, set[str]]:
    """Module -> the modules among `sources` that it imports."""
    graph = {}
    for module, source in sources.items():
        collector = ImportCollector(module, module in packages, set(sources))
        collector.visit(ast.parse(source))
        graph[module] = collector.found - {module}
    return graph


def wrong_imports(graph: dict[str, set[str]]) -> list[str]:
    """The imports that run against the layers or from one kernel to another."""
    wrong = []
    for module, imported in graph.items():
        for layer, allowed in MAY_IMPORT.items():
            if within(module, layer):
                wrong += [f"{module} imports {name}" for name in imported if not any(within(name, a) for a in allowed)]
        if module.startswith(KERNELS + "."):
            own = ".".join(module.split(".")[:4])
            wrong += [
                f"{module} imports {name}"
                for name in imported
                if name.startswith(KERNELS + ".") and not within(name, own) and name not in SHARED
            ]
    return wrong


def long_functions(source: str) -> list[str]:
    """The functions over the limit, decorators and docstrings counted."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {n: (n.end_lineno or n.lineno) - n.lineno + 1 for n in functions}
    return [f"{n.name}, line {n.lineno}: {length} lines" for n, length in lengths.items() if length > limit(n)]


def limit(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    is_kernel = any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)
    return MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    paths = {module_name(path): path for path in (ROOT / "fisedit").rglob("*.py")}
    packages = {name for name, path in paths.items() if path.name == "__init__.py"}
    return import_graph({name: path.read_text(encoding="utf-8") for name, path in paths.items()}, packages)


def test_imports_run_one_way(graph):
    assert wrong_imports(graph) == []


def test_imports_go_in_no_circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("circle of imports: " + " -> ".join(error.args[1]))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit(path):
    source = path.read_text(encoding="utf-8")
    lines = source.count("\n")
    assert lines <= MAX_FILE_LINES, f"{lines} lines; split the file by meaning"
    assert long_functions(source) == []


@pytest.mark.parametrize("name", ["passes", "runtime"])
def test_top_level_links_point_at_the_packages(name):
    link = ROOT / name
    assert link.is_symlink() and link.readlink() == Path("fisedit", name)


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("fisedit.runtime.plan", "from fisedit.passes import ir", False),
        ("fisedit.runtime.plan", "def f():\n    import fisedit.api", False),
        ("fisedit.runtime.plan", "from ..passes.ir import Node", False),
        ("fisedit.runtime.plan", "from fisedit import api", False),
        ("fisedit.runtime.plan", "import torch\nfrom fisedit.errors import FISEditError\nfrom . import ops", True),
        ("fisedit.runtime.plan", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fisedit.api", True),
        ("fisedit.passes.ir", "from fisedit.api import compile", False),
        ("fisedit.passes.ir", "from fisedit.runtime import ops\nfrom fisedit.config import Options", True),
        ("fisedit.config", "from fisedit.runtime import ops", True),
        ("fisedit.config", "from fisedit.passes import ir", False),
        ("fisedit.runtime.plan", "from fisedit.config import Options", False),
        ("fisedit.errors", "from fisedit.runtime import ops", False),
        ("fisedit.api", "from fisedit.passes import ir\nfrom fisedit.runtime import plan", True),
        ("fisedit.runtime.kernels.gather.triton", "from fisedit.runtime.kernels.scatter import reference", False),
        ("fisedit.runtime.kernels.gather.triton", "from ..scatter.reference import scatter", False),
        ("fisedit.runtime.kernels.gather.triton", "from . import reference", True),
        ("fisedit.runtime.kernels.gather.triton", "from fisedit.runtime.kernels.launch import launch", True),
        ("fisedit.runtime.kernels.gather.triton", "from fisedit.runtime import ops", True),
    ],
)
def test_the_import_rules_tell_right_from_wrong(module, source, allowed):
    packages = {"fisedit", "fisedit.passes", "fisedit.runtime"}
    packages |= {f"{KERNELS}.{op}" for op in ("gather", "scatter")} | {KERNELS}
    modules = {
        "fisedit.api",
        "fisedit.config",
        "fisedit.errors",
        "fisedit.passes.ir",
        "fisedit.runtime.plan",
        "fisedit.runtime.ops",
    }
    modules |= SHARED | {f"{KERNELS}.{op}.{kind}" for op in ("gather", "scatter") for kind in ("reference", "triton")}
    sources = dict.fromkeys(packages | modules, "") | {module: source}
    assert (wrong_imports(import_graph(sources, packages)) == []) is allowed


def test_a_circle_is_seen():
    sources = {"fisedit.a": "from . import b", "fisedit.b": "def late():\n    from fisedit.a import x", "fisedit": ""}
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(sources, {"fisedit"})).prepare()


def test_a_long_function_is_seen():
    body = "    x = 1\n"
    assert long_functions("def fits():\n" + body * (MAX_FUNCTION_LINES - 1)) == []
    assert long_functions("def grows():\n" + body * MAX_FUNCTION_LINES) == ["grows, line 1: 61 lines"]
    kernel = "@triton.jit(do_not_specialize=['n'])\ndef _kernel():\n"
    assert long_functions(kernel + body * (MAX_KERNEL_LINES - 1)) == []
    assert long_functions(kernel + body * MAX_KERNEL_LINES) == ["_kernel, line 2: 161 lines"]
