"""The report of a trace made by hand, as JSON, text and pictures."""

import json
from pathlib import Path

import pytest
from load_records import make_outcome, make_record
from matplotlib.figure import Figure

from fusionserve.loadtest.command import failings, write_files
from fusionserve.loadtest.load_report import to_report
from fusionserve.loadtest.plots import draw_timeline
from fusionserve.loadtest.text_report import to_text
from fusionserve.loadtest.timeline import timeline
from fusionserve.loadtest_config import LORA, LoadConfig, ServiceLevels

CONFIG = LoadConfig(target="x", service_levels=ServiceLevels(ttft_s=1.0))
EVERY_LEVEL = LoadConfig(
    target="x", service_levels=ServiceLevels(ttft_s=9, itl_s=9.125, tpot_s=0.125, e2e_s=99)
)
REFUSED = {"status": "RESOURCE_EXHAUSTED", "reason": "QUEUE_FULL", "message": "full"}
TRACE = [
    make_record(0, is_counted=False, tokens_s=[0.1, 3.0], ended_s=3.0),
    make_record(1, due_s=2.0, tokens_s=[2.5, 3.0, 4.0], prompt_tokens=10, cached_tokens=4),
    make_record(2, due_s=3.0, tokens_s=[5.0, 6.0], prompt_tokens=20, kind=LORA, names=("a",)),
    make_record(3, due_s=4.0, ended_s=4.1, **REFUSED),
    make_record(4, due_s=4.0, ended_s=4.2, **REFUSED),
    make_record(
        5, due_s=4.0, tokens_s=[4.5], ended_s=5.0, status="ABORTED", reason="UNLOADED", message="gone"
    ),
    make_record(6, due_s=4.0, tokens_s=[4.4], ended_s=7.0, kind=LORA, names=("b",), prompt_tokens=30),
]


def test_throughput_is_of_counted_requests_that_succeeded() -> None:
    report = to_report(make_outcome(TRACE, CONFIG))
    assert report["seconds"] == pytest.approx(5.0)  # from 2.0 to 7.0
    assert report["requests"] == {"sent": 6, "succeeded": 3, "failed": 3, "not_sent": 0, "warm_up": 1}
    assert report["throughput"] == pytest.approx(
        {
            "requests_per_s": 3 / 5,
            "prompt_tokens_per_s": 60 / 5,
            "cached_prompt_tokens_per_s": 4 / 5,
            "generated_tokens_per_s": 6 / 5,
        }
    )


def test_goodput_is_what_kept_the_service_levels_of_all_that_was_asked_for() -> None:
    goodput = to_report(make_outcome(TRACE, CONFIG, num_not_sent=2))["goodput"]
    assert goodput["requests_per_s"] == pytest.approx(2 / 5)
    assert goodput["share"] == pytest.approx(2 / 8)
    assert goodput["missed"] == {"ttft": 1}


def test_errors_are_counted_by_status_and_reason() -> None:
    assert to_report(make_outcome(TRACE))["errors"] == [
        {"status": "RESOURCE_EXHAUSTED", "reason": "QUEUE_FULL", "count": 2, "example": "full"},
        {"status": "ABORTED", "reason": "UNLOADED", "count": 1, "example": "gone"},
    ]


def test_groups_have_their_own_figures() -> None:
    report = to_report(make_outcome(TRACE))
    assert {kind: group["requests"] for kind, group in report["by_kind"].items()} == {"base": 4, "lora": 2}
    assert report["by_kind"]["base"]["failed"] == 3
    assert report["by_adapter"]["a"]["latency"]["ttft_s"]["p50"] == pytest.approx(2.0)
    assert report["by_adapter"]["b"]["latency"]["itl_s"] is None


def test_timeline_counts_every_token_of_the_window_once() -> None:
    line = timeline(make_outcome(TRACE))
    widths = [after - before for before, after in zip(line.edges_s, line.edges_s[1:], strict=False)]
    assert (line.edges_s[0], line.edges_s[-1]) == (0.0, 5.0)
    total = sum(rate * width for rate, width in zip(line.generated_tokens_per_s, widths, strict=True))
    assert total == pytest.approx(8)  # the warm-up's at 3.0 too, its one at 0.1 not
    assert max(line.in_flight) == 5  # from 4.0, when one ended, to 4.1
    warm_up = [make_record(9 + i, tokens_s=[0.1, 0.2], is_counted=False) for i in range(9)]
    assert timeline(make_outcome([*warm_up, *TRACE])).in_flight == line.in_flight
    failed = sum(rate * width for rate, width in zip(line.failed_per_s, widths, strict=True))
    assert failed == pytest.approx(3)


def test_what_a_strict_run_does_not_pass() -> None:
    report = to_report(make_outcome(TRACE, CONFIG, num_not_sent=2))
    assert failings(report) == "of 8 requests 3 failed, 2 were not sent, 1 missed ttft"
    assert failings(to_report(make_outcome(TRACE[1:2], CONFIG))) == ""
    assert failings(to_report(make_outcome([]))) == "no request was sent"


def test_text_names_what_matters_within_100_columns() -> None:
    wide = make_outcome(TRACE, EVERY_LEVEL)
    outcome = make_outcome(TRACE, CONFIG, num_not_sent=2)
    text = to_text(outcome, to_report(outcome))
    for shown in (text, to_text(wide, to_report(wide))):
        assert max(map(len, shown.splitlines())) <= 100
    for words in (
        "6 requests in 5.0 s: 3 succeeded, 3 failed, 2 not sent",
        "0.40 requests/s, 25.0% of all requests",
        "within TTFT <= 1 s",
        "missed: 1 x TTFT",
        "2 x RESOURCE_EXHAUSTED QUEUE_FULL: full",
        "Jain's index over 2 adapters",
    ):
        assert words in text


def test_a_run_without_requests_has_a_report() -> None:
    outcome = make_outcome([])
    report = to_report(outcome)
    assert report["goodput"]["share"] is None
    assert "0 requests" in to_text(outcome, report)


def test_files_hold_the_report_the_requests_and_the_plots(tmp_path: Path) -> None:
    outcome = make_outcome(TRACE, CONFIG)
    report = to_report(outcome)
    written = write_files(outcome, report, tmp_path / "new" / "out")
    names = ["report.json", "requests.jsonl", "latency.png", "timeline.png", "adapters.png"]
    assert [path.name for path in written] == names
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(report))
    lines = [json.loads(line) for line in written[1].read_text().splitlines()]
    assert [line["index"] for line in lines] == [record.index for record in TRACE]
    assert lines[1]["chunks"] == [[2.5, 1], [3.0, 1], [4.0, 1]]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[2:])


def test_timeline_shows_the_throughput_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that the warm-up has in the window are in the bins, and in no figure of the report."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: saved.append(figure))
    outcome = make_outcome([make_record(9, is_counted=False, tokens_s=[2.1] * 50), *TRACE])
    report = to_report(outcome)
    assert report["throughput"]["generated_tokens_per_s"] == pytest.approx(6 / 5)
    draw_timeline(outcome, report, tmp_path / "timeline.png")
    above = saved[0].axes[0]
    assert [note.get_text() for note in above.texts] == ["throughput 1.2"]
    assert any(list(line.get_ydata()) == pytest.approx([1.2, 1.2]) for line in above.lines)


def test_nothing_is_drawn_where_nothing_succeeded(tmp_path: Path) -> None:
    outcome = make_outcome(TRACE[3:5])
    assert [path.suffix for path in write_files(outcome, to_report(outcome), tmp_path)] == [".json", ".jsonl"]
