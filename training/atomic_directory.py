"""Writing a directory so that a reader finds all of it or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """An empty directory to write in, which becomes `directory` at the end of the block; an error leaves the old one.

    Everything in it is on disk before it appears under its name. A directory that is there already is replaced.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield staging
        _let_all_read(staging)
        sync_tree(staging)
        _publish(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """Returns once every file and folder below `directory` is on disk."""
    for path in (*directory.rglob("*"), directory):
        _sync(path)


def _let_all_read(staging: Path) -> None:
    """A temporary directory is the owner's alone, and so are files that some libraries write."""
    staging.chmod(0o755)
    for path in staging.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _publish(staging: Path, directory: Path) -> None:
    """Renames; what stood there goes aside first, since no rename replaces a full directory."""
    aside = staging.with_name(f"{staging.name}.old")
    had_old = directory.exists()
    if had_old:
        directory.rename(aside)
    try:
        staging.rename(directory)
    except OSError:
        if had_old:
            with suppress(OSError):  # somebody else has the name now; the old one stays aside
                aside.rename(directory)
        raise
    _sync(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
