"""The wheel holds every package and its data, and the sdist all else: an editable install would miss neither."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_packages_on_disk_are_listed() -> None:
    folders = {ROOT / folder: name for name, folder in SETUPTOOLS["package-dir"].items()}
    found = set()
    for folder, name in folders.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join((name, *init.parent.relative_to(folder).parts)))
    assert found == set(SETUPTOOLS["packages"])


def test_every_root_folder_with_code_is_mapped() -> None:
    mapped = {folder.partition("/")[0] for folder in SETUPTOOLS["package-dir"].values()}
    with_code = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert with_code <= mapped


def test_files_beside_the_code_are_listed() -> None:
    listed, found = set(), set()
    for package, folder in SETUPTOOLS["package-dir"].items():
        patterns = SETUPTOOLS["package-data"].get(package, [])
        listed.update(path for pattern in patterns for path in (ROOT / folder).glob(pattern))
        found.update(path for path in (ROOT / folder).rglob("*") if path.is_file())
    data = {path for path in found if not path.name.endswith((".py", ".pyc"))}
    assert data
    assert data <= listed


def test_folders_without_a_package_go_into_the_sdist() -> None:
    grafted = set(re.findall(r"^graft (\w+)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE))
    packages = {folder.partition("/")[0] for folder in SETUPTOOLS["package-dir"].values()}
    listing = subprocess.run(("git", "ls-files"), cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    folders = {
        path.partition("/")[0] for path in listing.stdout.split("\n") if "/" in path and path[0] != "."
    }
    assert "tests" in folders
    assert folders - packages <= grafted


def test_pages_that_are_linked_go_into_the_sdist() -> None:
    # Setuptools itself adds the readme and the licence.
    included = re.findall(r"^include (.+)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)
    files = {"README.md", "LICENSE", *" ".join(included).split()}
    linked = set()
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        linked.update((page.parent / link).resolve() for link in links)
    at_root = {path.name for path in linked if path.parent == ROOT and path.is_file()}
    assert "SECURITY.md" in at_root
    assert at_root <= files


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
