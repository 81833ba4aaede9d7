"""Bad requests through a real client to a real server: each gets its answer, and a stream beside it its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence

import grpc
import pytest
from bad_requests import GENERATE, STREAM, Case, corpus, generation
from extreme_requests import systematic
from front_door import HEALTHY, check_form, healthy, in_batches, send
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_fixture import Failure
from server_process import TIGHT_HEAP, ServerProcess, server_process

from fusionserve.v1 import inference_pb2

ALLOWED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}
MEBIBYTE = 1 << 20
SMALL_BYTES = 100_000


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with server_process(heap=TIGHT_HEAP) as server:
        yield server
        assert server.process.poll() is None, "it is alive"
        server.terminate()
        assert server.wait() == 0


@pytest.fixture
async def channel(server: ServerProcess) -> AsyncIterator[aio.Channel]:
    async with aio.insecure_channel(server.grpc) as channel:
        yield channel


def check_answer(case: Case, failure: Failure | None) -> None:
    """The exact answer of a case of the corpus."""
    if case.code == "OK":
        assert failure is None, (case.name, failure)
        return
    assert failure is not None, f"{case.name} was served"
    check_form(case.name, failure)
    assert failure.code.name == case.code, (case.name, failure)
    if case.reason:
        assert failure.reason == case.reason, (case.name, failure)
    if case.field:
        assert failure.field == case.field, (case.name, failure)
    if case.resource:
        assert failure.details["ResourceInfo"].resource_type == case.resource, case.name  # type: ignore[attr-defined]


def test_names_of_the_corpus_are_its_own() -> None:
    names = [(case.name, case.method) for case in corpus()]
    assert len(set(names)) == len(names) > 400


async def test_every_bad_request_gets_its_answer(channel: aio.Channel) -> None:
    alone = [await healthy(channel, which) for which in range(len(HEALTHY))]
    for number, cases in enumerate(in_batches(corpus())):
        which = number % len(HEALTHY)
        beside = asyncio.create_task(healthy(channel, which))
        failures = await asyncio.gather(*(send(channel, case.method, case.request) for case in cases))
        for case, failure in zip(cases, failures, strict=True):
            check_answer(case, failure)
        assert await beside == alone[which], [case.name for case in cases]


async def test_every_field_at_its_extremes_is_served_or_refused(channel: aio.Channel) -> None:
    alone = [await healthy(channel, which) for which in range(len(HEALTHY))]
    for number, cases in enumerate(in_batches(systematic())):
        which = number % len(HEALTHY)
        beside = asyncio.create_task(healthy(channel, which))
        failures = await asyncio.gather(*(send(channel, method, request) for _, method, request in cases))
        for (name, _, _), failure in zip(cases, failures, strict=True):
            if failure is not None:
                assert failure.code.name in ALLOWED, (name, failure)
                check_form(name, failure)
        assert await beside == alone[which], [name for name, _, _ in cases]


async def test_giant_text_is_refused_before_it_is_tokenized(channel: aio.Channel) -> None:
    """Tokenizing takes a second per megabyte, and so much memory that it may be refused for that alone."""
    failure = await send(channel, GENERATE, generation(text="a b " * (1 << 18)).SerializeToString())
    assert failure is not None and failure.reason == "PROMPT_TOO_LONG"
    assert failure.details["ErrorInfo"].metadata == {"max_prompt_bytes": str(64 << 10)}  # type: ignore[attr-defined]


async def test_request_id_in_flight_is_taken(channel: aio.Channel) -> None:
    request = generation(request_id="mine")
    request.stopping.max_new_tokens = 400
    stream = channel.unary_stream(STREAM)(
        inference_pb2.StreamGenerateRequest(request=request).SerializeToString()
    )
    await stream.read()
    failure = await send(channel, GENERATE, request.SerializeToString())
    assert failure is not None
    assert (failure.code.name, failure.reason) == ("ALREADY_EXISTS", "REQUEST_ID_IN_USE")
    stream.cancel()


@pytest.mark.parametrize("timeout_s", [-1.0, 0.0, 0.001])
async def test_deadline_that_cannot_be_met(channel: aio.Channel, timeout_s: float) -> None:
    request = generation()
    request.stopping.max_new_tokens = 900
    for method, message in (
        (GENERATE, request),
        (STREAM, inference_pb2.StreamGenerateRequest(request=request)),
    ):
        failure = await send(channel, method, message.SerializeToString(), timeout_s)
        assert failure is not None and failure.code is grpc.StatusCode.DEADLINE_EXCEEDED


HOSTILE: dict[str, list[tuple[str, str | bytes]]] = {
    "17 kB": [("x-large", "a" * 17_000)],
    "500 keys": [(f"key-{number}", "a" * 20) for number in range(500)],
    "binary": [("junk-bin", bytes(range(256)) * 64)],
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_giant_metadata_is_refused_and_its_channel_goes_on(channel: aio.Channel, name: str) -> None:
    call = channel.unary_unary(GENERATE)(generation().SerializeToString(), metadata=HOSTILE[name], timeout=30)
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await send(channel, GENERATE, generation().SerializeToString()) is None


@pytest.mark.parametrize(
    "metadata",
    [
        ("traceparent", "nonsense"),
        ("authorization", "Bearer x"),
        ("grpc-encoding-x", "y"),
        ("x-bin", b"\xff"),
    ],
)
async def test_strange_metadata_is_not_minded(
    channel: aio.Channel, metadata: tuple[str, str | bytes]
) -> None:
    call = channel.unary_unary(GENERATE)(generation().SerializeToString(), metadata=[metadata], timeout=30)
    assert await call


async def settled_bytes(server: ServerProcess) -> int:
    """The server's private memory once it has all that it gets after it is ready."""
    async with asyncio.timeout(20):
        before, now = 0, server.private_bytes()
        while now - before > MEBIBYTE:
            await asyncio.sleep(0.5)
            before, now = now, server.private_bytes()
    return now


async def test_bomb_is_not_unpacked(server: ServerProcess) -> None:
    options = [("grpc.max_send_message_length", -1)]
    bomb = b"\x12\x80\x80\x80\x20" + bytes(64 << 20)
    async with aio.insecure_channel(
        server.grpc, options=options, compression=grpc.Compression.Gzip
    ) as channel:
        before = await settled_bytes(server)
        failure = await send(channel, GENERATE, bomb)
        after = server.private_bytes()
    assert failure is not None and failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert after - before < 32 * MEBIBYTE


async def test_nothing_is_left_of_it(server: ServerProcess, channel: aio.Channel) -> None:
    """Runs last. Small requests again and again take no memory; what giant ones took is reused by the next."""
    small = [case for case in corpus() if len(case.request) < SMALL_BYTES]
    held, private = [], []
    for _ in range(8):
        await send_all(channel, small)
        held.append(server.held_bytes())
    before = server.private_bytes()
    for _ in range(3):
        await send_all(channel, corpus())
        private.append(server.private_bytes())
    print("KiB held after each round of small requests:", [size >> 10 for size in held])
    print("MiB of private memory after each round of all:", [size >> 20 for size in (before, *private)])
    assert held[-1] - held[2] < MEBIBYTE
    assert max(private) - before < 64 * MEBIBYTE
    samples = server.scrape()
    assert samples["fusionserve_kv_blocks_used"] == samples["fusionserve_requests_running"] == 0
    assert samples["fusionserve_requests_queued"] == 0
    health = health_pb2_grpc.HealthStub(channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1


async def send_all(channel: aio.Channel, cases: Sequence[Case]) -> None:
    """One round of them."""
    for batch in in_batches(cases):
        await asyncio.gather(*(send(channel, case.method, case.request) for case in batch))
