"""What a request is refused for before anything is allocated, to the token, and how its admission ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from adapter_disk import SIZE, Disk, forget

from fusionserve.adapters.registry import AdapterRegistry
from fusionserve.adapters.store import AdapterStore
from fusionserve.engine.admission import Admission
from fusionserve.engine.request import Generation
from fusionserve.engine.tokenizer import Tokenizer
from fusionserve.engine.unadmitted import TimeLimitPassed
from fusionserve.errors import DeadlineError, InvalidRequestError, PreconditionError, UnavailableError
from fusionserve.generation import (
    Adaptation,
    AdapterTerm,
    GenerateParams,
    SamplingParams,
    StoppingCriteria,
    TextPrompt,
    TokenPrompt,
)

VOCAB, CONTEXT, DEFAULT_NEW_TOKENS = 50, 20, 8
ADA = Adaptation("lora", (AdapterTerm("ada", 1.0),))


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    disk = Disk(tmp_path)
    disk.write("ada")
    return disk


@pytest.fixture
async def admission(disk: Disk) -> AsyncIterator[Admission]:
    """Of a model without a tokenizer, and with one adapter on disk."""
    store = AdapterStore(AdapterRegistry(8 * SIZE, forget), disk.roots, disk.load_content)
    fusions: Any = None
    admission = Admission(
        Tokenizer(None),
        store,
        fusions,
        vocab_size=VOCAB,
        max_context_tokens=CONTEXT,
        default_max_new_tokens=DEFAULT_NEW_TOKENS,
        pool_ranks=4,
    )
    yield admission
    admission.close()
    disk.gate.set()
    await store.close(5)
    store.registry.check_integrity(0)
    assert admission._limits == set()


def asking(
    num_prompt_tokens: int = 4, stopping: dict[str, Any] | None = None, **fields: Any
) -> GenerateParams:
    prompt = TokenPrompt((1,) * num_prompt_tokens)
    return GenerateParams(
        **{"request_id": "r", "prompt": prompt, "stopping": StoppingCriteria(**stopping or {}), **fields}
    )


async def admit(admission: Admission, params: GenerateParams) -> Generation:
    return await admission.admit(params, lambda num_tokens: None)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "stopping", "granted"),
    [
        (4, {}, DEFAULT_NEW_TOKENS),
        (CONTEXT - 3, {}, 3),
        (CONTEXT - 1, {}, 1),
        (4, {"max_new_tokens": CONTEXT - 4}, CONTEXT - 4),
        (4, {"min_new_tokens": DEFAULT_NEW_TOKENS}, DEFAULT_NEW_TOKENS),
    ],
)
async def test_new_tokens_are_those_asked_for_or_the_default_as_far_as_there_is_room(
    admission: Admission, num_prompt_tokens: int, stopping: dict[str, Any], granted: int
) -> None:
    assert (await admit(admission, asking(num_prompt_tokens, stopping))).max_new_tokens == granted


REFUSED = {
    "no tokens": (asking(0), "prompt", "PROMPT_EMPTY"),
    "full context": (asking(CONTEXT), "prompt", "PROMPT_TOO_LONG"),
    "one too many": (
        asking(4, {"max_new_tokens": CONTEXT - 3}),
        "stopping.max_new_tokens",
        "CONTEXT_EXCEEDED",
    ),
    "minimum": (
        asking(4, {"min_new_tokens": DEFAULT_NEW_TOKENS + 1}),
        "stopping.min_new_tokens",
        "OUT_OF_RANGE",
    ),
    "large text": (asking(prompt=TextPrompt("é" * (40 << 10))), "prompt", "PROMPT_TOO_LONG"),
    **{
        f"{name} {token_id}": (params, field, "TOKEN_OUT_OF_RANGE")
        for token_id in (-1, VOCAB)
        for name, field, params in (
            ("prompt", "token_ids", asking(prompt=TokenPrompt((1, token_id, 2)))),
            ("stop", "stopping.stop_token_ids", asking(stopping={"stop_token_ids": (1, token_id)})),
            ("bias", "sampling.logit_bias", asking(sampling=SamplingParams(logit_bias={token_id: 1.0}))),
        )
    },
}


@pytest.mark.parametrize(("params", "field", "reason"), REFUSED.values(), ids=REFUSED)
async def test_what_does_not_fit_the_model_is_refused_by_its_field(
    admission: Admission, params: GenerateParams, field: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        await admit(admission, params)
    assert (refusal.value.field, refusal.value.reason) == (field, reason)


@pytest.mark.parametrize("params", [asking(prompt=TextPrompt("é")), asking(stopping={"stop": ("a",)})])
async def test_text_without_a_tokenizer_is_refused(admission: Admission, params: GenerateParams) -> None:
    with pytest.raises(PreconditionError) as refusal:
        await admit(admission, params)
    assert refusal.value.reason == "NO_TOKENIZER"


async def test_tokens_of_all_candidates_are_taken_before_the_leases(admission: Admission, disk: Disk) -> None:
    taken: list[int] = []

    def take(num_tokens: int) -> None:
        taken.append(num_tokens)
        raise UnavailableError("no more")

    with pytest.raises(UnavailableError):
        await admission.admit(asking(4, {"max_new_tokens": 5}, num_candidates=3, adaptation=ADA), take)
    assert (taken, disk.num_reads) == ([4 + 3 * 5], 0)


async def test_seed_is_the_requests_or_a_fresh_one(admission: Admission) -> None:
    assert (await admit(admission, asking(sampling=SamplingParams(seed=0)))).seed == 0
    assert len({(await admit(admission, asking())).seed for _ in range(3)}) == 3


async def test_admission_ends_with_what_passes_first(admission: Admission, disk: Disk) -> None:
    disk.gate.clear()
    soon_s, late_s = 0.02, 30.0
    limited = asking(4, {"time_limit_s": soon_s}, adaptation=ADA, deadline_s=time.monotonic() + late_s)
    with pytest.raises(TimeLimitPassed):
        await admit(admission, limited)
    late = asking(4, {"time_limit_s": late_s}, adaptation=ADA, deadline_s=time.monotonic() + soon_s)
    with pytest.raises(DeadlineError):
        await admit(admission, late)


async def test_admissions_under_way_end_with_the_server(admission: Admission, disk: Disk) -> None:
    disk.gate.clear()
    waiting = [asyncio.create_task(admit(admission, asking(adaptation=ADA))) for _ in range(2)]
    async with asyncio.timeout(10):
        while disk.num_reads == 0:
            await asyncio.sleep(0.001)
    admission.end()
    await asyncio.sleep(0)  # their limits have expired, and they do not know it yet
    admission.end()
    for task in waiting:
        with pytest.raises(UnavailableError) as refusal:
            await task
        assert refusal.value.reason == "DRAINING"
