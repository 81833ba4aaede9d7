"""Open and closed loops against a served fake engine."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from server_fixture import Served, serving_server

from fusionserve.errors import CapacityError, PreconditionError
from fusionserve.loadtest.generate_load import generate_load
from fusionserve.loadtest.load_report import to_report
from fusionserve.loadtest.outcome import Outcome
from fusionserve.loadtest_config import LoadConfig, parse_lengths


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving_server() as server:
        yield server


async def load(served: Served, **config: Any) -> Outcome:
    defaults = {"prompt_lengths": parse_lengths("8"), "output_lengths": parse_lengths("4")}
    return await generate_load(LoadConfig(target=str(served.app.grpc_address), **{**defaults, **config}))


async def test_closed_loop_sends_every_kind_and_counts_after_the_warm_up(served: Served) -> None:
    outcome = await load(served, concurrency=4, num_requests=40, warm_up=5)
    assert (len(outcome.records), len(outcome.counted)) == (45, 40)
    assert outcome.most_in_flight == 4
    assert all(record.is_ok and record.generated_tokens == 4 for record in outcome.records)
    assert {record.kind for record in outcome.records} == {"base", "lora", "blend", "fusion"}
    assert {record.prompt_tokens for record in outcome.records} == {8}


async def test_the_same_seed_sends_the_same_requests(served: Served) -> None:
    await load(served, concurrency=1, num_requests=12, seed=9)
    first = [(params.prompt, params.adaptation) for params in served.engine.params]
    (salt,) = {params.cache_salt for params in served.engine.params}
    served.engine.params.clear()
    await load(served, concurrency=1, num_requests=12, seed=9)
    assert salt not in {params.cache_salt for params in served.engine.params}
    assert [(params.prompt, params.adaptation) for params in served.engine.params] == first
    assert len(first) == 12


async def test_open_loop_does_not_wait_and_does_not_grow_without_limit(served: Served) -> None:
    served.engine.gate = asyncio.Event()
    running = asyncio.create_task(load(served, rate=2000.0, num_requests=60, max_in_flight=20))
    while served.engine.num_open < 20:
        await asyncio.sleep(0.01)
    await asyncio.sleep(1.0)  # all sixty are due within a tenth of it
    assert served.engine.num_open == 20
    served.engine.gate.set()
    outcome = await running
    assert (outcome.most_in_flight, outcome.num_not_sent) == (20, 40)
    assert to_report(outcome)["requests"]["not_sent"] == 40


async def test_open_loop_ends_with_the_arrivals_of_its_duration(served: Served) -> None:
    outcome = await load(served, rate=100.0, duration_s=0.5, warm_up=3)
    due_s = [record.due_s for record in outcome.counted]
    assert max(due_s) - min(due_s) < 0.5
    assert 25 < len(due_s) < 85
    again = await load(served, rate=100.0, duration_s=0.5, warm_up=3)
    assert [record.due_s for record in again.counted] == due_s


async def test_closed_loop_ends_with_its_duration(served: Served) -> None:
    outcome = await load(served, concurrency=2, duration_s=0.3)
    assert max(record.sent_s for record in outcome.records) < 1
    assert outcome.counted


async def test_refused_requests_are_counted_and_end_nothing(served: Served) -> None:
    served.engine.error = CapacityError("the queue is full", reason="QUEUE_FULL")
    running = asyncio.create_task(load(served, concurrency=2, num_requests=4, adapters=("alpha",)))
    with pytest.raises(Exception, match="QUEUE_FULL"):
        await running  # the server could not even be asked what it has
    served.engine.error = None
    served.engine.error_midway = CapacityError("the queue is full", reason="QUEUE_FULL")
    report = to_report(await load(served, concurrency=2, num_requests=4))
    (error,) = report["errors"]
    assert (error["status"], error["reason"], error["count"]) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 4)
    assert report["throughput"]["generated_tokens_per_s"] == 0
    assert report["latency"]["ttft_s"] is None


async def test_requests_beyond_their_time_are_errors(served: Served) -> None:
    served.engine.gate = asyncio.Event()
    report = to_report(await load(served, concurrency=2, num_requests=2, timeout_s=0.2))
    assert [(error["status"], error["count"]) for error in report["errors"]] == [("DEADLINE_EXCEEDED", 2)]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"adapters": ("nobody",)}, "no adapter 'nobody'"),
        ({"fusions": ("nobody",)}, "no fusion 'nobody'"),
        ({"mix": {"blend": 1.0}, "blend_size": 3}, "too few adapters or fusions for: blend"),
        ({"prompt_lengths": parse_lengths("510")}, "514 tokens do not fit: the server takes 512"),
    ],
)
async def test_what_the_server_cannot_do_is_refused_before_anything_is_sent(
    served: Served, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PreconditionError, match=reason):
        await load(served, num_requests=1, **config)
    assert served.engine.params == []
