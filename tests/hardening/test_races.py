"""Requests that meet an unload, a reload, a cancel, another of their id or a shutdown, over gRPC, at many moments."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from served_adapters import TestedEngine, check_at_rest, until, write_lora, write_model

from fusionserve.client import (
    AbortedError,
    AlreadyExistsError,
    AsyncClient,
    ClientError,
    DeadlineExceededError,
    Generation,
    NotFoundError,
    UnavailableError,
)
from fusionserve.config import EngineConfig, ServerConfig
from fusionserve.metrics import AdapterLabels
from fusionserve.server.app import App

ROUNDS = 60
PROMPT = [5, 9, 17, 4, 30, 22]
NUM_TOKENS = 30
MAX_DELAY_S = 0.03


class Served:
    """A real engine behind a real listener, and clients of it."""

    def __init__(self, app: App, engine: TestedEngine, client: AsyncClient) -> None:
        self.app, self.engine, self.client = app, engine, client

    async def tokens(self, **fields: object) -> tuple[int, ...]:
        """What a request says, under adapter `a` unless told otherwise."""
        options = {"adapter": "a", "temperature": 0.9, "seed": 3, "max_new_tokens": NUM_TOKENS, **fields}
        last = None
        async for event in self.client.stream(PROMPT, ignore_eos=True, **options):
            last = event
        assert isinstance(last, Generation)
        return last.token_ids


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def served(model: Path, tmp_path: Path) -> AsyncIterator[Served]:
    for seed, name in enumerate(("a", "b")):
        write_lora(tmp_path / name, seed=seed)
    app = App(
        ServerConfig(listen="127.0.0.1:0", metrics_listen="off", drain_window_s=0.0, drain_grace_s=0.05),
        max_open_requests=320,
    )
    await app.start()
    made: list[TestedEngine] = []

    def load(labels: AdapterLabels) -> TestedEngine:
        config = EngineConfig(
            model=str(model),
            model_name="tiny",
            dtype="float32",
            adapter_dirs=(tmp_path,),
            kv_cache_bytes=4 << 20,
            num_threads=1,
        )
        engine = TestedEngine.load(config, labels)
        assert isinstance(engine, TestedEngine)
        made.append(engine)
        return engine

    await app.load(load)
    try:
        async with AsyncClient(str(app.grpc_address), timeout_s=30) as client:
            yield Served(app, made[0], client)
        await check_at_rest(made[0])
    finally:
        await app.close(0)


async def outcomes(
    served: Served, act: Callable[[int], Awaitable[object]], rounds: int = ROUNDS
) -> Counter[str]:
    """How a stream ended while `act` happened at a random moment of it: "whole" with the tokens it has alone."""
    alone = await served.tokens()
    draws, ends = random.Random(1), Counter[str]()
    for number in range(rounds):
        stream = asyncio.create_task(served.tokens())
        await asyncio.sleep(draws.random() * MAX_DELAY_S)
        acting = asyncio.ensure_future(act(number))
        try:
            assert await stream == alone
            ends["whole"] += 1
        except ClientError as error:
            ends[type(error).__name__] += 1
        await acting
    return ends


async def test_unload_lets_streams_finish(served: Served) -> None:
    async def unload(number: int) -> None:
        with suppress(NotFoundError):  # the stream has not begun yet
            await served.client.adapters.unload("a")

    assert await outcomes(served, unload) == {"whole": ROUNDS}


async def test_forced_unload_ends_streams_or_meets_none(served: Served) -> None:
    async def unload(number: int) -> None:
        with suppress(NotFoundError):
            await served.client.adapters.unload("a", force=True)

    ends = await outcomes(served, unload)
    assert ends.keys() <= {"whole", AbortedError.__name__} and ends[AbortedError.__name__] > 0


async def test_reload_changes_no_running_stream(served: Served) -> None:
    ends = await outcomes(served, lambda number: served.client.adapters.reload("a"))
    assert ends == {"whole": ROUNDS}


async def test_cancel_of_another_changes_nothing(served: Served) -> None:
    async def open_and_cancel(number: int) -> None:
        other = asyncio.create_task(served.tokens(adapter="b"))
        await asyncio.sleep(0.001 * (number % 10))
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        await until(lambda: len(served.engine._streams) <= 1)

    assert await outcomes(served, open_and_cancel) == {"whole": ROUNDS}


async def test_deadlines_at_any_moment(served: Served) -> None:
    alone = await served.tokens()
    draws, ends = random.Random(2), Counter[str]()
    for _ in range(ROUNDS):
        try:
            assert await served.tokens(timeout_s=draws.random() * MAX_DELAY_S) == alone
            ends["whole"] += 1
        except DeadlineExceededError:
            ends["late"] += 1
    assert ends["late"] > 0


async def test_one_id_at_once(served: Served) -> None:
    """Of three at once one is served; the engine is paused until two are refused, lest it end before they come."""
    alone = await served.tokens()
    for number in range(ROUNDS):
        with served.engine.runner.paused():
            streams = [asyncio.create_task(served.tokens(request_id=f"same-{number}")) for _ in range(3)]
            await until(lambda streams=streams: sum(stream.done() for stream in streams) == 2)
        results = await asyncio.gather(*streams, return_exceptions=True)
        assert sum(isinstance(result, AlreadyExistsError) for result in results) == 2, results
        assert alone in results
    assert await served.tokens(request_id="same-0") == alone, "an id is free again once its request has ended"


async def test_shutdown_ends_every_stream_in_one_way_or_another(served: Served) -> None:
    alone = await served.tokens()
    streams = [asyncio.create_task(served.tokens()) for _ in range(12)]
    await asyncio.sleep(0.01)
    streams += [asyncio.create_task(served.tokens(max_new_tokens=400)) for _ in range(4)]
    draining = asyncio.create_task(served.app.drain())
    streams += [asyncio.create_task(served.tokens()) for _ in range(4)]
    ended = await asyncio.gather(*streams, return_exceptions=True)
    await draining
    for result in ended:
        if isinstance(result, tuple):
            assert result[:NUM_TOKENS] == alone
        else:
            assert isinstance(result, UnavailableError) and result.reason == "DRAINING", result
    assert sum(isinstance(result, UnavailableError) for result in ended) >= 4
