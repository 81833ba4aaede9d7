"""Full hosts, pools and queues under adapters, and requests that end early: nothing is left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from served_adapters import (
    KV_BLOCK_BYTES,
    PROMPT,
    OpenStream,
    TestedEngine,
    begin,
    blend,
    check_at_rest,
    collect,
    loaded,
    long_request,
    lora,
    lora_bytes,
    make_params,
    running_engine,
    tokens_of,
    until,
    write_lora,
)

from fusionserve.errors import (
    AlreadyExistsError,
    ArtifactError,
    CapacityError,
    DeadlineError,
    UnavailableError,
)
from fusionserve.generation import (
    Adaptation,
    FinishReason,
    GenerationEvent,
    GenerationFinished,
    GenerationStarted,
)


class TestHostBudget:
    async def test_idle_adapters_are_evicted_least_recently_used_first(self, model: Path, root: Path) -> None:
        async with running_engine(model, root, adapter_host_bytes=lora_bytes(4) * 2) as engine:
            first = {name: await tokens_of(engine, name) for name in "ab"}
            await tokens_of(engine, "a")
            await tokens_of(engine, "c")
            assert loaded(engine) == {"a", "c"}
            assert await tokens_of(engine, "b") == first["b"]
            assert loaded(engine) == {"b", "c"}
            assert (await engine.get_adapter("b")).version == 2
            await until(lambda: engine.ledger.num_used == 8)

    async def test_pinned_adapters_are_not_evicted(self, model: Path, root: Path) -> None:
        async with running_engine(model, root, adapter_host_bytes=lora_bytes(4) * 2) as engine:
            await engine.load_adapter("a", None, pin=True, replace=False)
            for name in "bcd":
                await tokens_of(engine, name)
            assert loaded(engine) == {"a", "d"}
            assert (await engine.load_adapter("a", None, pin=None, replace=True)).pinned
            assert not (await engine.load_adapter("a", None, pin=False, replace=True)).pinned
            assert (await engine.load_adapter("a", None, pin=True, replace=True)).pinned
            await engine.unload_adapter("d", force=False)
            await engine.load_adapter("b", None, pin=True, replace=False)
            with pytest.raises(CapacityError) as refusal:
                await tokens_of(engine, "c")
            assert refusal.value.reason == "ADAPTER_HOST_FULL"

    async def test_leased_adapters_are_not_evicted(self, model: Path, root: Path) -> None:
        async with running_engine(model, root, adapter_host_bytes=lora_bytes(4)) as engine:
            alone = await tokens_of(engine, "a", 60)
            with engine.runner.paused():
                (stream,) = await begin(engine, long_request("a"))
                with pytest.raises(CapacityError) as refusal:
                    await collect(engine, make_params("no-room", lora("b")))
                assert (refusal.value.reason, refusal.value.retry_after_s) == ("ADAPTER_HOST_FULL", 1.0)
            assert await stream.tokens() == alone
            await check_at_rest(engine)
            assert len(await tokens_of(engine, "b")) == 12

    async def test_adapter_over_the_host_budget_is_refused_for_good(self, model: Path, root: Path) -> None:
        async with running_engine(model, root, adapter_host_bytes=lora_bytes(4) - 1) as engine:
            with pytest.raises(CapacityError) as refusal:
                await collect(engine, make_params("too-big", lora("a")))
            assert (refusal.value.reason, refusal.value.retry_after_s) == ("ADAPTER_TOO_BIG", None)

    async def test_rank_over_the_pool_is_refused(self, model: Path, root: Path) -> None:
        write_lora(root / "wide", seed=5, rank=17)
        async with running_engine(model, root, adapter_pool_ranks=16) as engine:
            with pytest.raises(ArtifactError) as refusal:
                await collect(engine, make_params("wide", lora("wide")))
            assert refusal.value.reason == "RANK_TOO_LARGE"
            for _ in range(2):
                await collect(engine, make_params("fits", blend(a=1.0, b=1.0, c=1.0, d=1.0)))
            write_lora(root / "e", seed=6, rank=1)
            with pytest.raises(CapacityError) as full:
                await collect(engine, make_params("together", blend(a=1.0, b=1.0, c=1.0, d=1.0, e=1.0)))
            assert full.value.reason == "ADAPTER_TOO_BIG"


class TestEndings:
    async def test_cancelled_stream_frees_everything_within_a_step(self, engine: TestedEngine) -> None:
        with engine.runner.paused():
            (stream,) = await begin(engine, long_request("a"))
            await until(engine.runner.is_waiting.is_set)
            stream.task.cancel()
            await asyncio.wait([stream.task])
            num_steps = engine.runner.num_steps
            assert engine.engine.scheduler.blocks.num_used > 0
        await check_at_rest(engine)
        assert engine.runner.num_steps <= num_steps + 1

    async def test_closed_generator_frees_everything(self, engine: TestedEngine) -> None:
        async with aclosing(engine.generate(make_params("left", lora("a"), num_tokens=200))) as events:
            async for event in events:
                assert isinstance(event, GenerationStarted)
                break
        await check_at_rest(engine)

    async def test_deadline_ends_a_running_request(self, engine: TestedEngine) -> None:
        await collect(engine, make_params("load", lora("a")))
        params = make_params("late", lora("a"), num_tokens=400, deadline_s=time.monotonic() + 0.4)
        with engine.runner.paused():
            (stream,) = await begin(engine, params)
            await asyncio.sleep(0.42)
        with pytest.raises(DeadlineError):
            await stream.task

    async def test_deadline_ends_a_request_in_admission(self, engine: TestedEngine) -> None:
        with engine.slow_loads():
            params = make_params("late", lora("a"), deadline_s=time.monotonic() + 0.05)
            with pytest.raises(DeadlineError):
                await asyncio.wait_for(collect(engine, params), 5)

    async def test_time_limit_keeps_what_was_generated(self, engine: TestedEngine) -> None:
        alone = await tokens_of(engine, "a", 60)
        params = make_params("brief", lora("a"), PROMPT, num_tokens=60, time_limit_s=0.4)
        with engine.runner.paused():
            (stream,) = await begin(engine, params)
            await asyncio.sleep(0.42)
        candidate = (await stream.task).candidates[0]
        assert candidate.finish_reason is FinishReason.TIME_LIMIT
        assert 1 <= len(candidate.token_ids) < 60
        assert candidate.token_ids == alone[: len(candidate.token_ids)]

    @pytest.mark.parametrize("adaptation", [lora("a", 0.5), blend(a=1.0, b=2.0)], ids=lambda a: a.kind)
    async def test_time_limit_ends_a_request_in_admission(
        self, engine: TestedEngine, adaptation: Adaptation
    ) -> None:
        deadline_s = time.monotonic() + 60
        params = make_params("brief", adaptation, time_limit_s=0.05, deadline_s=deadline_s)
        with engine.slow_loads():
            generating = engine.generate(replace(params, num_candidates=2))
            started, finished = await asyncio.wait_for(_events(generating), 5)
        assert isinstance(started, GenerationStarted) and isinstance(finished, GenerationFinished)
        told = [(c.index, c.token_ids, c.text, c.finish_reason) for c in finished.candidates]
        assert told == [(index, (), "", FinishReason.TIME_LIMIT) for index in range(2)]
        members = [(m.name, m.version, m.scale) for m in finished.adaptation.members]
        assert members == [(term.name, 0, term.scale) for term in adaptation.terms]
        assert started.adaptation == finished.adaptation and finished.timings.total_s >= 0.05
        await check_at_rest(engine)

    async def test_queued_requests_meet_deadline_and_time_limit(self, model: Path, root: Path) -> None:
        async with running_engine(model, root, max_batch_requests=1) as engine:
            alone = await tokens_of(engine, "a", 60)
            await tokens_of(engine, "b")
            with engine.runner.paused():
                (running,) = await begin(engine, long_request("a"))
                late = OpenStream(engine, make_params("late", lora("b"), deadline_s=time.monotonic() + 0.3))
                brief = OpenStream(engine, make_params("brief", lora("b"), time_limit_s=0.3))
                await until(lambda: len(engine._streams) == 3)
                await asyncio.sleep(0.32)
            with pytest.raises(DeadlineError):
                await late.task
            candidate = (await brief.task).candidates[0]
            assert (candidate.finish_reason, candidate.token_ids) == (FinishReason.TIME_LIMIT, ())
            assert await running.tokens() == alone

    async def test_too_many_requests_are_refused(self, model: Path, root: Path) -> None:
        async with running_engine(model, root, max_batch_requests=2, max_queued_requests=1) as engine:
            with engine.runner.paused():
                streams = [OpenStream(engine, make_params(f"r{i}", lora("a"))) for i in range(3)]
                await until(lambda: len(engine._streams) == 3)
                with pytest.raises(CapacityError) as refusal:
                    await collect(engine, make_params("one-more"))
                assert (refusal.value.reason, refusal.value.retry_after_s) == ("QUEUE_FULL", 1.0)
            assert len({await stream.tokens() for stream in streams}) == 1
            await collect(engine, make_params("room-again"))

    async def test_request_id_in_use_is_refused(self, engine: TestedEngine) -> None:
        with engine.runner.paused():
            (stream,) = await begin(engine, long_request("a", "same"))
            with pytest.raises(AlreadyExistsError) as refusal:
                await collect(engine, make_params("same"))
        assert refusal.value.reason == "REQUEST_ID_IN_USE"
        assert len(await stream.tokens()) == 60
        await collect(engine, make_params("same"))

    async def test_failed_step_leaves_no_half_written_adapter(self, engine: TestedEngine) -> None:
        """The step that should have written `b` to the pool fails before it does."""
        alone = {name: await tokens_of(engine, name) for name in "ab"}
        await engine.unload_adapter("b", force=False)
        await tokens_of(engine, "c")  # takes the rows that `b` had, and leaves its own behind
        await engine.unload_adapter("c", force=False)
        pool = engine._base.pool
        apply, pool.apply = pool.apply, _fail
        with pytest.raises(Exception, match="inside the server"):
            await collect(engine, make_params("unlucky", lora("b"), PROMPT))
        pool.apply = apply
        assert {name: await tokens_of(engine, name) for name in "ab"} == alone

    async def test_dead_engine_refuses_a_request_that_was_in_admission(self, model: Path, root: Path) -> None:
        async with running_engine(model, root) as engine:
            with engine.slow_loads():
                stream = OpenStream(engine, make_params("late", lora("a")))
                await until(lambda: engine.num_reads == 1)
                engine._thread.post(_fail)
                await asyncio.wait_for(engine.wait_failed(), 5)
            with pytest.raises(UnavailableError) as refusal:
                await asyncio.wait_for(stream.task, 5)
            assert refusal.value.reason == "ENGINE_FAILED"


def _fail(_: object) -> None:
    raise RuntimeError("as the test wants it")


async def test_kv_too_small_for_all_still_serves_all(model: Path, root: Path) -> None:
    """Eight streams on blocks for one context: preempted requests keep their leases and their tokens."""
    options = {"kv_cache_bytes": KV_BLOCK_BYTES * 8, "max_context_tokens": 128}
    async with running_engine(model, root, **options) as engine:
        alone = {name: await tokens_of(engine, name, 60) for name in "abcd"}
        before = engine.engine.scheduler.num_preemptions
        streams = [OpenStream(engine, long_request(name, f"{name}{i}")) for i in range(2) for name in "abcd"]
        for stream, name in zip(streams, "abcdabcd", strict=True):
            assert await stream.tokens() == alone[name]
        assert engine.engine.scheduler.num_preemptions > before


async def _events(generating: AsyncGenerator[GenerationEvent, None]) -> list[GenerationEvent]:
    return [event async for event in generating]
