"""Client against a served fake engine; the server runs in this test's loop, the client in a thread."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import pytest
from server_fixture import Served, serving_server

from fusionserve.client import (
    CancelledError,
    Client,
    DeadlineExceededError,
    Generation,
    GenerationChunk,
    GenerationStarted,
    NotFoundError,
    UnavailableError,
)

Result = TypeVar("Result")


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving_server() as server:
        yield server


async def with_client(served: Served, use: Callable[[Client], Result]) -> Result:
    """What `use` returns for a client of the server."""

    def run() -> Result:
        with Client(str(served.app.grpc_address), timeout_s=10) as client:
            return use(client)

    return await asyncio.to_thread(run)


async def until_idle(served: Served) -> None:
    """Returns when the engine runs nothing, which must be soon."""
    async with asyncio.timeout(5):
        while served.engine.num_open:
            await asyncio.sleep(0.01)


async def test_generate_returns_the_whole_result(served: Served) -> None:
    result = await with_client(served, lambda client: client.generate("ab", adapter="beta", max_new_tokens=1))
    assert (result.text, result.usage.prompt_tokens, result.adaptation.kind) == ("lora0 ", 2, "lora")


async def test_chat_reaches_the_engine_as_messages(served: Served) -> None:
    chat = [{"role": "user", "content": "hi"}]
    await with_client(served, lambda client: client.generate(chat))
    assert served.engine.params[0].prompt.messages == (("user", "hi"),)  # type: ignore[union-attr]


async def test_no_time_at_all_is_not_the_default_timeout(served: Served) -> None:
    served.engine.gate = asyncio.Event()  # a quick answer could come before gRPC's timer fires
    with pytest.raises(DeadlineExceededError):
        await with_client(served, lambda client: client.generate("x", timeout_s=0.0))
    await until_idle(served)


async def test_stream_yields_typed_events_and_ends(served: Served) -> None:
    events = await with_client(served, lambda client: list(client.stream("x")))
    kinds = [type(event) for event in events]
    assert kinds == [GenerationStarted, *[GenerationChunk] * 4, Generation]


async def test_breaking_out_of_a_stream_cancels_it(served: Served) -> None:
    served.engine.gate = asyncio.Event()
    seen_open = []

    def use(client: Client) -> None:
        for _ in client.stream("x"):
            seen_open.append(served.engine.num_open)
            break
        asyncio.run_coroutine_threadsafe(until_idle(served), loop).result()

    loop = asyncio.get_running_loop()
    await with_client(served, use)
    assert seen_open == [1]


async def test_a_closed_stream_is_over(served: Served) -> None:
    served.engine.gate = asyncio.Event()

    def use(client: Client) -> list[object]:
        with client.stream("x") as events:
            next(events)
        return list(events)

    assert await with_client(served, use) == []
    await until_idle(served)


async def test_adapters_tokens_and_model(served: Served) -> None:
    def use(client: Client) -> None:
        client.wait_ready(5)
        assert client.tokenize("a") == (0, 97)
        assert client.detokenize([97], skip_special_tokens=False) == "a"
        model = client.model()
        assert (model.architecture, model.weight_bytes) == ("FakeForCausalLM", 5 << 30)
        assert client.adapters.load("gamma").version == 1
        assert client.adapters.reload("gamma", pin=True).pinned
        assert client.adapters.get("gamma").version == 2
        assert [adapter.name for adapter in client.adapters.list()] == ["alpha", "beta", "gamma"]
        client.adapters.unload("gamma")
        with pytest.raises(NotFoundError):
            client.adapters.unload("gamma")

    await with_client(served, use)


async def test_fusions_live(served: Served) -> None:
    def use(client: Client) -> None:
        assert client.fusions.load("duo").version == 1
        assert client.fusions.reload("duo", pin=True).version == 2
        assert client.fusions.get("duo").scope == "layer"
        assert [fusion.name for fusion in client.fusions.list()] == ["duo", "mix"]
        client.fusions.unload("duo", force=True)
        weights = client.generate("x", fusion="mix", fusion_weights="mean").fusion_weights
        assert weights is not None and weights.members == ("alpha", "beta")
        assert client.generate("x", fusion="mix").fusion_weights is None

    await with_client(served, use)


def test_wait_ready_gives_up_without_a_server() -> None:
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(UnavailableError, match=r"not ready after 0\.3 s: .*refused"),
    ):
        client.wait_ready(0.3)


def test_closed_client_makes_no_calls() -> None:
    client = Client("127.0.0.1:1")
    client.close()
    for call in (client.model, lambda: next(client.stream("x")), client.wait_ready):
        with pytest.raises(CancelledError, match="the client is closed"):
            call()
