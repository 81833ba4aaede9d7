"""One reader's events: nothing lost, nothing out of order, and never more waiting than the response itself."""

import asyncio
from contextlib import aclosing

import pytest

from fusionserve.engine.generation_stream import GenerationStream
from fusionserve.errors import DeadlineError
from fusionserve.generation import (
    GenerationChunk,
    GenerationEvent,
    GenerationFinished,
    GenerationStarted,
    ResolvedAdaptation,
    Timings,
    TokenFusionWeights,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)

pytestmark = pytest.mark.no_kernels

STARTED = GenerationStarted(request_id="r", usage=Usage(prompt_tokens=1), adaptation=ResolvedAdaptation())
FINISHED = GenerationFinished(
    request_id="r",
    candidates=(),
    usage=Usage(prompt_tokens=1),
    adaptation=ResolvedAdaptation(),
    timings=Timings(queue_s=0, time_to_first_token_s=0, total_s=0),
)


def make_chunk(index: int, token_id: int) -> GenerationChunk:
    logprobs = (TokenLogprobs(TokenLogprob(token_id, "", -1.0, 1)),)
    return GenerationChunk(
        candidate_index=index,
        text=f"{token_id} ",
        token_ids=(token_id,),
        logprobs=logprobs,
        fusion_weights=(TokenFusionWeights(token_id, (0.25, 0.75)),),
    )


async def read_all(stream: GenerationStream) -> list[GenerationEvent]:
    return [event async for event in stream.events()]


async def test_fast_reader_gets_every_event_as_it_came() -> None:
    stream = GenerationStream()
    sent = [STARTED, make_chunk(0, 1), make_chunk(0, 2), FINISHED]
    got: list[GenerationEvent] = []

    async def read() -> None:
        async for event in stream.events():
            got.append(event)

    reader = asyncio.create_task(read())
    for event in sent:
        stream.push(event)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.wait_for(reader, 5)
    assert got == sent


async def test_slow_reader_gets_joined_chunks_with_everything_in_them() -> None:
    stream = GenerationStream()
    stream.push(STARTED)
    for token_id in range(1000):
        stream.push(make_chunk(token_id % 2, token_id))
    stream.push(FINISHED)
    started, *chunks, finished = await read_all(stream)
    assert (started, finished) == (STARTED, FINISHED)
    assert sorted(chunk.candidate_index for chunk in chunks) == [0, 1]
    for chunk in chunks:
        mine = tuple(range(chunk.candidate_index, 1000, 2))
        assert chunk.token_ids == mine
        assert chunk.text == "".join(f"{token_id} " for token_id in mine)
        assert tuple(entry.chosen.token_id for entry in chunk.logprobs) == mine
        assert tuple(entry.position for entry in chunk.fusion_weights) == mine


async def test_equal_chunks_of_two_candidates_stay_apart() -> None:
    stream = GenerationStream()
    for index in (0, 1, 0, 1):
        stream.push(make_chunk(index, 7))
    stream.push(FINISHED)
    first, second, _ = await read_all(stream)
    assert {first.candidate_index, second.candidate_index} == {0, 1}
    assert first.token_ids == second.token_ids == (7, 7)


async def test_chunks_have_as_many_tokens_as_asked_for() -> None:
    """A candidate's first token comes at once, the last ones with the end, and nothing is lost or told twice."""
    stream = GenerationStream(4)
    told: list[tuple[int, ...]] = []

    async def read() -> None:
        async for event in stream.events():
            if isinstance(event, GenerationChunk):
                told.append(event.token_ids)

    reader = asyncio.create_task(read())
    for event in (STARTED, *(make_chunk(0, token_id) for token_id in range(11)), FINISHED):
        stream.push(event)
        for _ in range(3):
            await asyncio.sleep(0)
    await asyncio.wait_for(reader, 5)
    assert told == [(0,), (1, 2, 3, 4), (5, 6, 7, 8), (9, 10)]


async def test_first_token_of_every_candidate_comes_at_once() -> None:
    stream = GenerationStream(100)
    async with aclosing(stream.events()) as events:
        for index in (0, 1):
            stream.push(make_chunk(index, 7))
            assert await asyncio.wait_for(anext(events), 5) == make_chunk(index, 7)
        stream.push(make_chunk(0, 8))
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        stream.push(DeadlineError("too late"))
        assert await asyncio.wait_for(waiting, 5) == make_chunk(0, 8), (
            "an error does not take what came before"
        )
        with pytest.raises(DeadlineError):
            await asyncio.wait_for(anext(events), 5)


async def test_queue_of_a_reader_that_never_reads_stays_bounded() -> None:
    stream = GenerationStream()
    stream.push(STARTED)
    for token_id in range(500):
        stream.push(make_chunk(token_id % 4, token_id))
        assert len(stream._pending) <= 1 + 4


async def test_error_ends_the_stream_after_what_came_before_it() -> None:
    stream = GenerationStream()
    stream.push(STARTED)
    stream.push(make_chunk(0, 1))
    stream.push(DeadlineError("too late"))
    got: list[GenerationEvent] = []
    with pytest.raises(DeadlineError):
        async for event in stream.events():
            got.append(event)
    assert got == [STARTED, make_chunk(0, 1)]


async def test_second_terminal_event_is_never_seen() -> None:
    stream = GenerationStream()
    stream.push(FINISHED)
    stream.push(DeadlineError("after the end"))
    assert await asyncio.wait_for(read_all(stream), 5) == [FINISHED]


async def test_reader_waits_without_spinning_until_an_event_comes() -> None:
    stream = GenerationStream()
    async with aclosing(stream.events()) as events:
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        stream.push(STARTED)
        assert await asyncio.wait_for(waiting, 5) == STARTED
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.02)
        assert not waiting.done(), "the event is given once"
        stream.push(FINISHED)
        await asyncio.wait_for(waiting, 5)


async def test_who_wants_the_result_alone_is_woken_for_nothing_else() -> None:
    stream = GenerationStream(interval=None)
    reader = asyncio.create_task(read_all(stream))
    stream.push(STARTED)
    await asyncio.sleep(0)
    for token_id in range(3):
        stream.push(make_chunk(0, token_id))
        assert not stream._arrived.is_set()
    stream.push(FINISHED)
    assert await reader == [STARTED, FINISHED]
