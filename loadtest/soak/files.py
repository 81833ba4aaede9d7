"""The adapters of a soak: those of the embedded model, each under two names."""

from __future__ import annotations

import shutil
from pathlib import Path

from fusionserve.config import EMBEDDED_ADAPTERS
from fusionserve.loadtest.soak.requests import ADAPTERS, COPIES


def copy_adapters(folder: Path) -> Path:
    """Fills `folder` with them and returns it."""
    for name, copy in zip(ADAPTERS, COPIES, strict=True):
        shutil.copytree(EMBEDDED_ADAPTERS / name, folder / name)
        shutil.copytree(EMBEDDED_ADAPTERS / name, folder / copy)
    return folder
