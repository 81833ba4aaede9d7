"""Folders of adapters for a store: what stands for an adapter is a file that says its rank."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from loose_adapters import FIRST, make_content, make_lora

from fusionserve.adapters.adapter import Adapter, AdapterContent
from fusionserve.adapters.artifact_directory import ArtifactDirectory
from fusionserve.artifact_folders import ADAPTER_CONFIG
from fusionserve.errors import ArtifactError

SIZE = make_content({FIRST: make_lora(1, seed=1)}).nbytes


class Disk:
    """Two roots, and a reader of theirs that can be held up; the rank of an adapter is what its file says."""

    def __init__(self, path: Path) -> None:
        self.roots = (path / "one", path / "two")
        for root in self.roots:
            root.mkdir()
        self.num_reads = 0
        self.num_reading = 0
        self.most_reading = 0
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    def write(self, name: str, text: str = "1", *, root: int = 0) -> None:
        directory = self.roots[root] / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ADAPTER_CONFIG).write_text(text)

    def load_content(self, directory: ArtifactDirectory) -> AdapterContent:
        with directory.open_file(ADAPTER_CONFIG, missing_reason="CONFIG_MISSING") as file:
            text = file.read().decode()
        with self._lock:
            self.num_reads += 1
            self.num_reading += 1
            self.most_reading = max(self.most_reading, self.num_reading)
        assert self.gate.wait(20)
        with self._lock:
            self.num_reading -= 1
        if not text.isdigit():
            raise ArtifactError("it is broken", reason="CONFIG_INVALID")
        return make_content({FIRST: make_lora(int(text), seed=int(text))}, digest=digest_of(text))


def digest_of(text: str) -> str:
    """What stands in for the digest of an adapter whose file says so."""
    return hashlib.sha256(text.encode()).hexdigest()


def forget(_: Adapter) -> None:
    """What the pool does is tested elsewhere."""
