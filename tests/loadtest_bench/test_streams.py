"""The round of a driver that runs every stream of a job as a coroutine."""

import asyncio
import time

import pytest

from fusionserve.loadtest.bench.drivers.streams import EndedStream, run_streams


async def meeting_stream(barrier: asyncio.Barrier, first_token_s: float, token_ids: list[int]) -> EndedStream:
    """Ends only if the others run at the same time."""
    async with asyncio.timeout(5):
        await barrier.wait()
    return EndedStream(first_token_s, token_ids)


async def test_streams_run_together_and_the_last_first_token_parts_the_round() -> None:
    barrier, now_s = asyncio.Barrier(2), time.monotonic()
    late, early = (meeting_stream(barrier, now_s + n, [n, n]) for n in (200, 100))
    outcome = await run_streams([late, early])
    assert outcome.token_ids == [[200, 200], [100, 100]]
    assert outcome.prompt_s == pytest.approx(200, abs=5)
    assert 0 < outcome.total_s < 5


async def test_a_failing_stream_fails_the_round() -> None:
    async def failing_stream() -> EndedStream:
        raise RuntimeError("a stream ended without a result")

    with pytest.raises(RuntimeError, match="without a result"):
        await run_streams([failing_stream()])
