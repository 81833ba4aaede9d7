"""Writing a fusion's directory so that a reader finds all of it or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save

from fusionserve.artifact_folders import FUSION_CONFIG
from fusionserve.fusion.config import FusionConfig
from fusionserve.fusion.params import FusionParams

WEIGHTS_FILE = "fusion_model.safetensors"


def save_fusion(directory: Path, config: FusionConfig, params: FusionParams) -> None:
    """Writes `directory` with both files; a fusion that is there already is replaced as a whole.

    The files are complete on disk before they appear under their name; a crash leaves the old directory, or none.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        tensors = {
            name: tensor.detach().to(torch.float32).contiguous() for name, tensor in params.named_tensors()
        }
        _write(staging / FUSION_CONFIG, config.to_json().encode())
        _write(staging / WEIGHTS_FILE, save(tensors, {"format": "pt"}))
        staging.chmod(0o755)  # a temporary directory is the owner's alone
        _publish(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _publish(staging: Path, directory: Path) -> None:
    """Renames `staging` to `directory`; what stood there goes aside first: no rename replaces a full directory."""
    aside = staging.with_name(f"{staging.name}.old")
    if directory.exists():
        directory.rename(aside)
    staging.rename(directory)
    shutil.rmtree(aside, ignore_errors=True)
