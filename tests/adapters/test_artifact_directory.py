"""Names and links that try to leave the root, and entries that are no files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lora_files import write_adapter

from fusionserve.adapters.artifact_directory import (
    list_artifact_names,
    open_artifact_directory,
    open_directory,
)
from fusionserve.errors import ArtifactError, FusionServeError, NotFoundError, UnavailableError


def reason_of(root: Path, name: str) -> str:
    with pytest.raises(FusionServeError) as refusal:
        open_artifact_directory(root, name)
    assert str(root) not in refusal.value.message
    return refusal.value.reason


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with `good` and `team/good`, and a directory outside of it."""
    write_adapter(tmp_path / "root" / "good")
    write_adapter(tmp_path / "root" / "team" / "good")
    write_adapter(tmp_path / "outside")
    return tmp_path / "root"


@pytest.mark.parametrize("name", ["good", "team/good"])
def test_directory_under_the_root_opens(name: str, root: Path) -> None:
    with open_artifact_directory(root, name) as directory:
        assert directory.has_file("adapter_config.json")
        assert not directory.has_file("adapter_model.bin")
        with directory.open_file("adapter_config.json", missing_reason="CONFIG_MISSING") as file:
            assert b"LORA" in file.read()


ESCAPES = [
    "../outside",
    "good/../../outside",
    "..",
    ".",
    "",
    "/",
    "/etc",
    "good/",
    "./good",
    "a\0b",
    "a\\..\\b",
]


@pytest.mark.parametrize("name", [*ESCAPES, "a\nb", "\ud800"])
def test_path_that_leaves_the_root_is_an_escape(name: str, root: Path) -> None:
    assert reason_of(root, name) == "ADAPTER_PATH_ESCAPE"


@pytest.mark.parametrize(
    "name", ["missing", "~", "%2e%2e", "good/missing", "x" * 300, "good/adapter_config.json"]
)
def test_missing_directory_is_not_found(name: str, root: Path) -> None:
    assert reason_of(root, name) == "ADAPTER_NOT_FOUND"


@pytest.mark.parametrize("target", ["../outside", "good", "nowhere", "linked"])
def test_linked_directory_is_an_escape(target: str, root: Path) -> None:
    (root / "linked").symlink_to(target)
    assert reason_of(root, "linked") == "ADAPTER_PATH_ESCAPE"
    assert reason_of(root, "linked/good") == "ADAPTER_PATH_ESCAPE"


def test_root_itself_may_be_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    with open_artifact_directory(link, "good") as directory:
        assert directory.has_file("adapter_config.json")


def test_swapped_directory_stays_the_one_that_was_opened(root: Path) -> None:
    outside = root.parent / "outside"
    (outside / "adapter_config.json").write_text("of another")
    (outside / "adapter_model.bin").write_text("of another")
    expected = (root / "good" / "adapter_config.json").read_bytes()
    with open_artifact_directory(root, "good") as directory:
        (root / "good").rename(root / "moved")
        (root / "good").symlink_to(outside)
        with directory.open_file("adapter_config.json", missing_reason="CONFIG_MISSING") as file:
            assert file.read() == expected
        assert not directory.has_file("adapter_model.bin")


def make_link(path: Path) -> None:
    path.symlink_to("adapter_config.json")


def make_dangling_link(path: Path) -> None:
    path.symlink_to("/nowhere")


NOT_FILES = {
    "fifo": (os.mkfifo, "NOT_A_REGULAR_FILE"),
    "directory": (Path.mkdir, "NOT_A_REGULAR_FILE"),
    "link": (make_link, "ADAPTER_PATH_ESCAPE"),
    "dangling_link": (make_dangling_link, "ADAPTER_PATH_ESCAPE"),
    "nothing": (lambda path: None, "WEIGHTS_MISSING"),
}


@pytest.mark.parametrize(("make", "reason"), NOT_FILES.values(), ids=NOT_FILES)
@pytest.mark.timeout(10)
def test_what_is_no_file_is_refused_at_once(make: object, reason: str, root: Path) -> None:
    assert callable(make)
    make(root / "good" / "weights")
    with open_artifact_directory(root, "good") as directory, pytest.raises(ArtifactError) as refusal:
        directory.open_file("weights", missing_reason="WEIGHTS_MISSING")
    assert refusal.value.reason == reason


def test_failing_storage_is_unavailable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> int:
        raise OSError(5, "Input/output error", "/secret/path")

    with open_artifact_directory(root, "good") as directory:
        monkeypatch.setattr(os, "open", fail)
        with pytest.raises(UnavailableError) as refusal:
            directory.open_file("adapter_config.json", missing_reason="CONFIG_MISSING")
    assert "secret" not in refusal.value.message


def test_unreadable_file_is_refused_without_its_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied", "/secret/path")

    with open_artifact_directory(root, "good") as directory:
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(ArtifactError) as refusal:
            directory.open_file("adapter_config.json", missing_reason="CONFIG_MISSING")
    assert (refusal.value.reason, "secret" in refusal.value.message) == ("PERMISSION_DENIED", False)


def test_adapters_are_listed_by_name(root: Path) -> None:
    write_adapter(root / "Upper")
    write_adapter(root / "b.1")
    (root / "no-config").mkdir()
    (root / "file").write_text("")
    (root / "linked").symlink_to("good")
    (root / "linked-config").mkdir()
    (root / "linked-config" / "adapter_config.json").symlink_to("../good/adapter_config.json")
    assert list_artifact_names(root, "adapter_config.json") == ("b.1", "good")


def test_missing_root_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        list_artifact_names(tmp_path / "gone", "adapter_config.json")
    with pytest.raises(NotFoundError):
        open_directory(tmp_path / "gone")


def test_opening_leaves_no_descriptor_behind(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for name in ("team/good", "team/missing", "../x", "good/adapter_config.json"):
        try:
            open_artifact_directory(root, name).close()
        except FusionServeError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before
