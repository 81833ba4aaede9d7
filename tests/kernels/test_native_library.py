"""How the native library is built, kept, and done without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PRINT = "from fusionserve.kernels.native_library import native_library; print(native_library() is not None)"


def run(script: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    return subprocess.run(
        [sys.executable, "-P", "-c", script], env=variables, capture_output=True, text=True, timeout=120
    )


def test_library_is_built_once_and_kept(tmp_path: Path) -> None:
    cache = tmp_path / "fusionserve"
    abandoned = cache / "build-of-a-killed-compiler"
    abandoned.mkdir(parents=True)
    (abandoned / "linear.o").write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    cache.chmod(0o700)
    assert run(PRINT, tmp_path).stdout == "True\n"
    (kept,) = cache.iterdir()
    changed = kept.stat().st_mtime_ns
    assert run(PRINT, tmp_path).stdout == "True\n"
    assert kept.stat().st_mtime_ns == changed


def test_without_a_compiler_torch_computes(tmp_path: Path) -> None:
    found = run(PRINT, tmp_path, PATH="", CXX="")
    assert found.stdout == "False\n"
    assert "several times slower: there is no C++ compiler" in found.stderr


def test_compiler_that_fails_is_named(tmp_path: Path) -> None:
    found = run(PRINT, tmp_path, CXX="false")
    assert found.stdout == "False\n"
    assert "computing without native kernels" in found.stderr


def test_library_that_others_may_write_is_not_loaded(tmp_path: Path) -> None:
    run(PRINT, tmp_path)
    (kept,) = (tmp_path / "fusionserve").iterdir()
    kept.chmod(0o777)
    found = run(PRINT, tmp_path)
    assert found.stdout == "False\n"
    assert "or can be written by, another user" in found.stderr


def test_switched_off(tmp_path: Path) -> None:
    assert run(PRINT, tmp_path, FUSIONSERVE_NATIVE="off").stdout == "False\n"
    assert not list(tmp_path.iterdir())
