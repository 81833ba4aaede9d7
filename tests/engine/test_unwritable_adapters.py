"""An adapter whose weights cannot be written to the pool is its own requests' misfortune."""

from __future__ import annotations

import asyncio
import logging

import pytest
from served_adapters import TestedEngine, begin, blend, collect, long_request, lora, make_params, tokens_of

from fusionserve import failpoints
from fusionserve.adapters.pool_ledger import WriteRows
from fusionserve.errors import InternalError


@pytest.fixture
def broken(engine: TestedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> str:
    """The name of an adapter that fails whenever it is written."""
    caplog.set_level(logging.CRITICAL + 1)
    pool = engine._base.pool
    write = pool._write

    def fail_for_b(change: WriteRows) -> None:
        write(change)
        if change.resident.name == "b":
            raise RuntimeError("it cannot be written")

    monkeypatch.setattr(pool, "_write", fail_for_b)
    return "b"


async def test_adapter_that_cannot_be_written_ends_its_own_requests_each_time(
    engine: TestedEngine, broken: str
) -> None:
    expected = {name: await tokens_of(engine, name, 60) for name in "acd"}
    with engine.runner.paused():
        (running,) = await begin(engine, long_request("a", "running"))
    for attempt in ("first", "second"):
        requests = [
            make_params(f"{attempt}-lora", lora(broken)),
            make_params(f"{attempt}-blend", blend(c=0.5, b=0.5)),
            long_request("c", f"{attempt}-c"),
            long_request("d", f"{attempt}-d"),
        ]
        results = await asyncio.gather(*(collect(engine, r) for r in requests), return_exceptions=True)
        assert [isinstance(result, InternalError) for result in results] == [True, True, False, False]
        assert [result.tokens for result in results[2:]] == [expected["c"], expected["d"]]  # type: ignore[union-attr]
    assert await running.tokens() == expected["a"]
    assert (await engine.get_adapter(broken)).residency.name == "HOST"


async def test_adapter_that_could_not_be_written_once_is_written_again(
    engine: TestedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = await tokens_of(engine, "a")
    await engine.unload_adapter("a", force=False)
    monkeypatch.setattr(failpoints, "_ARMED", failpoints.parse_failpoints("pool.activate=1*raise"))
    with caplog.at_level(logging.CRITICAL + 1), pytest.raises(InternalError):
        await tokens_of(engine, "a")
    assert await tokens_of(engine, "a") == expected
