"""Checks that the generated code next to the .proto files is what the pinned generator makes of them.

Usage: python -P tools/verify_proto.py [--write]; with --write the code is regenerated in place.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "proto"
PACKAGE = Path("fusionserve/v1")


def main() -> int:
    """Returns 0 if the code is fresh, or was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="regenerate in place")
    if parser.parse_args().write:
        generate(SOURCE)
        return 0
    return verify()


def verify() -> int:
    """Returns 0 if every generated file is what generation gives now, else names the others and returns 1."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = _generated(Path(folder))
    checked_in = _generated(SOURCE)
    stale = sorted(
        name for name in fresh.keys() | checked_in.keys() if fresh.get(name) != checked_in.get(name)
    )
    for name in stale:
        print(f"stale: proto/{PACKAGE}/{name} (run: make proto)", file=sys.stderr)
    return 1 if stale else 0


def generate(out: Path) -> None:
    """Writes messages, services and their type stubs below `out`."""
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python", "mypy_grpc")]
    protos = sorted(str(path) for path in (SOURCE / PACKAGE).glob("*.proto"))
    command = [sys.executable, "-P", "-m", "grpc_tools.protoc", f"-I{SOURCE}", *outputs, *protos]
    # The protoc-gen-mypy_grpc plug-in lies beside the interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    subprocess.run(command, check=True, env={**os.environ, "PATH": path})


def _generated(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (out / PACKAGE).glob("*_pb2*.py*")}


if __name__ == "__main__":
    sys.exit(main())
