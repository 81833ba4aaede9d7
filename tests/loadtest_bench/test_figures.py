"""Medians, ratios within a repeat, shares and agreement."""

import pytest

from fusionserve.loadtest.bench.figures import Spread, figures, first_tokens_equal, ratio
from fusionserve.loadtest.bench.floor import Floor
from fusionserve.loadtest.bench.protocol import BASE, MIXED, Outcome
from fusionserve.loadtest.bench.systems import LLAMA_CPP, OURS, PEFT, TRANSFORMERS
from fusionserve.loadtest.bench.tables import figure_lines, ratio_lines


def outcome(total_s: float, first_token: int = 1, prompt_s: float | None = 1.0) -> Outcome:
    """Two streams of ten tokens."""
    return Outcome(prompt_s, total_s, [[first_token] + [0] * 9, [2] * 10])


OUTCOMES = {
    (OURS, BASE): [outcome(2.0), outcome(4.0), outcome(5.0)],
    (TRANSFORMERS, BASE): [outcome(4.0, 3), outcome(6.0), outcome(20.0)],
}


def test_rates_are_medians_with_their_spread() -> None:
    line = figures((OURS, BASE), OUTCOMES, [Floor(0.5, 1.5)] * 3)
    assert line.tokens_per_s == Spread(5.0, 4.0, 10.0)
    assert (line.prompt_s, line.decode_s) == (1.0, 3.0)
    assert (line.floor_share, line.decode_floor_share) == (0.5, 0.5)


def test_shares_of_the_floor_are_taken_within_a_repeat() -> None:
    line = figures((OURS, BASE), OUTCOMES, [Floor(0.5, 0.5), Floor(0.4, 1.2), Floor(1.0, 2.0)])
    assert line.floor_share == 0.5  # 1/2, 1.6/4, 3/5
    assert line.decode_floor_share == 0.5  # 0.5/1, 1.2/3, 2/4


def test_ratios_are_taken_within_a_repeat() -> None:
    assert ratio((OURS, BASE), (TRANSFORMERS, BASE), OUTCOMES) == Spread(2.0, 1.5, 4.0)
    assert ratio((OURS, BASE), (PEFT, MIXED), OUTCOMES) is None
    line = figures((TRANSFORMERS, BASE), OUTCOMES, [])
    assert line.ours_times == Spread(2.0, 1.5, 4.0)
    assert line.floor_share is None


def test_first_tokens_are_compared_with_the_reference() -> None:
    assert first_tokens_equal((OURS, BASE), OUTCOMES) == pytest.approx(5 / 6)
    assert first_tokens_equal((TRANSFORMERS, BASE), OUTCOMES) == 1.0
    assert first_tokens_equal((OURS, MIXED), {(OURS, MIXED): [outcome(1.0)]}) is None


def test_a_round_without_a_parting_has_neither_part() -> None:
    line = figures((LLAMA_CPP, MIXED), {(LLAMA_CPP, MIXED): [outcome(4.0, prompt_s=None)]}, [Floor(1.0, 1.0)])
    assert (line.prompt_s, line.decode_s, line.decode_floor_share) == (None, None, None)
    assert line.floor_share == 0.5


def test_tables_show_medians_and_bars() -> None:
    lines = figure_lines({key: figures(key, OUTCOMES, [Floor(0.5, 1.5)] * 3) for key in OUTCOMES})
    assert lines[1].split() == [
        *("ours", "base", "5.0", "4.0-10.0", "1.00", "x", "1.00", "3.00", "0.50", "0.50", "0.83")
    ]
    assert [line.split()[:4] for line in ratio_lines(OUTCOMES, "W3")] == [
        ["base", "/", "transformers", "2.00"]
    ]
    assert ratio_lines(OUTCOMES, "W1")[0].endswith("bar 2.40: MISSED")
