"""Adapters come and go while streams run: loads, reloads, unloads."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path

import pytest
from served_adapters import (
    PROMPT,
    OpenStream,
    TestedEngine,
    begin,
    blend,
    check_at_rest,
    collect,
    collect_all,
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

from fusionserve import metrics
from fusionserve.adapter_status import AdapterState, Residency
from fusionserve.errors import (
    AbortedError,
    AlreadyExistsError,
    ArtifactError,
    ChecksumError,
    NotFoundError,
    UnavailableError,
)


def num_loads() -> float:
    return metrics.ADAPTER_LOADS._value.get()


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
            stream = OpenStream(engine, long_request("a"))
            assert await asyncio.wait_for(stream.tokens(), 10) == alone
            assert not any(load.task.done() for load in loads)
        for load in loads:
            assert len(await load.tokens()) == 12

    async def test_load_gets_the_memory_of_the_adapters_modules(self, engine: TestedEngine) -> None:
        """The first adapter's activation would otherwise wait for it, and every stream with it."""
        await engine.load_adapter("a", None, pin=False, replace=False)
        pool, paths = engine._base.pool, engine.registry.get("a").loaded.weights.modules
        assert paths and all(pool.rows(path)._memory is not None for path in paths)
        assert all(pool.rows(path).is_empty for path in paths), "only an activation puts it to use"
        others = pool._rows.keys() - paths
        assert others and all(pool.rows(path)._memory is None for path in others)

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
        with engine.runner.paused():
            (stream,) = await begin(engine, long_request("a"))
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
        with engine.runner.paused():
            streams = await begin(engine, *(long_request(name, name) for name in "abc"))
            for seed, rank in enumerate((16, 1, 8), start=60):
                write_lora(root / "a", seed=seed, rank=rank)
                await engine.load_adapter("a", None, pin=False, replace=True)
                (new,) = await begin(engine, make_params("new", lora("a"), num_tokens=3))
                await new.tokens()
            assert not any(stream.task.done() for stream in streams)
        assert dict(zip("abc", [await stream.tokens() for stream in streams], strict=True)) == alone


class TestUnload:
    async def test_unload_waits_for_the_running_stream(self, engine: TestedEngine) -> None:
        alone = await tokens_of(engine, "a", 60)
        with engine.runner.paused():
            (stream,) = await begin(engine, long_request("a"))
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
        with engine.runner.paused():
            (stream,) = await begin(engine, long_request("a"))
            unload = asyncio.create_task(engine.unload_adapter("a", force=False))
            await asyncio.sleep(0.02)
            late = OpenStream(engine, make_params("late", lora("a")))
            await until(lambda: engine.num_reads == 2)
        await asyncio.wait_for(unload, 10)
        assert (await late.task).adaptation.members[0].version == 2
        assert (await stream.task).adaptation.members[0].version == 1

    async def test_unload_waits_for_replaced_versions_too(self, engine: TestedEngine) -> None:
        with engine.runner.paused():
            (stream,) = await begin(engine, long_request("a"))
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
        mixed = make_params("blend", blend(a=0.5, b=0.5), PROMPT, num_tokens=60)
        with engine.runner.paused():
            *doomed, other = await begin(engine, long_request("a"), mixed, long_request("b", "other"))
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
        with engine.runner.paused():
            (stream,) = await begin(engine, long_request("a"))
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


class TestDigest:
    async def test_promised_digest_is_checked_before_anything_is_published(
        self, engine: TestedEngine
    ) -> None:
        right = (await engine.load_adapter("a", None, pin=False, replace=False)).digest
        with pytest.raises(ChecksumError) as caught:
            await engine.load_adapter("a", None, pin=False, replace=True, digest="0" * 64)
        assert caught.value.metadata == {"adapter": "a", "expected": "0" * 64, "found": right}
        assert (await engine.get_adapter("a")).version == 1, "the old version stays"
        with pytest.raises(ChecksumError):
            await engine.load_adapter("b", None, pin=False, replace=False, digest=right)
        assert loaded(engine) == {"a"}
        again = await engine.load_adapter("a", None, pin=False, replace=True, digest=right)
        assert again.version == 2


class TestSlowStorage:
    async def test_load_that_hangs_fails_in_time_and_harms_nobody(self, model: Path, root: Path) -> None:
        async with running_engine(model, root, load_timeout_s=0.2) as engine:
            (stream,) = [OpenStream(engine, make_params("base", num_tokens=40))]
            with engine.slow_loads():
                for name in ("a", "b", "c"):  # more than there are slots
                    with pytest.raises(UnavailableError) as caught:
                        await engine.load_adapter(name, None, pin=False, replace=False)
                    assert caught.value.reason == "LOAD_TIMED_OUT"
                assert engine.num_reads <= 2, "what hangs keeps its slot"
                assert len(await stream.tokens()) == 40
            await until(lambda: engine._store._reading._free._value == 2)
            assert loaded(engine) == set()
            assert (await engine.load_adapter("c", None, pin=False, replace=False)).version == 1


class TestMemory:
    async def test_weights_go_with_their_last_lease(self, engine: TestedEngine) -> None:
        """Not when the garbage collector comes round: that may be two hundred adapters later."""
        gc.collect()
        gc.disable()
        try:
            weights = []
            for number in range(3):
                await collect(engine, make_params(f"r{number}", lora("a")))
                weights.append(weakref.ref(engine.registry.get("a").loaded.content.weights))
                await engine.unload_adapter("a", force=False)
            await engine.load_adapter("b", None, pin=False, replace=False)
            await asyncio.sleep(0.05)
            assert [reference() for reference in weights] == [None, None, None]
        finally:
            gc.enable()


async def test_request_that_waits_for_a_load_is_told_when_the_drain_is_over(engine: TestedEngine) -> None:
    with engine.slow_loads():
        waiting = asyncio.create_task(collect(engine, make_params("late", lora("a"))))
        await until(lambda: engine.num_reads == 1)
        await engine.drain(0.05)
        with pytest.raises(UnavailableError) as caught:
            await asyncio.wait_for(waiting, 5)
        assert caught.value.reason == "DRAINING"
    await until(lambda: not engine._store._loads)
