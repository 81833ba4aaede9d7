"""Gets the adapter pool's memory while the first requests run, and not when somebody waits for the first adapter.

It takes half a second, also of a small model's. Which modules have rank rows depends on the adapters, and those on disk
say so in the headers of their weights files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from fusionserve.adapters.artifact_directory import list_artifact_names, open_artifact_directory
from fusionserve.artifact_folders import ADAPTER_CONFIG
from fusionserve.engine.adapter_loader import AdapterLoader
from fusionserve.engine.memory_ahead import MemoryAhead, Piece
from fusionserve.errors import FusionServeError

_LOOKED_AT = 8  # adapters of a folder; most adapt what the others do


class PoolMemory(MemoryAhead):
    """The pool's rows for the modules that the adapters under `roots` change; a disk that hangs keeps its thread.

    On a GPU no folder is looked at, for the pool needs nothing ahead.
    """

    def __init__(self, roots: Sequence[Path], loader: AdapterLoader) -> None:
        super().__init__("adapter-pool-memory")
        self._roots = roots if loader.prepares_pool else ()
        self._loader = loader

    def _pieces(self) -> Iterator[Piece]:
        """A module each, some of them more than once."""
        for root in self._roots:
            for name in _names(root):
                for path in self._paths_of(root, name):
                    yield partial(self._prepare, path)

    def _prepare(self, path: str) -> bool:
        try:
            self._loader.prepare([path])
        except MemoryError:  # the first load says so
            return False
        return True

    def _paths_of(self, root: Path, name: str) -> Collection[str]:
        """None for what cannot be loaded: a request for it is told why."""
        with suppress(FusionServeError), open_artifact_directory(root, name) as directory:
            return self._loader.adapted_modules(directory)
        return ()


def _names(root: Path) -> Sequence[str]:
    with suppress(FusionServeError):
        return list_artifact_names(root, ADAPTER_CONFIG)[:_LOOKED_AT]
    return ()
