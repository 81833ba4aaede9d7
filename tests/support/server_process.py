"""`fusionserve serve` in a process of its own, as operators run it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fusionserve.failpoints import VARIABLE

FUSIONSERVE = str(Path(sys.executable).with_name("fusionserve"))
LOOPBACK = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")

RENDERED_ANEW_S = 0.3  # so old the metrics may be
PYTHON_BLOCK_BYTES = 64  # about, on average

# glibc keeps freed memory by the MiB, in as many heaps as threads; with these, in one.
TIGHT_HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass
class ServerProcess:
    """A server that has said it is ready; `log` is its standard error once it has ended."""

    process: subprocess.Popen[str]
    grpc: str
    metrics: str
    log_file: IO[str]
    log: str = field(default="")

    def scrape(self) -> dict[str, float]:
        """The samples of /metrics by name with labels."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def private_bytes(self) -> int:
        """Its own memory: of a file's pages, which it shares with whoever else has them mapped, nothing is counted."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
        assert match is not None
        return int(match[1]) << 10

    def held_bytes(self) -> int:
        """What it has allocated and not freed, in C and Python: what leaks grows here, fragments of the heap do not."""
        time.sleep(RENDERED_ANEW_S)
        samples = self.scrape()
        blocks = samples["fusionserve_python_blocks_used"] * PYTHON_BLOCK_BYTES
        return int(samples["fusionserve_heap_used_bytes"] + blocks)

    def terminate(self) -> None:
        """Asks it to stop."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, within_s: float = 30.0) -> int:
        """Its exit code, once it has ended; `log` is complete then."""
        code = self.process.wait(within_s)
        self.log = _read(self.log_file)
        return code


@contextmanager
def server_process(
    *arguments: str, failpoints: str = "", heap: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """Serves the embedded model in float32 on free ports; killed at the end unless it has ended by itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUSIONSERVE_")}
    command = [FUSIONSERVE, "serve", "--dtype", "float32", *LOOPBACK, *arguments]
    # Not a pipe: nobody reads it while the server runs, and a full one would stop it.
    with tempfile.TemporaryFile("w+") as log_file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
            env=environment | {VARIABLE: failpoints} | dict(heap or {}),
        )
        try:
            assert process.stdout is not None
            match = re.fullmatch(r"ready grpc=(\S+) metrics=(\S+)\n", process.stdout.readline())
            assert match is not None, _read(log_file)
            yield ServerProcess(process, match[1], match[2], log_file)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _read(log_file: IO[str]) -> str:
    log_file.seek(0)
    return log_file.read()
