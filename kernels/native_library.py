"""The kernels written in C++ (the folder `native`), compiled for the processor at hand when first needed, then kept.

Compiling takes 80 seconds of a core, on up to four of those that the process has, and needs a C++ compiler; where there
is none, everything is computed with torch's own operations. The library is kept in the user's cache folder under a name
that follows from the sources, the compiler and the processor. It has threads of its own, as many as torch has.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from fusionserve.kernels.cores import num_cores

SWITCH = "FUSIONSERVE_NATIVE"  # "off" in the environment: torch's operations only
_SOURCES = Path(__file__).parent / "native"
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fPIC",
    "-fopenmp-simd",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    # Other processors' compilers do not know it.
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
_BUILD_PREFIX = "build-"
_MAX_COMPILERS = 4  # at once: each takes up to 300 MB, and the largest unit as long as a quarter of the rest
_BUILD_TIMEOUT_S = 600.0

logger = logging.getLogger(__name__)


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had; the reason is logged once."""
    if os.environ.get(SWITCH) == "off":
        return None
    try:
        library = _load()
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("computing without native kernels, several times slower: %s", _why(error))
        return None
    _set_num_threads(library)
    return library


def set_num_threads(count: int) -> None:
    """Has torch's operations and the native kernels compute with so many threads."""
    torch.set_num_threads(count)
    library = native_library()
    if library is not None:
        _set_num_threads(library)


def _set_num_threads(library: ctypes.CDLL) -> None:
    wanted = torch.get_num_threads()
    found = library.set_num_threads(wanted)
    if found < wanted:
        logger.warning("computing with %d threads: the system gives no more of the %d", found, wanted)


def _load() -> ctypes.CDLL:
    """Builds the library if it is not kept, or is kept damaged."""
    compiler = _compiler()
    path = _cache_folder() / f"native-{_key(compiler)}.so"
    if path.exists():
        _refuse_strangers(path)
        with suppress(OSError):
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    _build(compiler, path)
    return ctypes.CDLL(str(path))


def _compiler() -> str:
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "c++"))), None)
    if found is None:
        raise FileNotFoundError("there is no C++ compiler (on Debian: apt install g++)")
    return found


def _build(compiler: str, path: Path) -> None:
    """Compiles to a temporary folder and moves the result once it is on disk, so that nobody loads half a library."""
    deadline_s = time.monotonic() + _BUILD_TIMEOUT_S
    _remove_abandoned(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_BUILD_PREFIX) as folder:
        units = sorted(_units(), key=_size_with_headers, reverse=True)
        objects = [f"{folder}/{source.stem}.o" for source in units]

        def compile_unit(source: Path, target: str) -> None:
            _run(deadline_s, compiler, *_FLAGS, "-c", str(source), "-o", target)

        with ThreadPoolExecutor(min(_MAX_COMPILERS, num_cores())) as workers:
            list(workers.map(compile_unit, units, objects))
        _run(deadline_s, compiler, "-shared", "-pthread", *objects, "-o", f"{folder}/native.so")
        os.chmod(f"{folder}/native.so", 0o700)
        _flush(f"{folder}/native.so")
        os.replace(f"{folder}/native.so", path)


def _flush(path: str) -> None:
    """A machine that loses power behind the move would else find the name with nothing under it."""
    with open(path, "rb") as file:
        os.fsync(file)


def _remove_abandoned(cache: Path) -> None:
    """Removes what compilers left that were killed; one at work is younger."""
    for folder in cache.glob(f"{_BUILD_PREFIX}*"):
        with suppress(FileNotFoundError):  # another process is done with its own
            if time.time() - folder.stat().st_mtime > 2 * _BUILD_TIMEOUT_S:
                shutil.rmtree(folder, ignore_errors=True)


def _run(deadline_s: float, *command: str) -> None:
    remaining_s = max(0.0, deadline_s - time.monotonic())
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=remaining_s)


def _units() -> list[Path]:
    return sorted(_SOURCES.glob("*.cpp"))


def _size_with_headers(source: Path) -> int:
    """How much there is to compile: a unit of few lines may consist of what it includes."""
    headers = re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE)
    return sum(path.stat().st_size for path in (source, *(_SOURCES / header for header in headers)))


def _key(compiler: str) -> str:
    """A digest of everything that the library follows from."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=10).stdout
    digest.update(version + " ".join(_FLAGS).encode() + _processor().encode())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """What tells processors apart that `-march=native` compiles differently for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU part")
    return platform.machine() + "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(root) if root else _home() / ".cache") / "fusionserve"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_strangers(folder)
    return folder


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:  # a user that the system does not list, as containers may have
        raise FileNotFoundError("there is no folder to keep them in: set HOME or XDG_CACHE_HOME") from error


def _refuse_strangers(path: Path) -> None:
    """Code is loaded from here: it must be the user's own, and nobody else may write it."""
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} belongs to, or can be written by, another user")


def _why(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return "the compiler took too long"
    lines = str(getattr(error, "stderr", None) or "").strip().splitlines()
    if isinstance(error, subprocess.CalledProcessError) and lines:
        return f"the compiler failed: {next((line for line in lines if 'error' in line), lines[0])}"
    return str(error)
