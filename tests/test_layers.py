"""Who may import whom: the table of docs/architecture.md, checked on every import statement."""

import ast
import graphlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = "fusionserve"
# A dotted entry is a subpackage with rules of its own: the command line is a client, the servicers are not.
MAY_IMPORT = {
    "": set(),
    "v1": set(),
    "kernels": {""},
    "adapters": {"", "kernels"},
    "fusion": {"", "kernels", "adapters"},
    "engine": {"", "kernels", "adapters", "fusion"},
    "server": {"", "engine", "v1"},
    "server.commands": {"", "engine", "v1", "server", "client"},
    "training": {"", "kernels", "adapters", "fusion"},
    "client": {"v1"},
    "loadtest": {"", "client", "v1"},
    "loadtest.bench.drivers": {"", "engine", "client", "v1", "loadtest"},
    "loadtest.gpu": {
        "",
        "kernels",
        "adapters",
        "engine",
        "client",
        "v1",
        "loadtest",
        "loadtest.bench.drivers",
    },
}
# Layers that must work without the heavy packages name everything else they may import.
THIRD_PARTY = {
    "": {"prometheus_client"},
    "client": {"google", "grpc", "grpc_status"},
    "server": {"google", "prometheus_client"}
    | {"grpc", "grpc_channelz", "grpc_health", "grpc_reflection", "grpc_status"},
    "server.commands": {"grpc"},
}


def modules() -> dict[str, Path]:
    """Every module of ours, by its import name without the leading `fusionserve`."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    found = {}
    for package, folder in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((*package.split("."), *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def layer(module: str) -> str:
    """The longest entry of the table that `module` lies in; "" is the root package."""
    inside = module.removeprefix(OURS).removeprefix(".")
    return max((name for name in MAY_IMPORT if f"{inside}.".startswith(f"{name}.")), key=len, default="")


def imports(module: str) -> Iterator[str]:
    """The modules named by the import statements of `module`; the name imported may be a module itself."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_stay_within_the_layer_table(module: str) -> None:
    own = layer(module)
    for name in imports(module):
        top = name.partition(".")[0]
        if top == OURS:
            assert layer(name) in MAY_IMPORT[own] | {own}, f"{module} imports {name}"
        elif own in THIRD_PARTY and top not in sys.stdlib_module_names:
            assert top in THIRD_PARTY[own], f"{module} imports {name}"


def test_imports_have_no_cycle() -> None:
    graph = {module: {name for name in imports(module) if name in MODULES} - {module} for module in MODULES}
    assert any(graph.values())
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)
