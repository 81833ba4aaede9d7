"""Failpoints: what they are told is what they do, and no more."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusionserve import failpoints
from fusionserve.failpoints import POINTS, FailpointError, parse_failpoints

ROOT = Path(__file__).parent.parent
PACKAGES = ("adapters", "fusion", "engine", "server")


def passes(term: str, num_passes: int) -> list[bool]:
    """Which passes through the point raised."""
    point = parse_failpoints(f"engine.step={term}")["engine.step"]
    raised = []
    for _ in range(num_passes):
        try:
            point.reach()
        except FailpointError:
            raised.append(True)
        else:
            raised.append(False)
    return raised


def test_point_acts_every_time_or_as_often_as_told() -> None:
    assert passes("raise", 3) == [True, True, True]
    assert passes("2*raise", 4) == [True, True, False, False]
    assert passes("1+1*raise", 4) == [False, True, False, False]


def test_point_raises_what_its_action_says() -> None:
    for action, error in (("raise", FailpointError), ("oserror", OSError), ("memory", MemoryError)):
        with pytest.raises(error):
            parse_failpoints(f"host.publish={action}")["host.publish"].reach()


def test_point_sleeps() -> None:
    started_s = time.monotonic()
    parse_failpoints("host.publish=sleep(0.05)")["host.publish"].reach()
    assert time.monotonic() - started_s >= 0.05


def test_unarmed_point_does_nothing() -> None:
    failpoints.reach_failpoint("engine.step")


@pytest.mark.parametrize("text", ["engine.step", "engine.step=fly", "nowhere=raise", "engine.step=-1*raise"])
def test_unknown_point_or_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no failpoint"):
        parse_failpoints(text)


def test_process_is_armed_by_its_environment() -> None:
    code = (
        "from fusionserve.failpoints import reach_failpoint as reach; reach('host.evict'); print('alive'); "
    )
    code += "reach('engine.step')"
    ended = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={failpoints.VARIABLE: "engine.step=exit; host.evict=sleep(0)"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (failpoints.EXIT_CODE, ""), "it ends unflushed, as if killed"


def test_every_point_is_somewhere_in_the_code() -> None:
    code = "".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    assert {name for name in POINTS if f'reach_failpoint("{name}")' not in code} == set()
