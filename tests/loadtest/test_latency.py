"""Latencies, percentiles and service levels of traces made by hand."""

import pytest
from load_records import make_record

from fusionserve.loadtest.latency import Latencies, Spread, missed_levels
from fusionserve.loadtest_config import ServiceLevels


def test_latencies_of_one_request() -> None:
    record = make_record(due_s=1.0, tokens_s=[1.5, 1.6, 1.8, 2.3], ended_s=2.4)
    assert record.ttft_s == pytest.approx(0.5)
    assert record.itls_s == pytest.approx([0.1, 0.2, 0.5])
    assert record.tpot_s == pytest.approx(0.8 / 3)
    assert record.e2e_s == pytest.approx(1.4)


def test_a_late_client_makes_no_request_look_fast() -> None:
    assert make_record(due_s=1.0, sent_s=1.4, tokens_s=[1.5]).ttft_s == pytest.approx(0.5)


def test_tokens_that_arrive_together_have_no_gap() -> None:
    record = make_record(chunks=[(0.5, 2), (0.9, 3)])
    assert record.itls_s == pytest.approx([0.0, 0.4, 0.0, 0.0])
    assert record.tpot_s == pytest.approx(0.1)
    assert record.generated_tokens == 5


def test_one_token_has_no_gaps() -> None:
    record = make_record(tokens_s=[0.5])
    assert (record.itls_s, record.tpot_s) == ([], None)
    nothing = make_record()
    assert (nothing.itls_s, nothing.tpot_s, nothing.ttft_s) == ([], None, None)


def test_percentiles_lie_between_neighbours() -> None:
    spread = Spread.of([float(n) for n in range(100, -1, -1)])  # 0 to 100
    assert spread == Spread(count=101, mean=50.0, p50=50.0, p90=90.0, p99=99.0, max=100.0)
    assert Spread.of([1.0, 3.0, None]) == Spread(
        count=2, mean=2.0, p50=2.0, p90=pytest.approx(2.8), p99=pytest.approx(2.98), max=3.0
    )
    assert Spread.of([None]) is None


def test_failed_requests_have_no_latency() -> None:
    good = make_record(0, tokens_s=[0.5, 0.6])
    bad = make_record(1, tokens_s=[9.0, 99.0], status="ABORTED")
    latencies = Latencies.of([good, bad])
    assert latencies.ttft_s is not None and latencies.itl_s is not None
    assert (latencies.ttft_s.max, latencies.itl_s.count) == (0.5, 1)
    assert Latencies.of([bad]).e2e_s is None


def test_service_levels_are_kept_up_to_the_limit() -> None:
    record = make_record(tokens_s=[0.5, 0.625, 1.125])  # gaps of 0.125 and 0.5, mean 0.3125
    kept = ServiceLevels(ttft_s=0.5, itl_s=0.5, tpot_s=0.3125, e2e_s=1.125)
    assert missed_levels(record, kept) == []
    assert missed_levels(record, ServiceLevels()) == []
    tight = ServiceLevels(ttft_s=0.49, itl_s=0.49, tpot_s=0.3, e2e_s=1.1)
    assert missed_levels(record, tight) == ["ttft", "itl", "tpot", "e2e"]
