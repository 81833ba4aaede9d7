"""Runs the parts one after the other, and writes what they find as it comes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from fusionserve.loadtest.gpu.figures import Failure
from fusionserve.loadtest.gpu.part_process import PartProcess
from fusionserve.loadtest.gpu.parts import PARTS
from fusionserve.loadtest.gpu.report import GpuFigures, to_table

_LEAST_S = 15.0  # that a part needs to come to its first figure


class GpuRun:
    """Begins no part that would not come to anything before `end_s`, by `time.monotonic`, and lets none go on then.

    `command` starts a part's process once the part and when it must end are appended.
    """

    def __init__(self, figures: GpuFigures, command: Sequence[str], out: Path, end_s: float) -> None:
        self._figures, self._command, self._out, self._end_s = figures, command, out, end_s

    def measure(self, parts: Collection[str]) -> None:
        """The device's limits and these parts; adapters are written while single kernels are measured."""
        self._collect(self._start("device"))
        if self._figures.device is None:
            return
        wanted = {name: part for name, part in PARTS.items() if name in parts}
        files = self._start("files") if any(part.needs_files for part in wanted.values()) else None
        for name, part in wanted.items():
            if name in ("device", "files") or (part.needs_gpu and self._figures.device.type != "cuda"):
                continue
            if not part.needs_gpu:
                self._collect(files)
                files = None
            self._collect(self._start(name))

    def _start(self, name: str) -> PartProcess | None:
        now_s = time.monotonic()
        left_s = min(PARTS[name].most_s, self._end_s - now_s)
        if left_s < _LEAST_S:
            self._figures.add(Failure(part=name, case="", error="left out, there was no time"))
            self._write()
            return None
        print(f"{name}: at most {left_s:.0f} s", file=sys.stderr, flush=True)
        end_s = now_s + left_s
        return PartProcess(name, [*self._command, "--part", name, "--end", f"{end_s}"], end_s)

    def _collect(self, process: PartProcess | None) -> None:
        for figure in process.figures() if process else ():
            self._figures.add(figure)
            self._write()

    def _write(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        (self._out / "gpu.md").write_text(to_table(self._figures) + "\n")
        (self._out / "gpu.json").write_text(json.dumps(self._figures.to_json(), indent=1))
