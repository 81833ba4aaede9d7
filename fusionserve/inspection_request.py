"""What `fusionserve fusion inspect` asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionRequest:
    """Texts to show to a fusion on disk, and where its base, its members and the picture are."""

    fusion: Path  # its directory
    prompts: tuple[str, ...]
    members: tuple[tuple[str, Path], ...] = ()  # names and directories of adapters
    adapter_dirs: tuple[Path, ...] = ()  # where the other members are, by name; the first that has one wins
    model: str | None = None  # a folder or a hub id; None: the embedded base
    dtype: str = "auto"  # of the base weights: the checkpoint's, bfloat16 for one in float16
    allow_base_mismatch: bool = False  # of the members
    out: Path | None = None  # the picture; None: no picture
    as_json: bool = False
