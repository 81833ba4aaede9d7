"""The parts of an example."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is encoded on its own, as at serving, where a prompt's tokens never join with the answer's."""

    text: str
    is_learned: bool
