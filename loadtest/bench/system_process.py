"""A system's process as the runner sees it: started, asked, ended; whatever goes wrong is one error with a reason."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from fusionserve.loadtest.bench.protocol import Job, Outcome, Setup

_START_TIMEOUT_S = 600.0  # vLLM compiles its model
_ROUND_TIMEOUT_S = 900.0
_STOP_TIMEOUT_S = 60.0


def inherited_variables() -> dict[str, str]:
    """The environment without what tells OpenMP how to wait, and where: each system has its own, or its default."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_", "GOMP_"))
    }


class SystemFailedError(Exception):
    """The system did not start, did not answer or answered with an error; the text says which."""


class SystemProcess:
    """One running system. What it prints goes to `log`."""

    def __init__(self, python: Path, module: str, variables: Mapping[str, str], log: Path) -> None:
        """Starts the process. Raises SystemFailedError if its interpreter is not there."""
        if not python.exists():
            raise SystemFailedError("not installed (make peers)")
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), "-P", "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**inherited_variables(), **_OFFLINE, **variables},
                text=True,
            )
        self.versions: dict[str, str] = {}

    def load(self, setup: Setup) -> None:
        """Returns when the system can run rounds. Raises SystemFailedError."""
        self.versions = self._ask(asdict(setup), _START_TIMEOUT_S)["ready"]

    def run(self, job: Job) -> Outcome:
        """One round. Raises SystemFailedError, also if it did not generate what was asked for."""
        outcome = Outcome(**self._ask(asdict(job), _ROUND_TIMEOUT_S))
        lengths = {len(generated) for generated in outcome.token_ids}
        if len(outcome.token_ids) != len(job.prompts) or lengths != {job.new_tokens}:
            raise SystemFailedError(
                f"generated {sorted(lengths)} tokens where {job.new_tokens} were asked for"
            )
        return outcome

    def close(self) -> None:
        """Ends the process, by force if it does not end by itself."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(_STOP_TIMEOUT_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._kill()
        finally:
            self._process.stdout.close()

    def _kill(self) -> None:
        """And what it has started, as a server."""
        children: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        self._process.wait()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()

    def _ask(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SystemFailedError(self._last_words()) from None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            self._kill()  # else it would go on beside the others' rounds
            raise SystemFailedError(f"no answer within {timeout_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise SystemFailedError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SystemFailedError(answer["error"])
        return answer

    def _last_words(self) -> str:
        """How the process ended and the last line it wrote."""
        lines = self._log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing written")
        return f"ended with status {self._process.wait()}: {last}"


_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
