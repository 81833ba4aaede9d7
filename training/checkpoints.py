"""Checkpoints of a run: which are complete, and whether they belong to the run that wants to go on from them.

A checkpoint counts once its marker is there, which is written last; a kill in the middle leaves none.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

from fusionserve.errors import TrainingError
from fusionserve.training.atomic_directory import sync_tree

_MARKER = "complete.json"
_RUN_FILE = "run.json"
_PREFIX = "checkpoint-"


def mark_complete(checkpoint: Path, seconds: float) -> None:
    """Says that all of `checkpoint` is on disk, after `seconds` of training."""
    sync_tree(checkpoint)
    (checkpoint / _MARKER).write_text(json.dumps({"seconds": round(seconds, 3)}))
    sync_tree(checkpoint)


def remove_older(work_dir: Path, best: Path | None) -> None:
    """Leaves two complete checkpoints, the newest and the best or the one before; what goes no longer counts first."""
    complete = [path for path in _checkpoints_in(work_dir) if (path / _MARKER).is_file()]
    if len(complete) < 3:
        return
    kept = complete[-1], best if best in complete[:-1] else complete[-2]
    for path in complete:
        if path not in kept:
            (path / _MARKER).unlink()
            shutil.rmtree(path)


def seconds_until(checkpoint: Path) -> float:
    """How long the run had trained before `checkpoint`."""
    seconds: float = json.loads((checkpoint / _MARKER).read_text())["seconds"]
    return seconds


def prepare_work_dir(work_dir: Path, identity: str, *, resume: bool) -> Path | None:
    """Makes the folder ready for a run of this identity; returns the checkpoint to go on from, if there is one.

    Raises TrainingError if checkpoints are there and it is not to resume, or they are of another run.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    checkpoints = _checkpoints_in(work_dir)
    if checkpoints and not (work_dir / _RUN_FILE).is_file():
        raise TrainingError(f"{work_dir} has checkpoints of another program: choose another --work-dir")
    complete = [path for path in checkpoints if (path / _MARKER).is_file()]
    if complete and not resume:
        raise TrainingError(f"{work_dir} has checkpoints: go on with --resume, or remove it to begin anew")
    if complete and _identity_in(work_dir) != identity:
        raise TrainingError(
            f"{work_dir} is of a run with other settings, data or members: remove it, or resume with the same"
        )
    for path in checkpoints:
        if path not in complete:
            shutil.rmtree(path)
    (work_dir / _RUN_FILE).write_text(json.dumps({"identity": identity}))
    return complete[-1] if complete else None


def remove_work_dir(work_dir: Path) -> None:
    """Removes the checkpoints, and the folder if nothing else is in it."""
    for path in _checkpoints_in(work_dir):
        shutil.rmtree(path)
    (work_dir / _RUN_FILE).unlink(missing_ok=True)
    with suppress(OSError):
        work_dir.rmdir()


def _checkpoints_in(work_dir: Path) -> list[Path]:
    return sorted((path for path in work_dir.glob(f"{_PREFIX}*") if path.is_dir()), key=_step_of)


def _identity_in(work_dir: Path) -> str:
    try:
        identity: str = json.loads((work_dir / _RUN_FILE).read_text())["identity"]
    except (OSError, ValueError, KeyError):
        return ""
    return identity


def _step_of(checkpoint: Path) -> int:
    digits = checkpoint.name.removeprefix(_PREFIX)
    return int(digits) if digits.isdigit() else -1
