"""`fusionserve version`."""

from __future__ import annotations

import platform
from importlib import metadata

from fusionserve import __version__
from fusionserve.server.settings import CommandParser

SHOWN = ("grpcio", "protobuf", "torch", "transformers", "safetensors")


def main(argv: list[str]) -> int:
    """Prints the versions that a bug report needs, from package metadata: nothing big is imported."""
    CommandParser(prog="fusionserve version", description="Print versions.").parse_args(argv)
    print(f"fusionserve {__version__}")
    print(f"python {platform.python_version()}")
    for package in SHOWN:
        print(f"{package} {_version(package)}")
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
