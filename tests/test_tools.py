"""The tools as commands, judged by their source: some take seconds to import."""

import ast
from pathlib import Path

import pytest

TOOLS = sorted((Path(__file__).parent.parent / "tools").glob("*.py"))


def calls(node: ast.AST) -> set[str]:
    """The last names of all that is called in it."""
    functions = (each.func for each in ast.walk(node) if isinstance(each, ast.Call))
    return {each.attr if isinstance(each, ast.Attribute) else getattr(each, "id", "") for each in functions}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_tool_looks_at_its_arguments_before_it_works(tool: Path) -> None:
    """So that --help and a misspelt option do not start a benchmark."""
    body = ast.parse(tool.read_text()).body
    (main,) = (each for each in body if isinstance(each, ast.FunctionDef) and each.name == "main")
    first = main.body[1]  # behind the docstring
    assert "ArgumentParser" in calls(first)
    assert "parse_args" in calls(main)
