"""Jain's index and the worst adapter."""

import pytest
from load_records import make_outcome, make_record

from fusionserve.loadtest.fairness import by_adapter, fairness, jain_index
from fusionserve.loadtest.load_report import to_report
from fusionserve.loadtest.request_record import RequestRecord
from fusionserve.loadtest.text_report import to_text
from fusionserve.loadtest_config import BLEND, LORA


def lora(name: str, tokens_s: list[float], **fields: object) -> RequestRecord:
    return make_record(kind=LORA, names=(name,), tokens_s=tokens_s, **fields)


@pytest.mark.parametrize(
    ("shares", "index"),
    [
        ([5.0, 5.0, 5.0], 1.0),
        ([1.0, 0.0, 0.0, 0.0], 0.25),
        ([1.0, 2.0, 3.0], 36 / 42),
        ([0.0], None),
        ([], None),
    ],
)
def test_jain_index(shares: list[float], index: float | None) -> None:
    assert jain_index(shares) == (None if index is None else pytest.approx(index))


def test_unequal_demand_is_fair_if_the_speed_is_equal() -> None:
    records = [lora("a", [0.5, 1.0])] * 9 + [lora("b", [0.5, 1.0])]
    found = fairness(records, window_s=1.0)
    assert found.jain_speed == pytest.approx(1.0)
    assert found.jain_tokens_per_s == pytest.approx(20**2 / (2 * (18**2 + 2**2)))


def test_an_adapter_whose_requests_fail_lowers_the_index() -> None:
    failed = lora("b", [0.5], ended_s=1.0, status="ABORTED")
    found = fairness([lora("a", [0.5, 1.0]), failed], window_s=1.0)
    assert found.jain_speed == pytest.approx(0.5)
    assert found.worst_adapter == "a"  # b has no first token of a request that succeeded


def test_the_worst_adapter_is_compared_with_the_median_one() -> None:
    found = fairness([lora("a", [0.1]), lora("b", [0.2]), lora("c", [0.9])], window_s=1.0)
    assert (found.worst_adapter, found.worst_ttft_p99_s, found.median_ttft_p99_s) == ("c", 0.9, 0.2)
    assert found.worst_to_median == pytest.approx(4.5)


def test_the_worst_adapter_is_told_with_its_number_of_requests() -> None:
    """Of a handful the p99 is just the slowest; one that failed is not among them."""
    failed = lora("b", [0.1], ended_s=1.0, status="ABORTED")
    records = [lora("a", [0.1])] * 200 + [lora("b", [0.9])] * 3 + [failed]
    assert fairness(records, window_s=1.0).worst_requests == 3
    outcome = make_outcome(records)
    assert "worst p99 TTFT 900 ms (b, 3 requests), 1.80 x" in to_text(outcome, to_report(outcome))


def test_only_requests_for_one_adapter_count_for_it() -> None:
    blend = make_record(kind=BLEND, names=("a", "b"), tokens_s=[1.0])
    assert list(by_adapter([blend, lora("b", [1.0]), lora("c", [1.0]), lora("c", [1.0])])) == ["c", "b"]
    assert fairness([blend], window_s=1.0).adapters == 0
