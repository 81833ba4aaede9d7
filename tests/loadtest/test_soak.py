"""The soak notices what it is there to notice, and runs from end to end."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import numpy as np
import psutil
import pytest
from server_fixture import Served, serving_server

from fusionserve.client import AsyncClient
from fusionserve.errors import AbortedError, InternalError
from fusionserve.loadtest.background_task import background_task
from fusionserve.loadtest.soak import run
from fusionserve.loadtest.soak.__main__ import main
from fusionserve.loadtest.soak.record import SoakRecord
from fusionserve.loadtest.soak.requests import SoakRequest, Tokens, draw_requests, references
from fusionserve.loadtest.soak.samples import BLOCKS, FILES, HEAP, RETURNED, RSS, TASKS, THREADS, Samples
from fusionserve.loadtest.soak.traffic import BAD_STATUS, MISMATCH, Traffic
from fusionserve.loadtest.soak.verdict import Check, growth, judge, slope

BASE = [SoakRequest("abc", {"max_new_tokens": 6}), SoakRequest("abcd", {"max_new_tokens": 9})]
ADAPTED = [SoakRequest("abc", {"adapter": "alpha", "max_new_tokens": 6})]
AT_REST = dict.fromkeys(RETURNED, 0.0)


def samples_of(values: np.ndarray) -> Samples:
    samples = Samples()
    for second, value in enumerate(values):
        samples.add(float(second), dict.fromkeys((RSS, HEAP, FILES, THREADS, TASKS), float(value)))
    return samples


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.is_kept}


def test_slope_is_that_of_the_line_whatever_peaks_there_are() -> None:
    times_s = np.arange(300.0)
    values = 7 + 0.25 * times_s
    values[::10] += 500
    assert slope(times_s, values) == pytest.approx(0.25, abs=0.02)


def test_growth_counts_after_the_warm_up_only() -> None:
    rises_first = np.concatenate([np.linspace(0, 900, 100), np.full(200, 900.0)])
    assert growth(samples_of(rises_first), RSS) == pytest.approx(0)
    assert growth(samples_of(np.linspace(0, 300, 301)), RSS) == pytest.approx(200)


def test_slope_of_many_points_is_found_from_some() -> None:
    assert slope(np.arange(50_000.0), 3 * np.arange(50_000.0)) == pytest.approx(3)


def test_steady_server_that_returns_everything_passes() -> None:
    assert failed(judge(samples_of(np.full(300, 50.0)), AT_REST, SoakRecord())) == set()


def test_whatever_grows_fails() -> None:
    checks = judge(samples_of(np.linspace(0, 60, 300)), AT_REST, SoakRecord())
    assert failed(checks) == {f"growth of {name}" for name in (RSS, HEAP, FILES, THREADS, TASKS)}


def test_whatever_is_kept_and_whatever_went_wrong_fails() -> None:
    record = SoakRecord()
    record.note_problem(MISMATCH, "other tokens")
    checks = judge(samples_of(np.full(300, 50.0)), AT_REST | {BLOCKS: 1.0}, record)
    assert failed(checks) == {f"{BLOCKS} at rest", f"problem: {MISMATCH}"}


def test_requests_are_distinct_and_of_every_kind() -> None:
    requests = draw_requests(80, random.Random(1))
    assert len({str(request) for request in requests}) == 80
    for kind in ("adapter", "blend", "fusion", "excluded_members", "seed"):
        assert any(kind in request.options for request in requests)
    assert any(not request.is_adapted for request in requests)


async def send(served: Served, requests: list[SoakRequest], expected: list[Tokens]) -> SoakRecord:
    """What traffic notes in a moment."""
    record = SoakRecord()
    async with AsyncClient(str(served.app.grpc_address)) as client:
        traffic = Traffic(client, requests, expected, record)
        async with background_task(traffic.run(3, random.Random(1))):
            while record.requests.total() < 40:
                await asyncio.sleep(0.01)
    return record


async def test_traffic_with_the_tokens_it_expects_has_no_problem() -> None:
    async with serving_server() as served:
        async with AsyncClient(str(served.app.grpc_address)) as client:
            expected = await references(client, BASE)
        record = await send(served, BASE, expected)
    assert record.problems.total() == 0
    assert record.compared_tokens > 100


async def test_one_wrong_token_is_noticed() -> None:
    async with serving_server() as served:
        wrong = [(0, 1, 2, 3, 4, 99), tuple(range(9))]
        record = await send(served, BASE, wrong)
    assert record.problems[MISMATCH] > 0
    assert record.problems[BAD_STATUS] == 0
    assert "'abc'" in record.texts[0]


@pytest.mark.parametrize(
    ("requests", "error", "is_problem"),
    [
        (BASE, AbortedError("unloaded", reason="ADAPTER_UNLOADED"), True),
        (ADAPTED, AbortedError("unloaded", reason="ADAPTER_UNLOADED"), False),
        (ADAPTED, InternalError("a bug"), True),
    ],
    ids=["base is never unloaded", "adapters are", "bugs are none of it"],
)
async def test_statuses_are_held_to_what_may_happen(
    requests: list[SoakRequest], error: Exception, is_problem: bool
) -> None:
    async with serving_server() as served:
        served.engine.error_midway = error
        record = await send(served, requests, [tuple(range(9))] * len(requests))
    assert (record.problems[BAD_STATUS] > 0) == is_problem


def test_soak_runs_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["killed", "cancel midway", "resets"]
    main(["--minutes", "0.15", "--requests", "12", "--out", str(tmp_path), "--hostile", *kinds])
    report = json.loads((tmp_path / "soak.json").read_text())
    # It needs more than seconds to show whether memory grows, or what comes and goes with the traffic.
    shown_later = {f"growth of {name}" for name in (RSS, HEAP, TASKS)}
    broken = {check["name"] for check in report["checks"] if not check["is_kept"]}
    assert broken <= shown_later, report["problems"]
    assert report["at_rest"][TASKS] <= report["before"][TASKS] + 2
    assert report["compared_tokens"] > 0
    assert {visit["kind"] for visit in report["visits"]} == set(kinds)
    assert (tmp_path / "soak.png").stat().st_size > 10_000
    assert "checks passed" in capsys.readouterr().out


def test_soak_whose_server_dies_ends_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = run._describe

    def kill(samples: Samples, record: SoakRecord) -> str:
        if record.now_s > 4:
            for child in psutil.Process().children():
                if "serve" in child.cmdline():
                    child.kill()
        return describe(samples, record)

    monkeypatch.setattr(run, "_describe", kill)
    assert main(["--minutes", "5", "--requests", "4", "--out", str(tmp_path), "--hostile"]) == 1
    report = json.loads((tmp_path / "soak.json").read_text())
    broken = {check["name"] for check in report["checks"] if not check["is_kept"]}
    assert "problem: exit code" in broken and not report["visits"]
