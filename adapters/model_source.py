"""Where the base model's files are: a directory as it stands, or a model hub's copy of an id."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from fusionserve.errors import StartupError

_WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # no pickles, no code


def find_model(model: str) -> Path:
    """The directory `model`, or the local copy of the hub id `model`, downloaded if need be.

    Without a network an earlier download is used. Raises StartupError if there is neither.
    """
    if Path(model).exists():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=list(_WANTED_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise StartupError(
            f"cannot load model {model}: there is no such directory, and no model hub could provide it "
            "(unknown id, or no network)",
            reason="MODEL_NOT_FOUND",
        ) from error
