"""A written directory appears as a whole, readable by others, or not at all."""

from pathlib import Path

import pytest

from fusionserve.training.atomic_directory import atomic_directory


def test_it_appears_at_the_end_and_is_readable(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "new" / "out") as staging:
        (staging / "file").write_text("1")
        (staging / "file").chmod(0o600)
        assert not (tmp_path / "new" / "out").exists()
    assert (tmp_path / "new" / "out" / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "new" / "out").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_what_was_there_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("0")
    with atomic_directory(tmp_path / "out") as staging:
        (staging / "new").write_text("1")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_name_that_cannot_be_had_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("0")
    rename = Path.rename

    def second_fails(path: Path, target: Path) -> Path:
        if target.name == "out" and not path.name.endswith(".old"):
            raise OSError("no room for a name")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="no room"), atomic_directory(tmp_path / "out") as staging:
        (staging / "new").write_text("1")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("0")
    with pytest.raises(OSError, match="full"), atomic_directory(tmp_path / "out") as staging:
        (staging / "new").write_text("1")
        raise OSError("disk full")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
