"""Tensors of a base's checkpoint as its files have them, whatever type and form the model holds them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


class StoredWeights:
    """The files that transformers reads in a directory, which may have others beside them.

    `prefix` is what names of the model may have that the files lack.
    """

    def __init__(self, directory: Path, prefix: str = "") -> None:
        self._prefix = f"{prefix}."
        self._files: dict[str, Any] = {}  # opened, by the tensor
        for path in _files_in(directory):
            file: Any = safe_open(path, "pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def dtypes(self) -> dict[str, str]:
        """What the files' headers call the type of each of their tensors, such as `BF16`."""
        return {name: file.get_slice(name).get_dtype() for name, file in self._files.items()}

    def first_rows(self, name: str, shape: tuple[int, ...], num_rows: int) -> Tensor | None:
        """The first rows of the tensor that is `name` in the model; None if the files have none of that shape."""
        for key in (name, name.removeprefix(self._prefix)):
            if key in self._files:
                stored = self._files[key].get_slice(key)
                if tuple(stored.get_shape()) == shape:
                    rows: Tensor = stored[:num_rows]
                    return rows
        return None


def _files_in(directory: Path) -> list[Path]:
    """One file of all weights, or those that an index names."""
    if (directory / SAFE_WEIGHTS_NAME).is_file():
        return [directory / SAFE_WEIGHTS_NAME]
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return []
    return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
