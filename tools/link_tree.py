"""Makes `.typing/fusionserve`, the import namespace as links, for type checkers that cannot follow import hooks."""

import argparse
import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Leaves exactly one link per mapped folder and per entry of the root package."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    tree = ROOT / ".typing" / "fusionserve"
    tree.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (ROOT / "fusionserve").iterdir() if path.name != "__pycache__"}
    wanted |= {name.partition(".")[2]: ROOT / folder for name, folder in folders.items() if "." in name}
    for stale in {path.name for path in tree.iterdir()} - wanted.keys():
        (tree / stale).unlink()
    for name, path in wanted.items():
        if not (tree / name).is_symlink():
            (tree / name).symlink_to(os.path.relpath(path, tree))


main()
