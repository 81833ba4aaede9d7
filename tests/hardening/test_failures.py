"""What fails inside the server, seen from outside: statuses, health, exit codes, and who is spared."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_process import ServerProcess, server_process

from fusionserve.client import (
    Client,
    ClientError,
    FinishReason,
    Generation,
    GenerationChunk,
    GenerationStarted,
    InternalError,
    ResourceExhaustedError,
    UnavailableError,
)

GREEDY = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
LONG = {**GREEDY, "max_new_tokens": 300}


def last_of(client: Client, **request: object) -> tuple[int, Generation | ClientError]:
    """How many tokens a stream brought, and its result or its error."""
    num_tokens = 0
    try:
        for event in client.stream("The", **{**LONG, **request}):
            if isinstance(event, GenerationChunk):
                num_tokens += len(event.token_ids)
            if isinstance(event, Generation):
                return num_tokens, event
    except ClientError as error:
        return num_tokens, error
    raise AssertionError("a stream without an end")


def health_of(server: ServerProcess) -> Iterator[int]:
    """What a watcher of the server's health is told until the server goes."""
    with grpc.insecure_channel(server.grpc) as channel:
        try:
            for response in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                yield response.status
        except grpc.RpcError:
            return


def assert_stops_with_1(server: ServerProcess, within_s: float) -> None:
    """Two streams and a watcher see the engine fail; the process ends by itself."""
    with ThreadPoolExecutor(3) as pool, Client(server.grpc, timeout_s=60) as client:
        watching = pool.submit(lambda: list(health_of(server)))
        streams = [pool.submit(last_of, client, adapter=name) for name in ("perl", "spanish")]
        started_s = time.monotonic()
        for stream in streams:
            _, error = stream.result(60)
            assert isinstance(error, UnavailableError), error
            assert error.reason == "ENGINE_FAILED"
        assert server.wait() == 1
        assert time.monotonic() - started_s < within_s
        assert watching.result(30) == [
            health_pb2.HealthCheckResponse.SERVING,
            health_pb2.HealthCheckResponse.NOT_SERVING,
        ]


def test_hung_step_ends_streams_and_the_process() -> None:
    # The warm-up takes three steps.
    with server_process("--step-timeout", "3s", failpoints="engine.step=20+sleep(60)") as server:
        assert_stops_with_1(server, within_s=30)
    assert "in one step for over 3 s" in server.log
    assert "in execute" in server.log, "the stack of the hung thread is told"


def test_told_to_stop_while_a_step_hangs_the_process_ends() -> None:
    with server_process(
        *("--step-timeout", "6s", "--drain-grace", "0.2s"), failpoints="engine.step=20+sleep(60)"
    ) as server:
        with ThreadPoolExecutor(1) as pool, Client(server.grpc, timeout_s=60) as client:
            stream = pool.submit(last_of, client)
            time.sleep(2)  # it hangs by now
            server.process.send_signal(signal.SIGTERM)
            _, error = stream.result(30)
            assert isinstance(error, ClientError)
        assert server.wait() == 1


def test_dead_engine_ends_streams_and_the_process() -> None:
    # A pool that holds one adapter: the second one's turn evicts the first, which fails inside the scheduler.
    with server_process("--adapter-pool-ranks", "32", failpoints="pool.evict=raise") as server:
        with Client(server.grpc, timeout_s=60) as client:
            assert client.generate("The", adapter="perl", **GREEDY).text
            with pytest.raises(UnavailableError) as caught:
                client.generate("The", adapter="spanish", **GREEDY)
            assert caught.value.reason == "ENGINE_FAILED"
        assert server.wait() == 1
    assert "the engine thread died" in server.log


def test_time_limit_ends_what_waits_for_a_slow_disk() -> None:
    limit = {**GREEDY, "time_limit_s": 0.2}
    with (
        server_process(failpoints="artifact.header=sleep(3)") as server,
        Client(server.grpc, timeout_s=60) as client,
    ):
        started_s = time.monotonic()
        whole = client.generate("The", adapter="perl", **limit)
        started, *_, last = client.stream("The", fusion="domains", **limit)
        assert time.monotonic() - started_s < 2.5
        assert isinstance(started, GenerationStarted) and isinstance(last, Generation)
        for generation in (whole, last):
            assert (generation.text, generation.finish_reason) == ("", FinishReason.TIME_LIMIT)
        assert (whole.adaptation.name, last.adaptation.name) == ("perl", "domains")


def test_loop_that_stands_still_ends_the_process() -> None:
    with server_process("--step-timeout", "3s", failpoints="stream.write=5+1*sleep(60)") as server:
        with Client(server.grpc, timeout_s=30) as client:
            _, error = last_of(client)
            assert isinstance(error, UnavailableError)
        assert server.wait() == 1
    assert "Timeout" in server.log and "reach_failpoint" in server.log


def test_each_failure_is_told_to_whom_it_belongs_and_passes() -> None:
    # The warm-up and the reference take some 300 steps, so that the two streams share the one that lacks memory. Two
    # files of each of five adapters are opened meanwhile, for the pool's memory.
    failpoints = (
        "artifact.open=10+1*oserror;artifact.header=5+1*raise;host.publish=1*memory;engine.step=560+1*memory"
    )
    with server_process(failpoints=failpoints) as server, Client(server.grpc, timeout_s=60) as client:
        _, alone = last_of(client)
        with ThreadPoolExecutor(1) as pool:
            old = pool.submit(last_of, client)
            time.sleep(0.05)
            num_tokens, error = last_of(client, temperature=0.9, seed=3)
            assert isinstance(error, ResourceExhaustedError) and num_tokens > 0, error
            assert (error.reason, error.retry_after_s) == ("OUT_OF_MEMORY", 5.0)
            _, finished = old.result(60)
        assert isinstance(alone, Generation) and isinstance(finished, Generation)
        assert finished.token_ids == alone.token_ids
        expected = [
            (UnavailableError, "STORAGE_UNAVAILABLE"),
            (InternalError, "INTERNAL"),
            (ResourceExhaustedError, "OUT_OF_MEMORY"),
        ]
        for kind, reason in expected:
            with pytest.raises(kind) as caught:
                client.adapters.load("perl")
            assert caught.value.reason == reason
            assert "failpoint" not in str(caught.value)
        assert client.adapters.load("perl").name == "perl"
        samples = server.scrape()
        assert samples['fusionserve_adapter_load_failures_total{reason="INTERNAL"}'] == 1
        assert samples["fusionserve_kv_blocks_used"] == 0
        server.terminate()
        assert server.wait() == 0
    assert "failpoint" in server.log, "the log has what the client is not told"
