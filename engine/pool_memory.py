"""Gets the adapter pool's memory while the first requests run, and not when somebody waits for the first adapter.

It takes half a second, also of a small model's. Which modules have rank rows depends on the adapters, and those on disk
say so in the headers of their weights files.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from fusionserve.adapters.artifact_directory import list_artifact_names, open_artifact_directory
from fusionserve.artifact_folders import ADAPTER_CONFIG
from fusionserve.engine.adapter_loader import AdapterLoader
from fusionserve.errors import FusionServeError
from fusionserve.kernels.threads import borrowed_core

_LOOKED_AT = 8  # adapters of a folder; most adapt what the others do
_BORROWED_S = 0.02  # at most, for the rows of a module


class PoolMemory:
    """The pool's rows for the modules that the adapters under `roots` change. On a GPU the pool needs none ahead."""

    def __init__(self, roots: Sequence[Path], loader: AdapterLoader) -> None:
        self._roots = roots
        self._loader = loader
        self._is_stopped = threading.Event()

    def get_soon(self) -> None:
        """Begins on a thread of its own, which a disk that hangs may keep for ever."""
        threading.Thread(target=self._get, name="adapter-pool-memory", daemon=True).start()

    def stop(self) -> None:
        """Has the thread end with the module at hand."""
        self._is_stopped.set()

    def _get(self) -> None:
        with suppress(MemoryError):  # then the first load says so
            for path in self._paths():
                if self._is_stopped.is_set():
                    return
                with borrowed_core(_BORROWED_S):
                    self._loader.prepare([path])

    def _paths(self) -> Iterator[str]:
        """Module paths, some of them more than once."""
        for root in self._roots:
            for name in _names(root):
                yield from self._paths_of(root, name)

    def _paths_of(self, root: Path, name: str) -> Collection[str]:
        """None for what cannot be loaded: a request for it is told why."""
        with suppress(FusionServeError), open_artifact_directory(root, name) as directory:
            return self._loader.adapted_modules(directory)
        return ()


def _names(root: Path) -> Sequence[str]:
    with suppress(FusionServeError):
        return list_artifact_names(root, ADAPTER_CONFIG)[:_LOOKED_AT]
    return ()
