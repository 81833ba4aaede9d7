"""Adapters come and go while streams run: loads, reloads, unloads, eviction, and how requests end early."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from served_adapters import (
    KV_BLOCK_BYTES,
    OpenStream,
    TestedEngine,
    blend,
    check_at_rest,
    collect,
    collect_all,
    lora,
    lora_bytes,
    make_params,
    make_prompt,
    running_engine,
    until,
    write_lora,
    write_model,
)

from fusionserve import metrics
from fusionserve.adapter_status import AdapterState, Residency
from fusionserve.errors import (
    AbortedError,
    AlreadyExistsError,
    ArtifactError,
    CapacityError,
    DeadlineError,
    NotFoundError,
    UnavailableError,
)
from fusionserve.generation import FinishReason, GenerationStarted

PROMPT = make_prompt(1, 40)  # two full blocks and a half


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate("abcd", start=1):
        write_lora(tmp_path / name, seed=seed)
    return tmp_path


@pytest.fixture
async def engine(model: Path, root: Path) -> AsyncIterator[TestedEngine]:
    async with running_engine(model, root) as engine:
        yield engine


def num_loads() -> float:
    return metrics.ADAPTER_LOADS._value.get()


def loaded(engine: TestedEngine) -> set[str]:
    return {entry.adapter.name for entry in engine.registry.entries()}


async def tokens_of(engine: TestedEngine, name: str, num_tokens: int = 12) -> tuple[int, ...]:
    """What adapter `name` says to PROMPT with nobody else around."""
    params = make_params(f"reference-{name}", lora(name), PROMPT, num_tokens=num_tokens)
    return (await collect(engine, params)).tokens


def long_stream(engine: TestedEngine, name: str, request_id: str = "long") -> OpenStream:
    return OpenStream(engine, make_params(request_id, lora(name), PROMPT, num_tokens=60))


class TestLoading:
    async def test_adapter_on_disk_loads_on_demand(self, engine: TestedEngine) -> None:
        before = await engine.get_adapter("a")
        assert (before.state, before.residency, before.version) == (AdapterState.AVAILABLE, Residency.DISK, 0)
        outcome = await collect(engine, make_params("first", lora("a")))
        after = await engine.get_adapter("a")
        assert (after.state, after.residency, after.version) == (AdapterState.READY, Residency.DEVICE, 1)
        assert (after.max_rank, after.target_modules) == (4, ("down_proj", "q_proj"))
        assert after.host_bytes == lora_bytes(4)
        member = outcome.finished.adaptation.members[0]
        assert (member.name, member.version, member.digest) == ("a", 1, after.digest)
        assert [status.name for status in await engine.list_adapters()] == ["a", "b", "c", "d"]

    async def test_concurrent_first_requests_load_once(self, engine: TestedEngine) -> None:
        before = num_loads()
        with engine.slow_loads():
            streams = [OpenStream(engine, make_params(f"r{i}", lora("a"))) for i in range(8)]
            await until(lambda: engine.num_reads == 1)
            await asyncio.sleep(0.02)
            assert (await engine.get_adapter("a")).state is AdapterState.LOADING
        tokens = {await stream.tokens() for stream in streams}
        assert len(tokens) == 1
        assert (engine.num_reads, num_loads() - before) == (1, 1)

    async def test_first_caller_that_leaves_does_not_end_the_load(self, engine: TestedEngine) -> None:
        with engine.slow_loads():
            first = OpenStream(engine, make_params("first", lora("a")))
            await until(lambda: engine.num_reads == 1)
            second = OpenStream(engine, make_params("second", lora("a")))
            await asyncio.sleep(0)
            first.task.cancel()
            await asyncio.wait([first.task])
        assert len(await second.tokens()) == 12
        assert engine.num_reads == 1

    async def test_load_does_not_stall_other_streams(self, engine: TestedEngine) -> None:
        alone = await tokens_of(engine, "a", 60)
        with engine.slow_loads():
            loads = [OpenStream(engine, make_params(f"new-{name}", lora(name))) for name in "bcd"]
            stream = long_stream(engine, "a")
            assert await asyncio.wait_for(stream.tokens(), 10) == alone
            assert not any(load.task.done() for load in loads)
        for load in loads:
            assert len(await load.tokens()) == 12

    async def test_load_refuses_a_loaded_name_unless_replacing(self, engine: TestedEngine) -> None:
        await engine.load_adapter("a", None, pin=False, replace=False)
        with pytest.raises(AlreadyExistsError):
            await engine.load_adapter("a", None, pin=False, replace=False)
        assert (await engine.load_adapter("a", None, pin=False, replace=True)).version == 2

    async def test_explicit_load_keeps_its_wishes_beside_one_under_way(
        self, engine: TestedEngine, root: Path
    ) -> None:
        """A load on demand of another directory is under way; the command's path and pin must not get lost."""
        write_lora(root / "other" / "a", seed=99)
        with engine.slow_loads():
            stream = OpenStream(engine, make_params("demand", lora("a")))
            await until(lambda: engine.num_reads == 1)
            load = asyncio.create_task(engine.load_adapter("a", "other/a", pin=True, replace=True))
            await asyncio.sleep(0.02)
        await stream.tokens()
        status = await load
        assert (status.version, status.pinned, engine.num_reads) == (2, True, 2)
        await engine.load_adapter("b", "other/a", pin=False, replace=False)
        assert status.digest == (await engine.get_adapter("b")).digest

    async def test_broken_adapter_is_refused_and_can_be_mended(
        self, engine: TestedEngine, root: Path
    ) -> None:
        (root / "a" / "adapter_model.safetensors").write_bytes(b"not a tensor in sight")
        with pytest.raises(ArtifactError):
            await collect(engine, make_params("broken", lora("a")))
        with pytest.raises(ArtifactError):
            await collect(engine, make_params("half", blend(b=0.5, a=0.5)))
        await check_at_rest(engine)
        write_lora(root / "a", seed=1)
        assert len((await collect(engine, make_params("mended", lora("a")))).tokens) == 12

    async def test_close_during_a_load_ends_the_waiting_request(self, model: Path, root: Path) -> None:
        async with running_engine(model, root) as engine:
            with engine.slow_loads():
                stream = OpenStream(engine, make_params("late", lora("a")))
                await until(lambda: engine.num_reads == 1)
                closing = asyncio.create_task(engine.close())
                await until(lambda: engine._is_closed)
            with pytest.raises(UnavailableError):
                await asyncio.wait_for(stream.task, 5)
            await closing


class TestReload:
    async def test_running_stream_finishes_on_its_version(self, engine: TestedEngine, root: Path) -> None:
        old = await tokens_of(engine, "a", 60)
        stream = long_stream(engine, "a")
        await stream.has_tokens()
        with engine.runner.paused():
            write_lora(root / "a", seed=50)
            status = await engine.load_adapter("a", None, pin=False, replace=True)
            assert status.version == 2
            fresh = OpenStream(engine, make_params("fresh", lora("a"), PROMPT, num_tokens=60))
            assert not stream.task.done()
        finished = await stream.task
        assert finished.candidates[0].token_ids == old
        assert finished.adaptation.members[0].version == 1
        new = await fresh.tokens()
        assert new != old
        assert (await fresh.task).adaptation.members[0].version == 2
        await check_at_rest(engine)
        assert engine.ledger.num_used == 4, "the old version's rows are still taken"

    async def test_prefix_cache_never_serves_the_old_weights(
        self, model: Path, engine: TestedEngine, root: Path
    ) -> None:
        first = await collect(engine, make_params("first", lora("a"), PROMPT))
        again = await collect(engine, make_params("again", lora("a"), PROMPT))
        assert (first.finished.usage.cached_tokens, again.finished.usage.cached_tokens) == (0, 32)
        write_lora(root / "a", seed=50)
        await engine.load_adapter("a", None, pin=False, replace=True)
        reloaded = await collect(engine, make_params("reloaded", lora("a"), PROMPT))
        assert reloaded.finished.usage.cached_tokens == 0
        async with running_engine(model, root) as untouched:
            assert reloaded.tokens == await tokens_of(untouched, "a")
        assert reloaded.tokens != first.tokens

    async def test_prefix_cache_keeps_scales_and_adapters_apart(self, engine: TestedEngine) -> None:
        kinds = [lora("a"), lora("a", 0.5), lora("b"), blend(a=1.0, b=1.0), blend(a=0.5, b=1.0), None]
        for index, adaptation in enumerate(kinds):
            cold = await collect(engine, make_params(f"cold-{index}", adaptation, PROMPT))
            warm = await collect(engine, make_params(f"warm-{index}", adaptation, PROMPT))
            assert (cold.finished.usage.cached_tokens, warm.finished.usage.cached_tokens) == (0, 32)
            assert cold.tokens == warm.tokens

    async def test_reload_of_changed_rank_under_a_crowd_changes_no_stream(
        self, engine: TestedEngine, root: Path
    ) -> None:
        alone = {name: await tokens_of(engine, name, 60) for name in "abc"}
        streams = {name: long_stream(engine, name, name) for name in "abc"}
        for stream in streams.values():
            await stream.has_tokens()
        for seed, rank in enumerate((16, 1, 8), start=60):
            write_lora(root / "a", seed=seed, rank=rank)
            await engine.load_adapter("a", None, pin=False, replace=True)
            await collect(engine, make_params("new", lora("a"), num_tokens=3))
        assert {name: await stream.tokens() for name, stream in streams.items()} == alone


class TestUnload:
    async def test_unload_waits_for_the_running_stream(self, engine: TestedEngine) -> None:
        alone = await tokens_of(engine, "a", 60)
        stream = long_stream(engine, "a")
        await stream.has_tokens()
        with engine.runner.paused():
            unloads = [asyncio.create_task(engine.unload_adapter("a", force=False)) for _ in range(2)]
            await asyncio.sleep(0.03)
            assert not any(unload.done() for unload in unloads)
            assert (await engine.get_adapter("a")).state is AdapterState.DRAINING
        statuses = await asyncio.wait_for(asyncio.gather(*unloads), 10)
        assert await stream.tokens() == alone
        assert [(s.version, s.state, s.residency) for s in statuses] == [
            (1, AdapterState.AVAILABLE, Residency.DISK)
        ] * 2

    async def test_request_during_the_drain_gets_a_new_version(self, engine: TestedEngine) -> None:
        stream = long_stream(engine, "a")
        await stream.has_tokens()
        with engine.runner.paused():
            unload = asyncio.create_task(engine.unload_adapter("a", force=False))
            await asyncio.sleep(0.02)
            late = OpenStream(engine, make_params("late", lora("a")))
            await until(lambda: engine.num_reads == 2)
        await asyncio.wait_for(unload, 10)
        assert (await late.task).adaptation.members[0].version == 2
        assert (await stream.task).adaptation.members[0].version == 1

    async def test_unload_waits_for_replaced_versions_too(self, engine: TestedEngine) -> None:
        stream = long_stream(engine, "a")
        await stream.has_tokens()
        with engine.runner.paused():
            await engine.load_adapter("a", None, pin=False, replace=True)
            unload = asyncio.create_task(engine.unload_adapter("a", force=False))
            await asyncio.sleep(0.03)
            assert not unload.done()
        assert (await asyncio.wait_for(unload, 10)).version == 2
        await until(stream.task.done, 0.5)
        assert len(await stream.tokens()) == 60

    async def test_forced_unload_ends_its_streams_only(self, engine: TestedEngine) -> None:
        alone = await tokens_of(engine, "b", 60)
        await collect(engine, make_params("load", lora("a")))
        doomed = [
            long_stream(engine, "a"),
            OpenStream(engine, make_params("blend", blend(a=0.5, b=0.5), PROMPT, num_tokens=60)),
        ]
        other = long_stream(engine, "b", "other")
        for stream in (*doomed, other):
            await stream.has_tokens()
        with engine.runner.paused():
            unload = asyncio.create_task(engine.unload_adapter("a", force=True))
            await until(engine.runner.is_waiting.is_set)
            await asyncio.sleep(0.01)
        await asyncio.wait_for(unload, 10)
        for stream in doomed:
            with pytest.raises(AbortedError) as ended:
                await stream.task
            assert ended.value.reason == "ADAPTER_UNLOADED"
        assert await other.tokens() == alone
        await check_at_rest(engine)
        assert "a" not in loaded(engine)

    async def test_forced_unload_ends_streams_of_replaced_versions(self, engine: TestedEngine) -> None:
        stream = long_stream(engine, "a")
        await stream.has_tokens()
        with engine.runner.paused():
            await engine.load_adapter("a", None, pin=False, replace=True)
            unload = asyncio.create_task(engine.unload_adapter("a", force=True))
            await asyncio.sleep(0.02)
        await asyncio.wait_for(unload, 10)
        with pytest.raises(AbortedError):
            await stream.task

    async def test_blend_in_admission_does_not_start_on_an_unloaded_member(
        self, engine: TestedEngine
    ) -> None:
        """The blend has leased `a` and waits for `b` to load when `a` is unloaded by force."""
        await collect(engine, make_params("load", lora("a")))
        with engine.slow_loads():
            stream = OpenStream(engine, make_params("blend", blend(a=0.5, b=0.5)))
            await until(lambda: engine.num_reads == 2)
            unload = asyncio.create_task(engine.unload_adapter("a", force=True))
            await asyncio.sleep(0.02)
        await asyncio.wait_for(unload, 10)
        members = (await stream.task).adaptation.members
        assert [(member.name, member.version) for member in members] == [("a", 2), ("b", 1)]

    async def test_unload_of_an_unknown_or_unloaded_name_is_not_found(self, engine: TestedEngine) -> None:
        for name in ("nobody", "a"):
            with pytest.raises(NotFoundError) as refusal:
                await engine.unload_adapter(name, force=False)
            assert refusal.value.reason == "ADAPTER_NOT_LOADED"

    async def test_unload_of_a_failing_load_is_not_found(self, engine: TestedEngine, root: Path) -> None:
        (root / "a" / "adapter_config.json").write_text("{}")
        with engine.slow_loads():
            stream = OpenStream(engine, make_params("broken", lora("a")))
            await until(lambda: engine.num_reads == 1)
            unload = asyncio.create_task(engine.unload_adapter("a", force=False))
            await asyncio.sleep(0)
        with pytest.raises(ArtifactError):
            await stream.task
        with pytest.raises(NotFoundError):
            await unload

    async def test_unload_frees_rank_rows_and_host_bytes(self, engine: TestedEngine) -> None:
        await collect_all(engine, [make_params(name, lora(name)) for name in "ab"])
        assert (engine.ledger.num_used, engine.registry.used_bytes) == (8, 2 * lora_bytes(4))
        await engine.unload_adapter("a", force=False)
        await until(lambda: engine.ledger.num_used == 4)
        assert engine.registry.used_bytes == lora_bytes(4)
        assert (await engine.get_adapter("b")).residency is Residency.DEVICE

    async def test_forced_unload_before_the_first_token(self, engine: TestedEngine) -> None:
        await engine.load_adapter("a", None, pin=False, replace=False)
        with engine.runner.paused():
            stream = OpenStream(engine, make_params("early", lora("a")))
            await until(engine.runner.is_waiting.is_set)
            unload = asyncio.create_task(engine.unload_adapter("a", force=True))
            await asyncio.sleep(0.01)
        await asyncio.wait_for(unload, 10)
        with pytest.raises(AbortedError):
            await stream.task


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
            await engine.load_adapter("a", None, pin=False, replace=True)
            assert (await engine.get_adapter("a")).pinned
            await engine.unload_adapter("d", force=False)
            await engine.load_adapter("b", None, pin=True, replace=False)
            with pytest.raises(CapacityError) as refusal:
                await tokens_of(engine, "c")
            assert refusal.value.reason == "ADAPTER_HOST_FULL"

    async def test_leased_adapters_are_not_evicted(self, model: Path, root: Path) -> None:
        async with running_engine(model, root, adapter_host_bytes=lora_bytes(4)) as engine:
            alone = await tokens_of(engine, "a", 60)
            stream = long_stream(engine, "a")
            await stream.has_tokens()
            with engine.runner.paused():
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
        stream = long_stream(engine, "a")
        await stream.has_tokens()
        with engine.runner.paused():
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
        params = make_params("late", lora("a"), num_tokens=400, deadline_s=time.monotonic() + 0.1)
        stream = OpenStream(engine, params)
        await stream.has_tokens()
        with engine.runner.paused():
            await asyncio.sleep(0.12)
        with pytest.raises(DeadlineError):
            await stream.task

    async def test_deadline_ends_a_request_in_admission(self, engine: TestedEngine) -> None:
        with engine.slow_loads():
            params = make_params("late", lora("a"), deadline_s=time.monotonic() + 0.05)
            with pytest.raises(DeadlineError):
                await asyncio.wait_for(collect(engine, params), 5)

    async def test_time_limit_keeps_what_was_generated(self, engine: TestedEngine) -> None:
        alone = await tokens_of(engine, "a", 60)
        stream = OpenStream(engine, make_params("brief", lora("a"), PROMPT, num_tokens=60, time_limit_s=0.2))
        await stream.has_tokens(3)
        with engine.runner.paused():
            await asyncio.sleep(0.22)
        candidate = (await stream.task).candidates[0]
        assert candidate.finish_reason is FinishReason.TIME_LIMIT
        assert 3 <= len(candidate.token_ids) < 60
        assert candidate.token_ids == alone[: len(candidate.token_ids)]

    async def test_queued_requests_meet_deadline_and_time_limit(self, model: Path, root: Path) -> None:
        async with running_engine(model, root, max_batch_requests=1) as engine:
            alone = await tokens_of(engine, "a", 60)
            running = long_stream(engine, "a")
            await running.has_tokens()
            with engine.runner.paused():
                late = OpenStream(engine, make_params("late", lora("b"), deadline_s=time.monotonic() + 0.05))
                brief = OpenStream(engine, make_params("brief", lora("b"), time_limit_s=0.05))
                await until(lambda: len(engine._streams) == 3)
                await asyncio.sleep(0.06)
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
        stream = long_stream(engine, "a", "same")
        await stream.has_tokens()
        with engine.runner.paused(), pytest.raises(AlreadyExistsError) as refusal:
            await collect(engine, make_params("same"))
        assert refusal.value.reason == "REQUEST_ID_IN_USE"
        assert len(await stream.tokens()) == 60
        await collect(engine, make_params("same"))

    async def test_failed_step_leaves_no_half_written_adapter(self, engine: TestedEngine) -> None:
        """The step that should have written `b` to the pool fails before it does."""
        alone = {name: await tokens_of(engine, name) for name in "ab"}
        await engine.load_adapter("b", None, pin=False, replace=True)
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
        streams = [long_stream(engine, name, f"{name}{i}") for i in range(2) for name in "abcd"]
        for stream, name in zip(streams, "abcdabcd", strict=True):
            assert await stream.tokens() == alone[name]
        assert engine.engine.scheduler.num_preemptions > before
