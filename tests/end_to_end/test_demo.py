"""`make demo`, as the README has it run first."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAST_LINE = (
    "The server stopped cleanly. Every text was the same alone and in one batch. All as it should be.\n"
)


def test_demo_ends_as_it_should() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUSIONSERVE_")}
    command = [sys.executable, "-P", "examples/demo.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines(keepends=True)[-1] == LAST_LINE
