"""What a load test will send: the same for a seed, and distributed as asked."""

import itertools
import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from load_records import make_catalog, make_model

from fusionserve.errors import PreconditionError
from fusionserve.loadtest.request_plan import PlannedRequest, Popularity, plan_requests
from fusionserve.loadtest_config import BASE, BLEND, FUSION, KINDS, LORA, LoadConfig, parse_lengths

ALL_KINDS = make_catalog(mix={BASE: 1.0, LORA: 2.0, BLEND: 1.0, FUSION: 1.0})


def plan(count: int, **config: Any) -> list[PlannedRequest]:
    return list(itertools.islice(plan_requests(LoadConfig(target="x", **config), ALL_KINDS), count))


def test_the_same_seed_plans_the_same_requests() -> None:
    options = {"rate": 5.0, "zipf": 1.0, "prompt_lengths": parse_lengths("4..40"), "seed": 3}
    assert plan(100, **options) == plan(100, **options)
    assert plan(100, **options) != plan(100, **{**options, "seed": 4})


def test_changing_one_property_leaves_the_others() -> None:
    one, other = plan(50, rate=5.0), plan(50, rate=5.0, output_lengths=parse_lengths("1..9"))
    assert [each.output_tokens for each in one] != [each.output_tokens for each in other]
    for field in ("due_s", "kind", "names", "prompt"):
        assert [getattr(each, field) for each in one] == [getattr(each, field) for each in other]


def test_arrivals_are_a_poisson_process() -> None:
    due_s = [each.due_s or 0.0 for each in plan(4000, rate=20.0, prompt_lengths=parse_lengths("1"))]
    gaps = [after - before for before, after in itertools.pairwise([0.0, *due_s])]
    assert min(gaps) > 0
    # Exponential gaps: mean and deviation are both 1 / rate, each within 4 standard errors.
    assert statistics.mean(gaps) == pytest.approx(0.05, rel=0.07)
    assert statistics.stdev(gaps) == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("s", [0.0, 1.0, 20.0])
def test_distinct_names_are_drawn_in_proportion_from_those_that_are_left(s: float) -> None:
    """However rare the others are; of two, the second is the other one."""
    names, numbers = [f"a{k}" for k in range(6)], random.Random(1)
    popularity = Popularity(names, s)
    drawn = [popularity.draw_distinct(numbers, 3) for _ in range(3000)]
    assert all(len(set(each)) == 3 for each in drawn)
    assert set(popularity.draw_distinct(numbers, 6)) == set(names)
    weights = [k**-s for k in range(1, 7)]
    first = Counter(each[0] for each in drawn)
    assert [first[name] / 3000 for name in names] == pytest.approx(
        [w / sum(weights) for w in weights], abs=0.04
    )
    second = [each[1] for each in drawn if each[0] == "a0"]
    expected = weights[1] / sum(weights[1:])
    assert second.count("a1") / len(second) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\n \n", "no line"), (b"\xff\xfe", "UTF-8"), (None, "No such")], ids=str
)
def test_file_without_prompts_is_refused_at_once(content: bytes | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PreconditionError, match=reason):
        plan_requests(LoadConfig(target="x", prompt_file=file), ALL_KINDS)


def test_closed_loops_plan_no_arrivals() -> None:
    assert {each.due_s for each in plan(10)} == {None}


def test_kinds_come_in_proportion_to_their_weights() -> None:
    counts = Counter(each.kind for each in plan(5000, prompt_lengths=parse_lengths("1")))
    shares = {kind: counts[kind] / 5000 for kind in KINDS}
    assert shares == pytest.approx({BASE: 0.2, LORA: 0.4, BLEND: 0.2, FUSION: 0.2}, abs=0.03)


def test_sampling_is_the_runs_with_a_seed_for_each_request() -> None:
    options = [request.options("salt") for request in plan(3, temperature=0.7, top_p=0.9)]
    assert [(each["temperature"], each["top_p"]) for each in options] == [(0.7, 0.9)] * 3
    assert len({each["seed"] for each in options}) == 3


def test_every_request_asks_for_the_runs_interval() -> None:
    assert [each.options("salt")["stream_interval"] for each in plan(2, stream_interval=5)] == [5, 5]


def test_kinds_name_what_they_are_adapted_by() -> None:
    for request in plan(200, blend_size=3):
        options = request.options("salt")
        chosen = options.keys() & {"adapter", "blend", "fusion"}
        expected = {BASE: set(), LORA: {"adapter"}, BLEND: {"blend"}, FUSION: {"fusion"}}
        assert chosen == expected[request.kind]
        if request.kind == BLEND:
            assert len(set(request.names)) == 3
            assert options["blend"] == dict.fromkeys(request.names, 1 / 3)


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
def test_popularity_falls_with_the_rank_to_the_power_of_s(s: float) -> None:
    names = [f"a{n}" for n in range(1, 6)]
    counts = Counter(
        Popularity(names, s).draw(numbers) for numbers in [random.Random(0)] for _ in range(20000)
    )
    weights = {name: rank**-s for rank, name in enumerate(names, 1)}
    expected = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    assert {name: counts[name] / 20000 for name in names} == pytest.approx(expected, abs=0.015)


def test_prompts_are_random_tokens_that_end_nothing() -> None:
    prompts = [each.prompt for each in plan(300, prompt_lengths=parse_lengths("20..30"))]
    token_ids = {token for prompt in prompts for token in prompt}
    assert token_ids == set(range(100)) - set(make_model().eos_token_ids)
    assert {len(prompt) for prompt in prompts} == set(range(20, 31))
    assert len(set(prompts)) == 300


def test_prompts_can_be_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  \ntwo\n", encoding="utf-8")
    assert {each.prompt for each in plan(50, prompt_file=file)} == {"one", "two"}
    file.write_text("\n \n", encoding="utf-8")
    with pytest.raises(PreconditionError, match="no line with a prompt"):
        plan(1, prompt_file=file)


def test_lognormal_lengths_have_their_median_and_no_pile_at_the_end() -> None:
    lengths, numbers = parse_lengths("lognormal:100:0.5:400"), random.Random(1)
    drawn = [lengths.draw(numbers) for _ in range(8000)]
    assert statistics.median(drawn) == pytest.approx(100, rel=0.05)
    assert 300 < max(drawn) <= 400
    assert drawn.count(400) < 10
    over = sum(each > 100 * 2.718281828**0.5 for each in drawn) / len(drawn)
    assert over == pytest.approx(0.1587, abs=0.02)  # one deviation above the median


@pytest.mark.parametrize("text", ["64", "16..256", "lognormal:128:0.7:1024"])
def test_lengths_show_as_they_are_written(text: str) -> None:
    assert str(parse_lengths(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-3",
        "9..3",
        "1..",
        "a",
        "lognormal:5",
        "lognormal:5:1:2",
        "lognormal:5:1:9:9",
        "normal:5:1:9",
    ],
)
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not N, LOW\.\.HIGH or lognormal"):
        parse_lengths(text)
