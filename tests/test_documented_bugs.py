"""The tests that docs/reliability.md names are there, and so are the commits at which they show bugs."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`(?:tools/at_commit\.sh (\S+) )?(tests/\S*test_\w+\.py)(?: -k (\w+))?`")
TESTS = NAMED.findall((ROOT / "docs/reliability.md").read_text())


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A finished git command in the repository."""
    return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True)


def has_history() -> bool:
    """Whether this is a whole repository: not an archive, nor its last commits alone."""
    is_whole = git("rev-parse", "--is-shallow-repository").stdout.strip() == "false"
    return is_whole and int(git("rev-list", "--count", "HEAD").stdout) > 1


def test_bugs_are_shown_at_commits() -> None:
    assert sum(1 for commit, _, _ in TESTS if commit) > 10


@pytest.mark.parametrize(("commit", "path", "name"), TESTS)
def test_what_is_named_is_there(commit: str, path: str, name: str) -> None:
    assert re.search(rf'def test_\w*{name}|ids=\[.*"{name}"', (ROOT / path).read_text())
    if not has_history():
        pytest.skip("there is no history")
    assert git("merge-base", "--is-ancestor", commit or "HEAD", "HEAD").returncode == 0
