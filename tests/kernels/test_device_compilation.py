"""The compiler for GPUs takes all kernels, and a GPU has the memory; the interpreter also takes what these refuse."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

from fusionserve.kernels import device

SCRIPT = Path(__file__).parent.parent / "support" / "compile_device_kernels.py"


def kernel_names() -> set[str]:
    """Of all kernels in the package."""
    files = Path(device.__path__[0]).glob("*_kernels.py")
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name.endswith("_kernel")}


def test_every_kernel_compiles_for_a_hopper_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-P", str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, *_ in lines} == kernel_names()
    assert all(int(variants) > 0 for _, variants, _ in lines)
