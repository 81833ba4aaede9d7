"""The size limits of CONTRIBUTING.md, measured on the product's own code."""

import ast
import statistics
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
GENERATED = ROOT / "proto"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_MEDIAN_LINES = 8
MAX_P90_LINES = 25

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> list[Path]:
    """Every hand-written file of the packages and tools."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = (*setuptools["package-dir"].values(), "tools", "examples", "loadtest")
    roots = {ROOT / folder for folder in folders}
    return sorted(path for root in roots for path in root.rglob("*.py") if not path.is_relative_to(GENERATED))


def functions() -> dict[str, Function]:
    """Every function, keyed by where it stands."""
    return {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, Function)
    }


def num_lines(function: Function) -> int:
    """Lines from `def` to the end, without the docstring: explaining more must not cost code."""
    first = function.body[0]
    is_documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if is_documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def is_annotated(function: Function) -> bool:
    """True if every parameter but self and cls, and the result, has a type."""
    spec = function.args
    parameters = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
    untyped = {arg.arg for arg in parameters if arg is not None and arg.annotation is None}
    return function.returns is not None and untyped <= {"self", "cls"}


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    lengths = {name: num_lines(function) for name, function in functions().items()}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}
    assert statistics.median(lengths.values()) <= MAX_MEDIAN_LINES
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= MAX_P90_LINES


def test_functions_are_annotated() -> None:
    assert [name for name, function in functions().items() if not is_annotated(function)] == []
