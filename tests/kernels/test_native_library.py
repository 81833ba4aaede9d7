"""How the native library is built, kept, and done without."""

from __future__ import annotations

import ctypes
import os
import platform
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusionserve.kernels import native_library

PRINT = "from fusionserve.kernels.native_library import native_library; print(native_library() is not None)"

# Of the units only the one that a load calls has anything in it; the library of all is what other tests compute with.
QUICK_COMPILER = """#!/bin/sh
case "$*" in
*-c\\ */threads.cpp\\ * | *-shared* | --version) exec g++ "$@" -O0 ;;
*) for object; do :; done && exec g++ -x c++ -c /dev/null -o "$object" ;;
esac
"""


def run(script: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    return subprocess.run(
        [sys.executable, "-P", "-c", script], env=variables, capture_output=True, text=True, timeout=120
    )


def load(cache: Path, monkeypatch: pytest.MonkeyPatch, **environment: str) -> ctypes.CDLL | None:
    """As `run` has it loaded, without a process of its own: for loads that come to nothing."""
    for name, value in {"XDG_CACHE_HOME": str(cache), **environment}.items():
        monkeypatch.setenv(name, value)
    return native_library.native_library.__wrapped__()


@dataclass(frozen=True, slots=True)
class Built:
    """A cache folder after a first run in it, and the compiler it was built with."""

    root: Path
    compiler: Path
    printed: str

    @property
    def kept(self) -> list[Path]:
        """What is in it."""
        return list((self.root / "fusionserve").iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built beside what a killed compiler left, by a compiler that takes a tenth of the time."""
    root = tmp_path_factory.mktemp("built")
    compiler = root / "quick-compiler"
    compiler.write_text(QUICK_COMPILER)
    compiler.chmod(0o700)
    abandoned = root / "fusionserve" / "build-of-a-killed-compiler"
    abandoned.mkdir(parents=True)
    (abandoned / "linear.o").write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    abandoned.parent.chmod(0o700)
    return Built(root, compiler, run(PRINT, root, CXX=str(compiler)).stdout)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="for processors of one family")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "icelake-server", "sapphirerapids"])
def test_sources_compile_for_other_processors(processor: str) -> None:
    """From no vectors to speak of to tile registers: where the library does not compile, there is torch alone."""
    sources = [str(path) for path in (Path(native_library.__file__).parent / "native").glob("*.cpp")]
    flags = ["-std=c++20", f"-march={processor}", "-fopenmp-simd", "-fsyntax-only", "-Wno-psabi"]
    assert len(sources) > 5
    done = subprocess.run(["g++", *flags, *sources], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[:2000]


def test_folder_that_goes_as_one_looks_is_left_to_whose_it_is(tmp_path: Path) -> None:
    (tmp_path / "build-of-another").symlink_to("nowhere")
    native_library._remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["build-of-another"]


def test_library_is_built_once_and_kept(built: Built) -> None:
    assert built.printed == "True\n"
    (kept,) = built.kept
    changed = kept.stat().st_mtime_ns
    assert run(PRINT, built.root, CXX=str(built.compiler)).stdout == "True\n"
    assert built.kept == [kept]
    assert kept.stat().st_mtime_ns == changed


def test_without_a_compiler_torch_computes(tmp_path: Path) -> None:
    found = run(PRINT, tmp_path, PATH="", CXX="")
    assert found.stdout == "False\n"
    assert "several times slower: there is no C++ compiler" in found.stderr


def test_compiler_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert load(tmp_path, monkeypatch, CXX="false") is None
    assert "computing without native kernels" in caplog.text


def test_compiler_that_fails_without_a_word_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "silent-compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho >&2\nexit 3\n')
    compiler.chmod(0o700)
    assert load(tmp_path, monkeypatch, CXX=str(compiler)) is None
    assert "computing without native kernels" in caplog.text and "exit status 3" in caplog.text


# Notes when another one is at work, and links nothing.
SLOW_COMPILER = """#!/bin/sh
case "$*" in
*-shared* | --version) exit ;;
esac
mkdir "$0-at-work" || touch "$0-met-another"
sleep 0.03
rmdir "$0-at-work"
"""


@pytest.fixture
def slow_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the process may run on one core of the machine's many."""
    compiler = tmp_path / "slow-compiler"
    compiler.write_text(SLOW_COMPILER)
    compiler.chmod(0o700)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    return compiler


def test_compilers_take_no_more_cores_than_the_process_has(
    slow_compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(tmp_path, monkeypatch, CXX=str(slow_compiler)) is None
    assert not list(tmp_path.glob("*-met-another"))


def test_build_has_one_deadline(
    slow_compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Less than all units take one after the other, and more than any one does."""
    monkeypatch.setattr(native_library, "_BUILD_TIMEOUT_S", 0.3)
    assert load(tmp_path, monkeypatch, CXX=str(slow_compiler)) is None
    assert "the compiler took too long" in caplog.text


def test_unit_that_includes_most_is_compiled_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.h").write_text("int x;\n" * 99)
    (tmp_path / "few_lines.cpp").write_text('#include "large.h"\n')
    (tmp_path / "more_lines.cpp").write_text("int y;\n" * 9)
    monkeypatch.setattr(native_library, "_SOURCES", tmp_path)
    compiled = []
    monkeypatch.setattr(native_library, "num_cores", lambda: 1)
    monkeypatch.setattr(native_library, "_run", lambda deadline_s, *command: compiled.append(command[-3]))
    with pytest.raises(FileNotFoundError):  # there is no library to keep
        native_library._build("g++", tmp_path / "native.so")
    assert [Path(source).name for source in compiled[:2]] == ["few_lines.cpp", "more_lines.cpp"]


def test_user_without_a_home_gets_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As containers run programs: by a number that the system does not list, and with no HOME."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert native_library.native_library.__wrapped__() is None
    assert "set HOME or XDG_CACHE_HOME" in caplog.text


def test_damaged_library_is_built_again(built: Built, tmp_path: Path) -> None:
    (tmp_path / "fusionserve").mkdir(mode=0o700)
    copy = tmp_path / "fusionserve" / built.kept[0].name
    copy.write_bytes(b"")
    copy.chmod(0o700)
    assert run(PRINT, tmp_path, CXX=str(built.compiler)).stdout == "True\n"
    assert copy.stat().st_size > 10_000


@pytest.mark.parametrize(("machine", "is_told"), [("x86_64", True), ("aarch64", False)])
def test_width_of_vectors_is_told_to_the_compilers_that_know_it(
    machine: str, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    names = runpy.run_path(native_library.__file__)
    assert ("-mprefer-vector-width=512" in names["_FLAGS"]) == is_told


def test_library_that_others_may_write_is_not_loaded(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "fusionserve").mkdir(mode=0o700)
    copy = Path(shutil.copy(built.kept[0], tmp_path / "fusionserve"))
    copy.chmod(0o777)
    assert load(tmp_path, monkeypatch, CXX=str(built.compiler)) is None
    assert "or can be written by, another user" in caplog.text


def test_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(tmp_path, monkeypatch, FUSIONSERVE_NATIVE="off") is None
    assert not list(tmp_path.iterdir())
