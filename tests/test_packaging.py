"""The wheel holds every package: an editable install would not notice one that is missing from the list."""

import tomllib
from pathlib import Path

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


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
