"""What makes two runs the same run, and how a run is told about without naming places on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from fusionserve.training_config import DataConfig, OptimizationConfig, TrainingRun

# How and where a run is carried out, not what it comes to.
_CIRCUMSTANCES = frozenset(
    (
        "out",
        "work_dir",
        "resume",
        "keep_checkpoints",
        "show_progress",
        "model",
        "data",
        "optimization",
        "notes",
    )
)


def describe_run(run: TrainingRun) -> dict[str, object]:
    """The settings that decide the result; of paths only the last part."""
    described: dict[str, object] = {}
    for part in (run, run.data, run.optimization):
        described |= _describe(part)
    return described


def identify_run(
    run: TrainingRun, data_digest: str, base_fingerprint: str, member_digests: Sequence[str]
) -> str:
    """A digest that differs for runs that differ in settings, data, base or, of a fusion, members."""
    text = json.dumps([describe_run(run), data_digest, base_fingerprint, *member_digests], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _describe(part: TrainingRun | DataConfig | OptimizationConfig) -> dict[str, object]:
    names = [field.name for field in fields(part) if field.name not in _CIRCUMSTANCES]
    described = {name: _without_folders(getattr(part, name)) for name in names}
    if "template" in described:  # a word or a file
        described["template"] = Path(str(described["template"])).name
    return described


def _without_folders(value: object) -> object:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, tuple):
        return [_without_folders(item) for item in value]
    return value
