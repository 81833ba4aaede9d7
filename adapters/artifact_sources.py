"""Where the artifacts of one kind come from: folders under the server's roots, and wherever a loaded one was found."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fusionserve.adapters.artifact_directory import (
    ArtifactDirectory,
    list_artifact_names,
    open_artifact_directory,
    open_directory,
)
from fusionserve.errors import NotFoundError
from fusionserve.limits import RESERVED_NAMES

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ArtifactSource:
    """Where a name's files are: `relative` under `root`, or `root` itself if the operator named it.

    Whatever comes from there on demand must have the `digest`, if the command to load it named one.
    """

    root: Path
    relative: str | None
    digest: str | None = None

    def open(self) -> ArtifactDirectory:
        """Opens the directory; the caller closes it. Raises what opening raises."""
        if self.relative is None:
            return open_directory(self.root)
        return open_artifact_directory(self.root, self.relative)


class ArtifactSources:
    """Remembers where loaded names came from, so that an evicted one can come back, and looks for the others.

    An artifact's directory has a `config_file`.
    """

    def __init__(self, roots: tuple[Path, ...], config_file: str) -> None:
        self._roots = roots
        self._config_file = config_file
        self._known: dict[str, ArtifactSource] = {}
        self._told: set[str] = set()  # reserved names that were logged

    def known(self, name: str) -> ArtifactSource | None:
        """Where the name was loaded from last."""
        return self._known.get(name)

    def remember(self, name: str, source: ArtifactSource) -> None:
        """Has the name come from there from now on."""
        self._known[name] = source

    def forget(self, name: str) -> None:
        """Has the name come from wherever it is found."""
        self._known.pop(name, None)

    def is_elsewhere(self, name: str) -> bool:
        """True if the name alone does not say what to load: it came from another folder, or with a digest."""
        source = self._known.get(name)
        return source is not None and (source.relative != name or source.digest is not None)

    def elsewhere(self) -> set[str]:
        """All names of which that is true."""
        return set(filter(self.is_elsewhere, self._known))

    def root_of(self, path: str) -> Path | None:
        """The first root with an artifact at the relative `path`, else the first with a directory there. Reads."""
        found = None
        for root in self._roots:
            with suppress(NotFoundError), open_artifact_directory(root, path) as directory:
                if directory.has_file(self._config_file):
                    return root
                found = found or root
        return found

    def names_on_disk(self) -> set[str]:
        """The names under the roots. Reads, and logs those that cannot be loaded because they are reserved, once."""
        names: set[str] = set()
        for root in self._roots:
            with suppress(NotFoundError):  # a root that was removed has none
                names.update(list_artifact_names(root, self._config_file))
        self._tell_of(names & RESERVED_NAMES)
        return names - RESERVED_NAMES

    def _tell_of(self, reserved: set[str]) -> None:
        for name in sorted(reserved - self._told):
            _log.warning("%s is a reserved name: what is in the folder of that name cannot be loaded", name)
        self._told |= reserved
