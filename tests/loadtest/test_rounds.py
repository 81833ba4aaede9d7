"""What rounds of concurrent streams are told as."""

import pytest

from fusionserve.loadtest.real_shapes import to_lines
from fusionserve.loadtest.rounds import Round, median_ratio


def make_rounds(*rates: int) -> list[Round]:
    """Of one second each, at so many tokens per second."""
    return [Round(num_generated=rate, prompt_s=0.1, total_s=1.0) for rate in rates]


def test_ratio_is_the_median_of_those_within_a_repeat() -> None:
    """A machine that is slow in one repeat is slow for both."""
    over, under = make_rounds(90, 100), make_rounds(100, 200)
    assert median_ratio(over, under) == pytest.approx(0.70)  # of the medians it is 0.63


def test_real_shapes_tell_the_ratio_within_a_repeat() -> None:
    lines = list(to_lines({"base": make_rounds(100, 200), "mixed": make_rounds(90, 100)}))
    assert lines[0] == "base     150.0 generated tokens/s  (repeats: 100.0, 200.0)"
    assert lines[-1] == "mixed / base = 0.70"
