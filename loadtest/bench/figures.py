"""From rounds to figures: medians, spread, ratios within a repeat, share of the floor, agreement of tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fusionserve.loadtest.bench.floor import Floor
from fusionserve.loadtest.bench.protocol import BASE, FUSION, MIXED, SAMPLED, Outcome
from fusionserve.loadtest.bench.systems import (
    LLAMA_CPP,
    LLAMA_CPP_Q8,
    OURS,
    OURS_BARE,
    OURS_INT4,
    OURS_INT8,
    OURS_WIRE,
    OURS_WIRE_BY_4,
    PEFT,
    TRANSFORMERS,
    VLLM,
    VLLM_LORA,
)

Key = tuple[str, str]  # (system, kind)
Outcomes = Mapping[Key, Sequence[Outcome]]
# Whose tokens the others' are compared with; nobody else has fusions.
REFERENCE = {BASE: TRANSFORMERS, MIXED: PEFT}


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the least and greatest of what it is the median of."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Of one number per repeat."""
        return cls(statistics.median(numbers), min(numbers), max(numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One line of a table; shares and agreements are None where there is nothing to compare with."""

    tokens_per_s: Spread
    prompt_s: float | None  # None where prompts and decoding do not part
    decode_s: float | None
    ours_times: Spread | None  # our tokens/s of the same kind, in process, divided by these
    floor_share: float | None  # the floor's seconds divided by these, each within its repeat
    decode_floor_share: float | None
    first_tokens_equal: float | None  # of the reference's, over all prompts and repeats


@dataclass(frozen=True, slots=True)
class Ratio:
    """Tokens/s of one line divided by those of another; `bars` by workload is what the project asks of itself."""

    label: str
    over: Key
    under: Key
    bars: Mapping[str, float] = field(default_factory=dict)


_BEST_PEER = {"W1": 1.5, "W2": 1.3, "W4": 1.0}

RATIOS = (
    Ratio("base / vLLM base", (OURS, BASE), (VLLM, BASE), _BEST_PEER),
    Ratio("base / llama.cpp base", (OURS, BASE), (LLAMA_CPP, BASE), _BEST_PEER),
    Ratio("base / transformers", (OURS, BASE), (TRANSFORMERS, BASE), {"W1": 2.4, "W2": 1.3, "W4": 1.0}),
    Ratio("mixed / our base", (OURS, MIXED), (OURS, BASE), {"W1": 0.80, "W2": 0.85}),
    Ratio("mixed / vLLM mixed", (OURS, MIXED), (VLLM_LORA, MIXED), {"W1": 8.0}),
    Ratio("mixed / PEFT mixed", (OURS, MIXED), (PEFT, MIXED), {"W1": 4.0}),
    Ratio("mixed / llama.cpp mixed", (OURS, MIXED), (LLAMA_CPP, MIXED), {"W1": 3.5}),
    Ratio("fusion of 4 / our base", (OURS, FUSION), (OURS, BASE), {"W1": 0.75}),
    Ratio("sampled / our base", (OURS, SAMPLED), (OURS, BASE)),
    Ratio("sampled / vLLM sampled", (OURS, SAMPLED), (VLLM, SAMPLED)),
    Ratio("sampled / transformers sampled", (OURS, SAMPLED), (TRANSFORMERS, SAMPLED)),
    Ratio("base with adapters in the pool / without", (OURS, BASE), (OURS_BARE, BASE), {"W1": 0.98}),
    Ratio("int8 base / llama.cpp Q8_0", (OURS_INT8, BASE), (LLAMA_CPP_Q8, BASE), {"W1": 1.0, "W4": 1.0}),
    Ratio("int4 base / llama.cpp Q8_0", (OURS_INT4, BASE), (LLAMA_CPP_Q8, BASE), {}),
    Ratio("int8 mixed / int8 base", (OURS_INT8, MIXED), (OURS_INT8, BASE), {}),
    Ratio("gRPC / in process, base", (OURS_WIRE, BASE), (OURS, BASE), {"W1": 0.95}),
    Ratio("gRPC / in process, mixed", (OURS_WIRE, MIXED), (OURS, MIXED), {"W1": 0.95}),
    Ratio("gRPC by 4 tokens / in process, base", (OURS_WIRE_BY_4, BASE), (OURS, BASE)),
    Ratio("gRPC by 4 tokens / in process, mixed", (OURS_WIRE_BY_4, MIXED), (OURS, MIXED)),
)


def figures(key: Key, outcomes: Outcomes, floors: Sequence[Floor]) -> Figures:
    """The line of one system and kind; `floors` has one per repeat, or none if the arithmetic is not its own."""
    mine = outcomes[key]
    parts = [(each.prompt_s, each.total_s - each.prompt_s) for each in mine if each.prompt_s is not None]
    prompt_s, decode_s = map(statistics.median, zip(*parts, strict=True)) if parts else (None, None)
    return Figures(
        tokens_per_s=Spread.of([tokens_per_s(each) for each in mine]),
        prompt_s=prompt_s,
        decode_s=decode_s,
        ours_times=ratio((OURS, key[1]), key, outcomes),
        floor_share=_median(least.total_s / each.total_s for least, each in zip(floors, mine, strict=False)),
        decode_floor_share=_median(
            least.decode_s / part[1] for least, part in zip(floors, parts, strict=False) if part[1]
        ),
        first_tokens_equal=first_tokens_equal(key, outcomes),
    )


def _median(numbers: Iterable[float]) -> float | None:
    """None of nothing."""
    listed = list(numbers)
    return statistics.median(listed) if listed else None


def tokens_per_s(outcome: Outcome) -> float:
    """Generated tokens by the time of the whole round."""
    return sum(map(len, outcome.token_ids)) / outcome.total_s


def ratio(over: Key, under: Key, outcomes: Outcomes) -> Spread | None:
    """Tokens/s of `over` by those of `under`, each within its repeat; None if one of them did not run."""
    if over not in outcomes or under not in outcomes:
        return None
    pairs = zip(outcomes[over], outcomes[under], strict=True)
    return Spread.of([tokens_per_s(mine) / tokens_per_s(theirs) for mine, theirs in pairs])


def first_tokens_equal(key: Key, outcomes: Outcomes) -> float | None:
    """The share of prompts after which the first token is the reference's."""
    reference = (REFERENCE.get(key[1], ""), key[1])
    if reference not in outcomes:
        return None
    equal = [
        mine[0] == theirs[0]
        for own, expected in zip(outcomes[key], outcomes[reference], strict=True)
        for mine, theirs in zip(own.token_ids, expected.token_ids, strict=True)
    ]
    return sum(equal) / len(equal)
