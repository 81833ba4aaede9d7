"""A file that changes is in force as soon as it can be used, whatever kept it from that."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fusionserve.errors import StartupError
from fusionserve.server.watched_file import WatchedFiles


@pytest.fixture(autouse=True)
def look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionserve.server.watched_file._LOOK_EVERY_S", 0.0)


class Readable:
    """A file with a text that can be read while nothing is wrong with its storage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_failing = False
        self.num_reads = 0
        path.write_text("old")

    def read(self) -> str:
        self.num_reads += 1
        if self.is_failing:
            raise StartupError("it cannot be read", reason="TOKENS_INVALID")
        return self.path.read_text()


@pytest.fixture
def file(tmp_path: Path) -> Readable:
    return Readable(tmp_path / "tokens.toml")


def test_file_is_read_again_until_that_works(file: Readable, caplog: pytest.LogCaptureFixture) -> None:
    watched = WatchedFiles((file.path,), file.read)
    file.is_failing = True
    file.path.write_text("new text")
    for _ in range(3):
        assert watched.current() == "old"
    assert caplog.text.count("cannot be used") == 1, "each version is told of once"
    file.is_failing = False
    assert watched.current() == "new text"


def test_file_in_force_is_not_read_again(file: Readable) -> None:
    watched = WatchedFiles((file.path,), file.read)
    for _ in range(3):
        assert watched.current() == "old"
    assert file.num_reads == 1


def _change_mode(path: Path) -> None:
    path.chmod(0o600)


def _write_in_place(path: Path) -> None:
    """With the size and the time of modification that it had."""
    before = path.stat()
    path.write_text("new")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [_change_mode, _write_in_place])
def test_any_change_is_looked_at(file: Readable, change: Callable[[Path], None]) -> None:
    watched = WatchedFiles((file.path,), file.read)
    change(file.path)
    assert watched.current() == file.path.read_text()
    assert file.num_reads == 2
