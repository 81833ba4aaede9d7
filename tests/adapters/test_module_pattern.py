"""The bounded matcher against `re`, which is what PEFT uses."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusionserve.adapters.module_pattern import (
    MAX_PATTERN_LENGTH,
    Attempt,
    PatternError,
    StepCount,
    compile_module_pattern,
    first_matches,
)

PATHS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
    "model.embed_tokens",
    "transformer.h.3.attn.c_attn",
    "lm_head",
)
ORDINARY = (
    "q_proj",
    "proj",
    "self_attn.q_proj",
    "model.layers.0.self_attn.q_proj",
    "^model.layers.0.self_attn.q_proj",
    "^q_proj",
    ".*",
    ".*q_proj",
    r"layers\.0\..*",
    r"layers\.\d+\.self_attn\.(q|v)_proj",
    r"(?:q|k|v)_proj",
    r"model\.layers\.([0-9]|1[0-9])\..*_proj",
    r"layers.[0-5].mlp.(gate|up|down)_proj",
    r"[^.]+_proj",
    r"[a-z_]{3,6}",
    r"h\.\d{1,2}\.attn\.c_attn$",
    r"(self_attn|mlp)\..*?_proj",
    r"\w+\.1\.\w+\.q_proj",
    "q_proj|v_proj",
    "lm.head",
    "(lm_)?head",
    "",
    "[]x]_proj",
    "[a|q]_proj",
    "a{0}lm_head",
    "(.*){2}_proj",
    "LM_HEAD",
)


def peft_matches(key: str, path: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # "[[" may mean something else in a Python to come
        return re.match(rf"(.*\.)?({key})$", path) is not None


def our_match(key: str, path: str) -> bool:
    return compile_module_pattern(key).matches(Attempt(path, StepCount()))


@pytest.mark.parametrize("key", ORDINARY)
def test_ordinary_key_matches_like_re(key: str) -> None:
    assert [our_match(key, path) for path in PATHS] == [peft_matches(key, path) for path in PATHS]


ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "ab", "1", "(^)", "($)", r"[\w.]", "[a-z]"]
)
REPEATS = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,2}", "{0,}", "*?", "+?", "{,2}"])


def repeated(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, REPEATS).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
    )


KEYS = st.recursive(st.tuples(ATOMS, REPEATS).map("".join), repeated, max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(key=KEYS, path=st.text("ab.1", max_size=9))
def test_any_key_of_the_subset_matches_like_re(key: str, path: str) -> None:
    assert our_match(key, path) is peft_matches(key, path)


@example(key="[[]", path="[")
@settings(max_examples=150, deadline=None)
@given(key=st.text(r"ab.*+?|()[]{}^$\-,1d ", max_size=12), path=st.text("ab.1", max_size=6))
def test_any_text_is_refused_or_matches_like_re(key: str, path: str) -> None:
    try:
        ours = our_match(key, path)
    except PatternError:
        return
    assert ours is peft_matches(key, path)


OUTSIDE = (
    "(?=a)a",
    "(?!a)b",
    "(?<=a)b",
    "(?P<x>a)(?P=x)",
    r"(a)\1",
    "(?i)a",
    "a*+",
    "a**",
    "^*",
    "$?",
    "a{2}{3}",
    "*a",
    "(a",
    "a)",
    "a)(b",
    "[a",
    "[b-a]",
    r"[\.-9]",
    r"[\d-x]",
    "a\\",
    r"\bq_proj",
    r"\Zq",
    "a{1000}",
    "a{3,2}",
    "a{x}",
    "é{2",
    "(" * 100 + ")" * 100,
    "a" * (MAX_PATTERN_LENGTH + 1),
)


@pytest.mark.parametrize("key", OUTSIDE)
def test_key_outside_the_subset_is_refused(key: str) -> None:
    with pytest.raises(PatternError):
        compile_module_pattern(key)


EVIL = (
    "(a*)*b",
    "(a|a)*b",
    "(a|aa)+b",
    "(.*)*x",
    "((((.*)*)*)*)*x",
    "(.*.*.*.*.*.*.*.*)*x",
    "(([a-z.]+)+[a-z.]+)+x",
    "(((.{0,64}){0,64}){0,64}){0,64}x",
    "(a?){64}" + "a" * 64,
    "|".join(["(.*)*x"] * 30),
)


@pytest.mark.parametrize("key", EVIL)
def test_evil_key_takes_bounded_time(key: str) -> None:
    """One such key makes `re` run for hours on one path; here it meets 500."""
    paths = [f"model.layers.{layer}.{'a' * 60}" for layer in range(500)]
    started = time.perf_counter()
    try:
        assert first_matches([compile_module_pattern(key)], paths) == {}
    except PatternError as error:
        assert "too long" in str(error)
    assert time.perf_counter() - started < 5


def test_many_evil_keys_share_one_bound() -> None:
    patterns = [compile_module_pattern(f"(.*)*x{number}") for number in range(300)]
    with pytest.raises(PatternError, match="too long"):
        first_matches(patterns, [f"model.layers.{layer}.{'a' * 60}" for layer in range(500)])


@pytest.mark.parametrize("key", ["(" + "a" * 240 + "{})", "[^" + "~" * 240 + "{}]*"])
def test_many_long_keys_take_bounded_time(key: str) -> None:
    """As many as a configuration has room for, against every module of a model of 405 B parameters."""
    patterns = [compile_module_pattern(key.format(number)) for number in range(1000)]
    started = time.perf_counter()
    with pytest.raises(PatternError, match="too long"):
        first_matches(patterns, [f"model.layers.{layer}.{'a' * 12}" for layer in range(882)])
    assert time.perf_counter() - started < 5


def test_one_key_per_module_of_a_large_model_is_resolved() -> None:
    """What EVA writes for a model of 70 B parameters."""
    paths = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(80) for name in "abcdefg"]
    found = first_matches([compile_module_pattern(path) for path in paths], paths)
    assert found == {path: index for index, path in enumerate(paths)}


def test_first_key_wins() -> None:
    patterns = [compile_module_pattern(key) for key in ("x", ".*q_proj", "q_proj")]
    assert first_matches(patterns, PATHS[:3]) == {PATHS[0]: 1, PATHS[1]: 1}
