"""AsyncClient against a served fake engine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from server_fixture import Served, serving_server, starting_server

from fusionserve import errors as engine_errors
from fusionserve.client import (
    AbortedError,
    AdapterState,
    AlreadyExistsError,
    AsyncClient,
    CancelledError,
    ClientError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    FinishReason,
    Generation,
    GenerationChunk,
    GenerationStarted,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
    channel,
)
from fusionserve.config import ServerConfig


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving_server() as server:
        yield server


@pytest.fixture
async def client(served: Served) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(str(served.app.grpc_address), timeout_s=10) as opened:
        yield opened


async def until_idle(served: Served) -> None:
    """Returns when the engine runs nothing, which must be soon."""
    async with asyncio.timeout(5):
        while served.engine.num_open:
            await asyncio.sleep(0.01)


async def test_generate_returns_the_whole_result(client: AsyncClient) -> None:
    result = await client.generate("ab", adapter="alpha", scale=0.5, logprobs=1, max_new_tokens=2)
    assert result.text == "lora0 lora1 "
    assert (result.token_ids, result.finish_reason) == ((0, 1), FinishReason.LENGTH)
    assert (result.usage.prompt_tokens, result.usage.generated_tokens) == (2, 2)
    assert [(member.name, member.weight) for member in result.adaptation.members] == [("alpha", 0.5)]
    assert result.timings.total_s == pytest.approx(0.003)
    assert result.candidates[0].logprobs[0].top[0].text == "t0"


async def test_stream_yields_typed_events_and_ends(client: AsyncClient) -> None:
    events = [event async for event in client.stream([97, 98], blend={"alpha": 0.5, "beta": 0.5})]
    assert isinstance(events[0], GenerationStarted)
    assert isinstance(events[-1], Generation)
    text = "".join(event.text for event in events if isinstance(event, GenerationChunk))
    assert text == events[-1].text
    assert events[0].adaptation.kind == "blend"


async def test_leaving_a_stream_cancels_it(served: Served, client: AsyncClient) -> None:
    async with client.stream("x", max_new_tokens=3) as events:
        served.engine.gate = asyncio.Event()
        await anext(events)
        assert served.engine.num_open == 1
    await until_idle(served)
    with pytest.raises(StopAsyncIteration):
        await anext(events)


async def test_dropping_a_stream_cancels_it(served: Served, client: AsyncClient) -> None:
    served.engine.gate = asyncio.Event()
    async for _ in client.stream("x"):
        assert served.engine.num_open == 1
        break
    await until_idle(served)


async def test_closing_a_stream_ends_the_iteration_of_another_task(
    served: Served, client: AsyncClient
) -> None:
    served.engine.gate = asyncio.Event()
    events = client.stream("x")
    await anext(events)
    reader = asyncio.create_task(anext(events))
    await asyncio.sleep(0.05)
    await events.close()
    with pytest.raises(StopAsyncIteration):
        await reader


async def test_tokenize_detokenize_and_model(client: AsyncClient) -> None:
    assert await client.tokenize("ab", add_special_tokens=False) == (97, 98)
    assert await client.detokenize([97, 0, 98]) == "ab"
    model = await client.model()
    assert (model.name, model.eos_token_ids, model.limits.adapter_pool_ranks) == ("fake-model", (0, 7), 64)


async def test_adapters_live(client: AsyncClient) -> None:
    loaded = await client.adapters.load("gamma", "folder/gamma", pin=True)
    assert (loaded.version, loaded.pinned, loaded.state) == (1, True, AdapterState.READY)
    assert loaded.load_time is not None and loaded.load_time.tzinfo is not None
    assert (await client.adapters.reload("gamma")).version == 2
    assert (await client.adapters.get("gamma")).version == 2
    assert (await client.adapters.unload("gamma", force=True)).state is AdapterState.AVAILABLE
    assert [adapter.name async for adapter in client.adapters.list()] == ["alpha", "beta"]


async def test_fusions_live_and_report_their_weights(client: AsyncClient) -> None:
    assert (await client.fusions.load("duo", pin=True)).pinned
    assert (await client.fusions.reload("duo")).version == 2
    loaded = await client.fusions.get("duo")
    assert ([member.name for member in loaded.members], loaded.value_kind) == (["alpha", "beta"], "low_rank")
    assert (await client.fusions.unload("duo")).state is AdapterState.AVAILABLE
    assert [fusion.name async for fusion in client.fusions.list()] == ["mix"]
    result = await client.generate("x", fusion="mix", excluded_members=["beta"], fusion_weights="per_module")
    assert (result.adaptation.name, result.adaptation.version) == ("mix", 1)
    assert result.fusion_weights is not None
    assert result.fusion_weights.mean == (0.75, 0.25)
    assert result.fusion_weights.modules[0].weights == (0.5, 0.5)
    events = [event async for event in client.stream("x", fusion="mix", fusion_weights="per_token")]
    chunk = events[1]
    assert isinstance(chunk, GenerationChunk)
    assert chunk.fusion_weights[0].weights == (0.75, 0.25)


async def test_list_goes_through_all_pages(served: Served, client: AsyncClient) -> None:
    status = served.engine.adapters["alpha"]
    names = [f"adapter-{number:03}" for number in range(120)]  # pages have 50
    served.engine.adapters = {name: replace(status, name=name) for name in names}
    assert [adapter.name async for adapter in client.adapters.list()] == names


ERRORS = [
    (engine_errors.InvalidRequestError("no", field="prompt"), InvalidRequestError),
    (engine_errors.AlreadyExistsError("taken"), AlreadyExistsError),
    (engine_errors.ArtifactError("bad file"), FailedPreconditionError),
    (engine_errors.PreconditionError("not so"), FailedPreconditionError),
    (engine_errors.ChecksumError("other bytes"), DataLossError),
    (engine_errors.CapacityError("full", retry_after_s=1.5), ResourceExhaustedError),
    (engine_errors.UnavailableError("draining"), UnavailableError),
    (engine_errors.AbortedError("unloaded"), AbortedError),
    (engine_errors.DeadlineError("late"), DeadlineExceededError),
]


@pytest.mark.parametrize(("raised", "expected"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
async def test_server_errors_are_typed(
    served: Served, client: AsyncClient, raised: engine_errors.FusionServeError, expected: type[ClientError]
) -> None:
    served.engine.error = raised
    with pytest.raises(expected) as caught:
        await client.generate("x")
    assert (caught.value.reason, caught.value.message) == (raised.reason, raised.message)
    assert caught.value.request_id


async def test_errors_carry_their_details(served: Served, client: AsyncClient) -> None:
    with pytest.raises(NotFoundError) as missing:
        await client.adapters.get("nobody")
    assert (missing.value.resource_type, missing.value.resource_name) == ("adapter", "nobody")
    assert str(missing.value).startswith("NOT_FOUND ADAPTER_NOT_FOUND: ")
    with pytest.raises(InvalidRequestError) as invalid:
        await client.generate("x", temperature=-1.0)
    assert [violation.field for violation in invalid.value.field_violations] == ["sampling.temperature"]
    served.engine.error = engine_errors.CapacityError("full", retry_after_s=1.5)
    with pytest.raises(ResourceExhaustedError) as full:
        await client.generate("x")
    assert full.value.retry_after_s == 1.5


async def test_a_bug_of_the_server_shows_only_the_request_id(served: Served, client: AsyncClient) -> None:
    served.engine.error = RuntimeError("secret")
    with pytest.raises(InternalError) as caught:
        await client.generate("x")
    assert "secret" not in str(caught.value)
    assert caught.value.request_id


async def test_errors_midway_reach_the_stream(served: Served, client: AsyncClient) -> None:
    served.engine.error_midway = engine_errors.AbortedError("unloaded", reason="ADAPTER_UNLOADED")
    seen = []
    with pytest.raises(AbortedError, match="ADAPTER_UNLOADED"):
        async for event in client.stream("x"):
            seen.append(event)
    assert len(seen) == 2


async def test_no_time_at_all_is_not_the_default_timeout(served: Served, client: AsyncClient) -> None:
    served.engine.gate = asyncio.Event()  # a quick answer could come before gRPC's timer fires
    with pytest.raises(DeadlineExceededError):
        await client.generate("x", timeout_s=0.0)
    await until_idle(served)


async def test_timeout_ends_the_call(served: Served, client: AsyncClient) -> None:
    served.engine.gate = asyncio.Event()
    with pytest.raises(DeadlineExceededError):
        await client.generate("x", timeout_s=0.1)
    await until_idle(served)


@pytest.mark.parametrize("prompt", ["x", "x" * (1 << 20)], ids=len)
async def test_retries_when_asked_to(served: Served, prompt: str) -> None:
    address = str(served.app.grpc_address)
    full = engine_errors.CapacityError("full", retry_after_s=0.05)
    async with AsyncClient(address) as once, AsyncClient(address, max_attempts=3) as patient:
        served.engine.error = full
        with pytest.raises(ResourceExhaustedError):
            await once.generate(prompt)
        served.engine.error = full
        assert (await patient.generate(prompt)).text


async def test_request_that_no_server_takes_by_default_is_sent_once() -> None:
    large = "x" * channel.MAX_RETRIED_BYTES
    assert len(large) <= 2 * ServerConfig().max_message_bytes, "more is refused without a word on retrying"
    async with (
        serving_server(max_message_bytes=2 * len(large)) as served,
        AsyncClient(str(served.app.grpc_address), max_attempts=3) as patient,
    ):
        served.engine.error = engine_errors.CapacityError("full", retry_after_s=0.05)
        with pytest.raises(ResourceExhaustedError):
            await patient.generate(large)
        served.engine.error = engine_errors.CapacityError("full", retry_after_s=0.05)
        assert (await patient.generate(large[1000:])).text


@pytest.mark.parametrize("token", ["a\n", "a b", "é"])
async def test_token_that_no_header_carries_is_no_servers_fault(token: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        AsyncClient("127.0.0.1:1", token=token)


async def test_wait_ready_waits_for_the_engine() -> None:
    async with starting_server() as server, AsyncClient(str(server.app.grpc_address)) as client:
        with pytest.raises(UnavailableError, match=r"not ready after 0\.2 s$"):
            await client.wait_ready(0.2)
        waiting = asyncio.create_task(client.wait_ready(10))
        await server.load()
        await waiting


async def test_wait_ready_says_what_was_wrong() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(
            UnavailableError, match=r"not ready after 0\.3 s: UNAVAILABLE: .*refused"
        ) as caught:
            await client.wait_ready(0.3)
    assert isinstance(caught.value.__cause__, UnavailableError)


async def test_no_server_is_unavailable() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError):
            await client.model()


async def test_cancelled_reader_of_a_closed_stream_is_cancelled(served: Served, client: AsyncClient) -> None:
    async def read() -> None:
        async for _ in stream:
            read_one.set()

    served.engine.gate, read_one = asyncio.Event(), asyncio.Event()
    stream = client.stream("x")
    reader = asyncio.create_task(read())
    await read_one.wait()
    await asyncio.sleep(0)  # it waits for the next message
    await stream.close()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await until_idle(served)


async def test_closing_a_stream_ends_its_readers_loop(served: Served, client: AsyncClient) -> None:
    async def read() -> int:
        return len([read_one.set() async for _ in stream])

    served.engine.gate, read_one = asyncio.Event(), asyncio.Event()
    stream = client.stream("x")
    reader = asyncio.create_task(read())
    await read_one.wait()
    await stream.close()
    assert await reader == 1


async def test_closing_the_client_is_an_error_of_its_calls(served: Served, client: AsyncClient) -> None:
    async def read() -> None:
        async for _ in client.stream("x"):
            pass

    served.engine.gate = asyncio.Event()
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            group.create_task(client.generate("y"))
            while served.engine.num_open < 2:
                await asyncio.sleep(0.01)
            await client.close()
    # The first error of a group cancels its other tasks.
    assert {type(error) for error in caught.value.exceptions} == {CancelledError}
    await until_idle(served)


async def test_closed_client_makes_no_calls(client: AsyncClient) -> None:
    await client.close()
    for call in (client.model, lambda: anext(client.stream("x")), client.wait_ready):
        with pytest.raises(CancelledError, match="the client is closed"):
            await call()


async def test_stream_of_a_closed_client_ends_with_an_error(served: Served, client: AsyncClient) -> None:
    served.engine.gate = asyncio.Event()
    async with client.stream("x") as stream:
        await anext(stream)
        await client.close()
        with pytest.raises(CancelledError):
            await anext(stream)


async def test_wait_that_is_given_up_ends_the_stream_with_an_error(
    served: Served, client: AsyncClient
) -> None:
    served.engine.gate = asyncio.Event()
    stream = client.stream("x")
    await anext(stream)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(stream), 0.02)
    await until_idle(served)
    with pytest.raises(CancelledError):
        await anext(stream)


async def test_wait_for_a_task_of_the_next_event_costs_none(served: Served, client: AsyncClient) -> None:
    served.engine.gate = asyncio.Event()
    async with client.stream("x") as stream:
        events = [await anext(stream)]
        coming = asyncio.ensure_future(anext(stream))
        for _ in range(3):
            assert not (await asyncio.wait({coming}, timeout=0.02))[0]
        served.engine.gate.set()
        events += [await coming, *[event async for event in stream]]
    assert isinstance(events[-1], Generation)
    assert "".join(event.text for event in events if isinstance(event, GenerationChunk)) == events[-1].text


async def test_aclosing_closes_a_stream(served: Served, client: AsyncClient) -> None:
    served.engine.gate = asyncio.Event()
    async with contextlib.aclosing(client.stream("x")) as stream:
        await anext(stream)
    await until_idle(served)
