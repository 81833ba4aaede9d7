"""Runs `fusionserve serve` in a process of its own for as long as a measurement takes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

Flags = Mapping[str, str | int | Path]  # of `fusionserve serve`, by name: {"--dtype": "bfloat16"}

_STOP_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that has said it is ready."""

    process: subprocess.Popen[str]
    grpc: str  # HOST:PORT
    metrics: str  # HOST:PORT or "off"


@contextmanager
def serving(flags: Flags) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The gRPC address and the process of a server on a free port, stopped when the block is left.

    Every flag is passed with its value, so switches are "on" or "off"; what is not named has its default.

    Raises SystemExit if the server does not start; its own reason is on standard error.
    """
    with server_process({"--metrics-listen": "off", **flags}) as server:
        yield server.grpc, server.process


@contextmanager
def server_process(flags: Flags, log: TextIO | None = None) -> Iterator[ServerProcess]:
    """The same with its metrics, on a free port unless `flags` say otherwise, and what it logs in `log`."""
    flags = {"--listen": "127.0.0.1:0", "--metrics-listen": "127.0.0.1:0", **flags}
    command = [str(Path(sys.executable).with_name("fusionserve")), "serve"]
    command += [text for flag, value in flags.items() for text in (flag, str(value))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        with _ended_by_sigterm():
            assert process.stdout is not None
            ready = process.stdout.readline().split()
            if not ready:
                raise SystemExit("the server did not start")
            yield ServerProcess(process, ready[1].removeprefix("grpc="), ready[2].removeprefix("metrics="))
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Has a measurement that is told to end do so by an exception, so that it stops its server on the way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def process_memory(process_id: int) -> dict[str, float]:
    """MiB by the kernel's names (`VmRSS`, `VmHWM`, `RssAnon`, ...), from /proc."""
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    words = (line.split() for line in lines if line.endswith(" kB"))
    return {name.removesuffix(":"): int(number) / 1024 for name, number, _ in words}
