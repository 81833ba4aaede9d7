"""The engine over copies that are late: the tokens that it gives when every copy is made in its step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from delayed_copies import DelayedCopies
from served_adapters import (
    TestedEngine,
    begin,
    blend,
    check_at_rest,
    collect,
    collect_all,
    long_request,
    lora,
    make_params,
    make_prompt,
    running_engine,
    tokens_of,
    until,
)
from served_fusions import write_fusion

from fusionserve.errors import AbortedError, InternalError
from fusionserve.generation import Adaptation, GenerateParams, SamplingParams

SEEDED = SamplingParams(temperature=0.9, seed=4)
KINDS = (
    Adaptation(),
    *(lora(name) for name in "abcd"),
    lora("a", 0.5),
    blend(a=0.5, b=0.8),
    blend(c=1.0, d=0.3),
    Adaptation("fusion", fusion="mix"),
)
POOL_RANKS = 20  # the fusion, or five adapters' worth: two or three kinds at once


@pytest.fixture
def fusions(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    directory = tmp_path_factory.mktemp("fusions")
    write_fusion(directory, "mix", ("a", "b"), root, seed=3)
    return directory


@pytest.fixture
async def late(model: Path, root: Path) -> AsyncIterator[TestedEngine]:
    """An engine whose copies are made when the test says so, and which holds two adapters at once."""
    async with running_engine(model, root, DelayedCopies(None), adapter_pool_ranks=8) as engine:
        yield engine
        copies_of(engine).num_questions = 0


def copies_of(engine: TestedEngine) -> DelayedCopies:
    copies = engine._base.pool.copies
    assert isinstance(copies, DelayedCopies)
    return copies


def churn(seed: int) -> list[GenerateParams]:
    """Every kind twice, in an order of its own, so that each needs rows that another has."""
    order = [(index * 7 + seed) % (2 * len(KINDS)) for index in range(2 * len(KINDS))]
    return [
        make_params(
            f"r{number}",
            KINDS[number % len(KINDS)],
            make_prompt(number, 3 + 2 * (number % 9)),
            num_tokens=4 + number % 5,
            **({"sampling": SEEDED} if number % 3 == 0 else {}),
        )
        for number in order
    ]


@pytest.mark.parametrize("num_questions", [0, 1, 5])
async def test_late_copies_change_no_token(
    num_questions: int, model: Path, root: Path, fusions: Path
) -> None:
    options = {"fusion_dirs": (fusions,), "adapter_pool_ranks": POOL_RANKS, "max_batch_requests": 6}
    found: dict[bool, dict[str, tuple[int, ...]]] = {}
    copies = DelayedCopies(num_questions)
    for is_late in (False, True):
        async with running_engine(model, root, copies if is_late else None, **options) as engine:
            tokens = {}
            for seed in range(3):
                outcomes = await collect_all(engine, churn(seed))
                tokens |= {
                    f"{seed}-{params.request_id}": outcome.tokens
                    for params, outcome in zip(churn(seed), outcomes, strict=True)
                }
            found[is_late] = tokens
            await engine.unload_fusion("mix", force=False)
    assert found[True] == found[False]
    assert copies.num_begun > 10, "the pool is too large for a churn"


async def test_cold_adapter_holds_up_nobody_else(late: TestedEngine) -> None:
    with late.runner.paused():
        (stream,) = await begin(late, make_params("base", num_tokens=60))
    cold = asyncio.create_task(collect(late, long_request("a", "cold")))
    assert len(await stream.tokens()) == 60
    await until(lambda: copies_of(late).num_begun == 1)
    assert not cold.done()
    copies_of(late).finish()
    assert len((await cold).tokens) == 60


async def test_unload_while_the_copy_is_under_way_ends_its_requests(late: TestedEngine) -> None:
    cold = asyncio.create_task(collect(late, long_request("a", "cold")))
    await until(lambda: copies_of(late).num_under_way == 1)
    await late.unload_adapter("a", force=True)
    with pytest.raises(AbortedError):
        await cold
    await check_at_rest(late)
    await until(lambda: late.ledger.num_used == 0)
    copies_of(late).num_questions = 1
    alone = {name: await tokens_of(late, name) for name in "ab"}
    assert {name: await tokens_of(late, name) for name in "ba"} == alone
    assert len(set(alone.values())) == 2


async def test_copy_that_cannot_begin_ends_its_request_only(late: TestedEngine) -> None:
    copies = copies_of(late)
    copies.num_questions = 1
    alone = {name: await tokens_of(late, name, 60) for name in "ab"}
    copies.begin, begin_copy = _fail, copies.begin  # type: ignore[method-assign]
    with late.runner.paused():
        (stream,) = await begin(late, long_request("b"))
    with pytest.raises(InternalError):
        await collect(late, make_params("unlucky", lora("c")))
    assert await stream.tokens() == alone["b"]
    copies.begin = begin_copy  # type: ignore[method-assign]
    assert len(await tokens_of(late, "c")) == 12
    assert await tokens_of(late, "a", 60) == alone["a"]


def _fail(uid: int, write: Callable[[], None]) -> None:
    raise RuntimeError("as the test wants it")
