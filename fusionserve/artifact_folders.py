"""Folders of adapters and of fusions: each artifact is a folder of its name, with its configuration in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

ADAPTER_CONFIG, FUSION_CONFIG = "adapter_config.json", "fusion_config.json"


def find_by_name(name: str, folders: Iterable[Path], config_file: str) -> Path | None:
    """The artifact of that name in the first folder that has one; `name` must be checked, it becomes a path."""
    return next((folder / name for folder in folders if (folder / name / config_file).is_file()), None)
