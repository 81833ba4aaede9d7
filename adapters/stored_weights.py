"""Tensors of a base's checkpoint as its files have them, whatever type and form the model holds them in."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor


class StoredWeights:
    """The `.safetensors` files of one directory; `prefix` is what names of the model may have that the files lack."""

    def __init__(self, directory: Path, prefix: str = "") -> None:
        self._prefix = f"{prefix}."
        self._files: dict[str, Path] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def first_rows(self, name: str, shape: tuple[int, ...], num_rows: int) -> Tensor | None:
        """The first rows of the tensor that is `name` in the model; None if the files have none of that shape."""
        for key in (name, name.removeprefix(self._prefix)):
            if key in self._files:
                with safe_open(self._files[key], "pt") as file:
                    stored = file.get_slice(key)
                    if tuple(stored.get_shape()) == shape:
                        rows: Tensor = stored[:num_rows]
                        return rows
        return None
