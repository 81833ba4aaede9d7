"""What is refused when the server has its hands full, and that what a request held is there again at its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served_adapters import (
    TestedEngine,
    begin,
    collect,
    lora,
    make_params,
    make_prompt,
    running_engine,
    until,
)

from fusionserve.config import EMBEDDED_MODEL
from fusionserve.engine.tokenizer import Tokenizer
from fusionserve.errors import CapacityError, NotFoundError
from fusionserve.generation import GenerateParams, TextPrompt

MAX_OPEN_TOKENS = 200
MAX_WAITING_CALLS = 64


def of_tokens(num_tokens: int, request_id: str, name: str = "a") -> GenerateParams:
    """A request that may come to have so many, all but 8 of them new."""
    return make_params(request_id, lora(name), make_prompt(1, 8), num_tokens=num_tokens - 8)


def assert_come_back_later(refusal: pytest.ExceptionInfo[CapacityError], reason: str) -> None:
    assert refusal.value.reason == reason
    assert refusal.value.retry_after_s is not None


@pytest.fixture
async def narrow(model: Path, root: Path) -> AsyncIterator[TestedEngine]:
    async with running_engine(model, root, max_open_tokens=MAX_OPEN_TOKENS) as engine:
        yield engine


async def assert_all_free(engine: TestedEngine) -> None:
    """One request gets all the tokens there may be."""
    await collect(engine, of_tokens(MAX_OPEN_TOKENS, "all"))


async def test_tokens_are_held_until_their_request_ends(narrow: TestedEngine) -> None:
    with narrow.runner.paused():
        streams = await begin(narrow, of_tokens(120, "one"), of_tokens(80, "two"))
        with pytest.raises(CapacityError) as refusal:
            await collect(narrow, of_tokens(9, "three"))
        assert_come_back_later(refusal, "TOKENS_FULL")
    await streams[1].task
    await collect(narrow, of_tokens(80, "three"))
    await streams[0].task
    await assert_all_free(narrow)


async def test_every_candidate_counts(narrow: TestedEngine) -> None:
    fits = replace(of_tokens(8 + 96, "fits"), num_candidates=2)
    await collect(narrow, fits)
    with pytest.raises(CapacityError) as refusal:
        await collect(narrow, replace(of_tokens(8 + 97, "more"), num_candidates=2))
    assert (refusal.value.reason, refusal.value.retry_after_s) == ("TOKENS_FULL", None)  # nor will it later
    assert refusal.value.metadata == {"max": str(MAX_OPEN_TOKENS)}
    await assert_all_free(narrow)


async def test_tokens_are_given_back_when_the_client_leaves(narrow: TestedEngine) -> None:
    with narrow.runner.paused():
        async with aclosing(narrow.generate(of_tokens(MAX_OPEN_TOKENS, "left"))) as stream:
            narrow.runner.allow(2)
            await anext(stream)
    await assert_all_free(narrow)


async def test_tokens_are_given_back_when_the_request_is_refused(narrow: TestedEngine) -> None:
    with pytest.raises(NotFoundError):
        await collect(narrow, of_tokens(MAX_OPEN_TOKENS, "unknown", "nobody"))
    await assert_all_free(narrow)


@pytest.fixture
def slow_tokenizer(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Calls wait until it is set."""
    gate = threading.Event()

    def waiting(call: Any) -> Any:
        def wait_first(*arguments: Any, **options: Any) -> Any:
            assert gate.wait(30), "nobody opened the gate"
            return call(*arguments, **options)

        return wait_first

    for name in ("encode", "decode"):
        monkeypatch.setattr(Tokenizer, name, waiting(getattr(Tokenizer, name)))
    return gate


async def test_calls_that_wait_for_the_tokenizer_have_a_limit(slow_tokenizer: threading.Event) -> None:
    async with running_engine(EMBEDDED_MODEL, None, model_name="fusionserve-tiny") as engine:

        def calls(num_calls: int) -> list[asyncio.Task[object]]:
            both = (
                lambda: engine.tokenize(TextPrompt("a b"), add_special_tokens=False),
                lambda: engine.detokenize((5, 6), skip_special_tokens=False),
            )
            return [asyncio.create_task(both[n % 2]()) for n in range(num_calls)]

        waiting = calls(MAX_WAITING_CALLS)
        refused = await asyncio.gather(*calls(2), return_exceptions=True)
        assert [(type(each), each.reason) for each in refused] == 2 * [(CapacityError, "TOKENIZER_BUSY")]
        assert all(each.retry_after_s is not None for each in refused)
        slow_tokenizer.set()
        ids, text, *others = await asyncio.gather(*waiting)
        assert others == [ids, text] * (MAX_WAITING_CALLS // 2 - 1)
        assert await asyncio.gather(*calls(MAX_WAITING_CALLS)) == [ids, text, *others]


async def test_loads_that_wait_have_a_limit_and_unloads_and_lists_have_none(
    fusion_engine: TestedEngine,
) -> None:
    engine = fusion_engine

    def loads(num_loads: int) -> list[asyncio.Task[object]]:
        load = engine.load_adapter
        return [asyncio.create_task(load("ada", None, pin=False, replace=True)) for _ in range(num_loads)]

    await engine.load_adapter("bea", None, pin=False, replace=False)
    with engine.slow_loads():
        waiting = loads(MAX_WAITING_CALLS)
        await until(lambda: engine.num_reads == 2)
        for load in (engine.load_adapter, engine.load_fusion):
            with pytest.raises(CapacityError) as refusal:
                await load("cid", None, pin=False, replace=False)
            assert_come_back_later(refusal, "LOADER_BUSY")
        assert [status.name for status in await engine.list_adapters()] == ["ada", "bea", "cid"]
        await engine.unload_adapter("bea", force=False)
    versions = {status.version for status in await asyncio.gather(*waiting)}
    assert max(versions) == MAX_WAITING_CALLS
    await asyncio.gather(*loads(MAX_WAITING_CALLS))
