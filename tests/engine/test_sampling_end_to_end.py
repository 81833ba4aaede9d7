"""Generation with the shipped model, from the parameters of a request to its events."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusionserve import metrics
from fusionserve.config import EMBEDDED_ADAPTERS, EMBEDDED_MODEL, EMBEDDED_MODEL_NAME, EngineConfig
from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.generation import (
    Adaptation,
    AdapterTerm,
    Candidate,
    FinishReason,
    GenerateParams,
    GenerationChunk,
    GenerationEvent,
    GenerationFinished,
    GenerationStarted,
    OutputOptions,
    Prompt,
    SamplingParams,
    StoppingCriteria,
    TextPrompt,
    TokenLogprobs,
    TokenPrompt,
)
from fusionserve.metrics import AdapterLabels

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.gpu]

DEFAULT_MAX_NEW_TOKENS = 7
BLOCK_SIZE = 8
TEXT = "The quick brown fox of the library returns a list of files, one per line.\n"
GREEDY = SamplingParams(temperature=0.0)
ADAPTERS = sorted(path.name for path in EMBEDDED_ADAPTERS.iterdir())

_request_ids = count()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[AsyncEngine]:
    config = EngineConfig(
        model=str(EMBEDDED_MODEL),
        model_name=EMBEDDED_MODEL_NAME,
        dtype="float32",
        adapter_dirs=(EMBEDDED_ADAPTERS,),
        block_size=BLOCK_SIZE,
        max_batch_tokens=48,
        max_batch_requests=8,
        kv_cache_bytes=8 << 20,
        default_max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
    )
    engine = AsyncEngine.load(config, AdapterLabels(8))
    await engine.start()
    yield engine
    await engine.close()
    scheduler = engine.engine.scheduler
    scheduler.check_integrity()
    assert scheduler.blocks.num_used == 0


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@cache
def reference_logprobs(token_ids: tuple[int, ...]) -> torch.Tensor:
    """log_softmax of transformers' own forward pass, [tokens, vocab]."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([token_ids])).logits[0], dim=-1)


@dataclass(frozen=True)
class Told:
    """What one request was told."""

    started: GenerationStarted
    chunks: list[GenerationChunk]
    finished: GenerationFinished

    @property
    def candidate(self) -> Candidate:
        (candidate,) = self.finished.candidates
        return candidate


async def generate(
    engine: AsyncEngine, prompt: str | Prompt = TEXT, *, max_new_tokens: int | None = 12, **fields: Any
) -> Told:
    """Runs one request and checks what holds for every one: the order of events, and that chunks add up."""
    stopping = fields.pop("stopping", {})
    if max_new_tokens is not None:
        stopping = {"max_new_tokens": max_new_tokens, **stopping}
    params = GenerateParams(
        request_id=f"end-to-end-{next(_request_ids)}",
        prompt=TextPrompt(prompt) if isinstance(prompt, str) else prompt,
        stopping=StoppingCriteria(**stopping),
        **fields,
    )
    events: list[GenerationEvent] = [event async for event in engine.generate(params)]
    started, finished = events[0], events[-1]
    chunks = [event for event in events if isinstance(event, GenerationChunk)]
    assert isinstance(started, GenerationStarted) and isinstance(finished, GenerationFinished)
    assert len(chunks) == len(events) - 2
    assert started.request_id == finished.request_id == params.request_id
    assert [candidate.index for candidate in finished.candidates] == list(range(params.num_candidates))
    for candidate in finished.candidates:
        own = [chunk for chunk in chunks if chunk.candidate_index == candidate.index]
        assert "".join(chunk.text for chunk in own) == candidate.text
        assert sum((chunk.token_ids for chunk in own), ()) == candidate.token_ids
        assert sum((chunk.logprobs for chunk in own), ()) == candidate.logprobs
    num_generated = sum(len(candidate.token_ids) for candidate in finished.candidates)
    assert finished.usage.generated_tokens == num_generated
    assert finished.usage.prompt_tokens == started.usage.prompt_tokens
    timings = finished.timings
    assert 0 <= timings.queue_s <= timings.time_to_first_token_s <= timings.total_s
    return Told(started, chunks, finished)


def tokens(told: Told) -> list[tuple[int, ...]]:
    return [candidate.token_ids for candidate in told.finished.candidates]


def decode(token_ids: Sequence[int]) -> str:
    text: str = tokenizer().decode(token_ids, skip_special_tokens=True)
    return text


def lora(name: str) -> Adaptation:
    return Adaptation("lora", (AdapterTerm(name),))


async def test_seed_gives_the_same_tokens_twice_alone_and_in_a_crowd(engine: AsyncEngine) -> None:
    def mine(seed: int) -> Any:
        return generate(engine, max_new_tokens=24, sampling=SamplingParams(seed=seed), cache_salt=str(seed))

    alone = [tokens(await mine(seed)) for seed in (1, 2)]
    assert alone[0] != alone[1]
    assert tokens(await mine(1)) == alone[0]
    crowd = [
        generate(
            engine,
            TEXT[number:],
            adaptation=lora(ADAPTERS[number % len(ADAPTERS)]),
            sampling=SamplingParams(temperature=0.5 * number, top_k=number, seed=1),
            max_new_tokens=20,
        )
        for number in range(9)
    ]
    first, *_, second = await asyncio.gather(mine(1), *crowd, mine(2))
    assert [tokens(first), tokens(second)] == alone


async def test_fresh_seeds_differ(engine: AsyncEngine) -> None:
    one, other = await asyncio.gather(
        *(generate(engine, sampling=SamplingParams(temperature=2.0)) for _ in range(2))
    )
    assert tokens(one) != tokens(other)


async def test_candidates_differ_and_do_not_depend_on_their_number(engine: AsyncEngine) -> None:
    sampling = SamplingParams(temperature=2.0, seed=3)
    few = tokens(await generate(engine, sampling=sampling, num_candidates=2))
    many = tokens(await generate(engine, sampling=sampling, num_candidates=4))
    assert many[:2] == few
    assert len(set(many)) == 4


async def test_greedy_candidates_agree(engine: AsyncEngine) -> None:
    assert len(set(tokens(await generate(engine, sampling=GREEDY, num_candidates=3)))) == 1


async def test_candidates_compute_their_prompt_once(engine: AsyncEngine) -> None:
    prompt = tuple(range(100, 100 + 5 * BLOCK_SIZE + 3))
    before = metrics.STEP_TOKENS._value.get()
    told = await generate(
        engine, TokenPrompt(prompt), num_candidates=4, cache_salt="once", max_new_tokens=5, sampling=GREEDY
    )
    assert told.finished.usage.cached_tokens == 0
    assert told.finished.usage.prompt_tokens == len(prompt)
    num_shared, num_rest, num_decoded = 5 * BLOCK_SIZE, 3, 4
    assert metrics.STEP_TOKENS._value.get() - before == num_shared + 4 * (num_rest + num_decoded)
    again = await generate(engine, TokenPrompt(prompt), cache_salt="once", max_new_tokens=5, sampling=GREEDY)
    assert again.started.usage.cached_tokens == again.finished.usage.cached_tokens == num_shared
    assert tokens(again)[0] == tokens(told)[0]


async def test_greedy_tokens_are_the_most_likely_ones(engine: AsyncEngine) -> None:
    told = await generate(engine, sampling=GREEDY, output=OutputOptions(logprobs=1))
    for entry in told.candidate.logprobs:
        assert entry.chosen == entry.top[0]
        assert entry.chosen.rank == 1


async def test_top_k_and_min_p_bound_the_ranks_drawn(engine: AsyncEngine) -> None:
    async def run(sampling: SamplingParams) -> tuple[TokenLogprobs, ...]:
        stopping = {"ignore_eos": True, "max_new_tokens": 40}
        told = await generate(engine, sampling=sampling, stopping=stopping, output=OutputOptions(logprobs=1))
        return told.candidate.logprobs

    narrow = await run(SamplingParams(temperature=20.0, top_k=3, seed=1))
    assert {entry.chosen.rank for entry in narrow} == {1, 2, 3}
    for entry in await run(SamplingParams(min_p=0.5)):
        assert entry.chosen.logprob >= entry.top[0].logprob - 0.694  # ln 2


async def test_frequency_penalty_and_bias_reach_the_sampler(engine: AsyncEngine) -> None:
    sampling = SamplingParams(temperature=0.0, frequency_penalty=100.0)
    told = await generate(engine, sampling=sampling, max_new_tokens=40, stopping={"ignore_eos": True})
    assert len(set(told.candidate.token_ids)) == 40
    forced = await generate(engine, sampling=SamplingParams(temperature=0.0, logit_bias={77: 100.0}))
    assert set(forced.candidate.token_ids) == {77}
    penalized = SamplingParams(temperature=0.0, logit_bias={77: 100.0}, presence_penalty=100.0)
    told = await generate(engine, sampling=penalized, stopping={"ignore_eos": True})
    assert told.candidate.token_ids[0] == 77
    assert told.candidate.token_ids.count(77) < 12


async def test_logprobs_are_those_of_transformers(engine: AsyncEngine) -> None:
    told = await generate(
        engine,
        max_new_tokens=10,
        sampling=SamplingParams(temperature=0.7, seed=4, presence_penalty=0.5),
        output=OutputOptions(logprobs=3, prompt_logprobs=2),
    )
    prompt = tuple(tokenizer().encode(TEXT))
    whole = (*prompt, *told.candidate.token_ids)
    expected = reference_logprobs(whole)
    entries = (*told.finished.prompt_logprobs, *told.candidate.logprobs)
    assert len(told.finished.prompt_logprobs) == len(prompt) - 1
    assert len(entries) == len(whole) - 1
    for position, entry in enumerate(entries):
        num_top = 2 if position < len(prompt) - 1 else 3
        assert_logprobs(entry, expected[position], whole[position + 1], num_top)


def assert_logprobs(entry: TokenLogprobs, expected: torch.Tensor, token_id: int, num_top: int) -> None:
    chosen = entry.chosen
    assert chosen.token_id == token_id
    assert chosen.text == tokenizer().decode([token_id])
    assert chosen.logprob == pytest.approx(expected[token_id].item(), abs=2e-4)
    above = (expected > expected[token_id] + 2e-4).sum().item()
    not_below = (expected > expected[token_id] - 2e-4).sum().item()
    assert above + 1 <= chosen.rank <= not_below
    assert [top.rank for top in entry.top] == list(range(1, num_top + 1))
    top = expected.topk(num_top).values.tolist()
    assert [entry.logprob for entry in entry.top] == pytest.approx(top, abs=2e-4)


async def test_logprobs_are_absent_unless_asked_for(engine: AsyncEngine) -> None:
    plain = await generate(engine)
    assert plain.candidate.logprobs == () and plain.finished.prompt_logprobs == ()
    chosen_only = await generate(engine, output=OutputOptions(logprobs=0, prompt_logprobs=0))
    assert {entry.top for entry in chosen_only.candidate.logprobs} == {()}
    assert {entry.top for entry in chosen_only.finished.prompt_logprobs} == {()}


async def test_prompt_logprobs_are_told_once_for_several_candidates(engine: AsyncEngine) -> None:
    told = await generate(engine, num_candidates=3, output=OutputOptions(prompt_logprobs=0))
    token_ids = [entry.chosen.token_id for entry in told.finished.prompt_logprobs]
    assert token_ids == tokenizer().encode(TEXT)[1:]


async def test_text_is_the_decoded_tokens(engine: AsyncEngine) -> None:
    sampling, stopping = SamplingParams(temperature=3.0, seed=5), {"ignore_eos": True}
    told = await generate(engine, max_new_tokens=60, sampling=sampling, stopping=stopping)
    assert told.candidate.text == decode(told.candidate.token_ids)
    assert told.candidate.finish_reason is FinishReason.LENGTH


async def test_default_number_of_new_tokens_is_the_engines(engine: AsyncEngine) -> None:
    told = await generate(engine, max_new_tokens=None, stopping={"ignore_eos": True})
    assert len(told.candidate.token_ids) == DEFAULT_MAX_NEW_TOKENS


async def test_default_number_of_new_tokens_stops_where_the_context_ends(engine: AsyncEngine) -> None:
    room = 3
    prompt = TokenPrompt((5,) * (engine.model_info().max_context_tokens - room))
    told = await generate(engine, prompt, max_new_tokens=None, stopping={"ignore_eos": True})
    assert len(told.candidate.token_ids) == room
    assert told.candidate.finish_reason is FinishReason.LENGTH


async def test_end_of_text_ends_unless_ignored_or_too_early(engine: AsyncEngine) -> None:
    (eos,) = engine.model_info().eos_token_ids
    sampling = SamplingParams(temperature=0.0, logit_bias={eos: 100.0})
    told = await generate(engine, sampling=sampling)
    assert told.candidate.token_ids == (eos,)
    assert (told.candidate.finish_reason, told.candidate.stop_token_id) == (FinishReason.STOP, eos)
    assert told.candidate.text == ""
    ignored = await generate(engine, sampling=sampling, stopping={"ignore_eos": True})
    assert ignored.candidate.token_ids == (eos,) * 12
    assert ignored.candidate.finish_reason is FinishReason.LENGTH
    late = await generate(engine, sampling=sampling, stopping={"min_new_tokens": 4})
    assert len(late.candidate.token_ids) == 5
    assert eos not in late.candidate.token_ids[:4] and late.candidate.token_ids[4] == eos


async def test_stop_tokens_end_and_are_shown_only_if_asked(engine: AsyncEngine) -> None:
    stop = 77
    sampling = SamplingParams(temperature=0.0, logit_bias={stop: 100.0})
    told = await generate(
        engine, sampling=sampling, stopping={"stop_token_ids": (stop,), "min_new_tokens": 2}
    )
    assert told.candidate.token_ids.index(stop) == 2 == len(told.candidate.token_ids) - 1
    assert (told.candidate.finish_reason, told.candidate.stop_token_id) == (FinishReason.STOP, stop)
    assert told.candidate.text == decode(told.candidate.token_ids[:2])
    shown = await generate(
        engine,
        sampling=sampling,
        stopping={"stop_token_ids": (stop,), "min_new_tokens": 2, "include_stop": True},
    )
    assert shown.candidate.text == decode(shown.candidate.token_ids)


async def test_stop_string_across_tokens_cuts_the_text(engine: AsyncEngine) -> None:
    async def run(**stopping: Any) -> Candidate:
        stopping |= {"max_new_tokens": 60, "ignore_eos": True}
        told = await generate(engine, stopping=stopping, sampling=SamplingParams(temperature=2.0, seed=6))
        return told.candidate

    whole = await run()
    begin, stop = first_string_across_tokens(whole)
    cut = await run(stop=(stop, "\0"))
    assert cut.text == whole.text[:begin]
    assert (cut.finish_reason, cut.stop_string) == (FinishReason.STOP_STRING, stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    kept = await run(stop=(stop,), include_stop=True)
    assert kept.text == whole.text[:begin] + stop


def first_string_across_tokens(candidate: Candidate) -> tuple[int, str]:
    """Where a string begins that ends in another token, and that occurs nowhere before; and the string."""
    text = candidate.text
    ends = [len(decode(candidate.token_ids[:length])) for length in range(5, 40)]
    return next(
        (end - 2, text[end - 2 : end + 3]) for end in ends if text[end - 2 : end + 3] not in text[: end + 2]
    )


async def test_time_limit_ends_with_what_there_is(engine: AsyncEngine) -> None:
    told = await generate(
        engine, max_new_tokens=900, stopping={"time_limit_s": 0.3, "ignore_eos": True}, num_candidates=2
    )
    for candidate in told.finished.candidates:
        assert candidate.finish_reason is FinishReason.TIME_LIMIT
        assert len(candidate.token_ids) < 900
    assert told.finished.timings.total_s >= 0.3


async def test_higher_priority_is_served_first(engine: AsyncEngine) -> None:
    order: list[str] = []

    async def run(name: str, priority: int, max_new_tokens: int) -> None:
        stopping = {"ignore_eos": True}
        await generate(engine, priority=priority, max_new_tokens=max_new_tokens, stopping=stopping)
        order.append(name)

    crowd = [asyncio.create_task(run("crowd", 0, 60)) for _ in range(8)]  # as many as run at once
    while len(engine.engine.scheduler.running) < 8:
        await asyncio.sleep(0.001)
    low = [asyncio.create_task(run("low", -1, 20)) for _ in range(8)]
    while len(engine.engine.scheduler.waiting) < 8:
        await asyncio.sleep(0.001)
    high = asyncio.create_task(run("high", 5, 1))
    await asyncio.gather(*crowd, *low, high)
    assert order.index("high") < order.index("low")


async def test_closed_stream_frees_its_blocks(engine: AsyncEngine) -> None:
    params = GenerateParams(
        request_id="left",
        prompt=TextPrompt(TEXT),
        stopping=StoppingCriteria(max_new_tokens=900, ignore_eos=True),
        num_candidates=2,
    )
    events = engine.generate(params)
    async for event in events:
        if isinstance(event, GenerationChunk):
            break
    await events.aclose()
    async with asyncio.timeout(10):
        while engine.engine.scheduler.blocks.num_used:
            await asyncio.sleep(0.002)
    assert metrics.KV_BLOCKS_USED._value.get() == metrics.REQUESTS_RUNNING._value.get() == 0
