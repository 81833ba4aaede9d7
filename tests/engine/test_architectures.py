"""Every supported architecture against transformers' own greedy generation, token for token in float32."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, FAMILIES, MIXTURES, VOCAB_SIZE, save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fusionserve.config import EngineConfig
from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.engine.base_model import BaseModel, load_base_model
from fusionserve.engine.cache_need import cache_bytes_per_token
from fusionserve.generation import (
    GenerateParams,
    GenerationFinished,
    SamplingParams,
    StoppingCriteria,
    TokenPrompt,
)
from fusionserve.metrics import AdapterLabels

pytestmark = pytest.mark.gpu

NUM_NEW_TOKENS = 24
MAX_CONTEXT = 64
MIN_MARGIN = 5e-4  # between the two best logits; float32 noise is a hundredth of it
MIN_DISTINCT_TOKENS = 5  # in every continuation: one that repeats itself would hide errors
MAX_BFLOAT16_SHORTFALL = 0.3  # in logits, whose standard deviation is 2.5

Tokens = tuple[int, ...]


def _make_prompts() -> list[Tokens]:
    """Of 1 to 38 tokens; three begin alike."""
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Tokens:
        return tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())

    shared = draw(24)
    return [
        draw(1),
        draw(3),
        shared + draw(2),
        draw(9),
        shared + draw(14),
        draw(17),
        shared[:16] + draw(5),
    ]


PROMPTS = _make_prompts()


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model and what `generate` says about each of PROMPTS."""

    architecture: str
    base: BaseModel
    expected: list[Tokens]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    yield Subject(request.param, load_base_model(make_config(directory)), greedy_oracle(directory))
    torch.set_num_threads(num_threads)


def test_known_families_have_a_decoder_of_our_own(subject: Subject) -> None:
    base, is_known = subject.base, subject.architecture in FAMILIES | MIXTURES
    num_layers = len(base.decoder.layers) if base.decoder else 0
    assert num_layers == (base.model.config.num_hidden_layers if is_known else 0)


def test_directory_without_tokenizer_files_has_no_tokenizer(subject: Subject) -> None:
    """transformers makes up an empty tokenizer for some architectures."""
    assert not subject.base.tokenizer.is_present


async def test_alone_equals_generate(subject: Subject) -> None:
    async with serving(subject.base, enable_prefix_cache=False) as engine:
        produced = [(await generate(engine, prompt)).candidates[0].token_ids for prompt in PROMPTS]
    assert produced == subject.expected


async def test_crowded_equals_generate(subject: Subject) -> None:
    async with serving(subject.base) as engine:
        assert tokens_of(await generate_together(engine, PROMPTS)) == subject.expected


async def test_chunked_and_prefix_cached_equals_generate(subject: Subject) -> None:
    async with serving(subject.base, max_batch_tokens=8, block_size=4) as engine:
        cold = await generate_together(engine, PROMPTS)
        warm = await generate_together(engine, PROMPTS)
    assert tokens_of(cold) == subject.expected
    assert tokens_of(warm) == subject.expected
    assert [finished.usage.cached_tokens for finished in warm] == [
        (len(prompt) - 1) // 4 * 4 for prompt in PROMPTS
    ]


async def test_preempted_equals_generate(subject: Subject) -> None:
    one_context = cache_bytes_per_token(subject.base.cache_shapes, subject.base.dtype) * MAX_CONTEXT
    async with serving(subject.base, block_size=4, kv_cache_bytes=one_context, max_batch_tokens=32) as engine:
        assert tokens_of(await generate_together(engine, PROMPTS)) == subject.expected
    assert engine.engine.scheduler.num_preemptions > 0


# Those that transformers' own forward in bfloat16 leads further astray than that, with some seeds.
@pytest.mark.parametrize("architecture", sorted(set(CONFIGS) - {"deepseek_v3", "granitemoe", "opt", "phi"}))
async def test_bfloat16_chooses_tokens_near_the_best(architecture: str, tmp_path: Path) -> None:
    directory = save_tiny_model(architecture, tmp_path)
    base = load_base_model(replace(make_config(directory), dtype="bfloat16"))
    async with serving(base, max_batch_tokens=16) as engine:
        produced = tokens_of(await generate_together(engine, PROMPTS))
    assert base.dtype is torch.bfloat16
    oracle = load_oracle(directory)
    shortfalls = [shortfall(oracle, *pair) for pair in zip(PROMPTS, produced, strict=True)]
    assert torch.cat(shortfalls).quantile(0.95).item() < MAX_BFLOAT16_SHORTFALL


def make_config(directory: Path) -> EngineConfig:
    return EngineConfig(
        model=str(directory),
        model_name="tiny",
        dtype="float32",
        max_context_tokens=MAX_CONTEXT,
        num_threads=1,
    )


@asynccontextmanager
async def serving(base: BaseModel, **options: int) -> AsyncIterator[AsyncEngine]:
    """An engine over `base`; when it is done, every block is free and the books balance."""
    config = EngineConfig(model="", model_name="tiny", **{"kv_cache_bytes": 1 << 22, **options})
    engine = AsyncEngine(config, base, AdapterLabels(8))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()
    engine.engine.scheduler.check_integrity()
    assert engine.engine.scheduler.blocks.num_used == 0


async def generate(engine: AsyncEngine, prompt: Tokens, request_id: str = "alone") -> GenerationFinished:
    params = GenerateParams(
        request_id=request_id,
        prompt=TokenPrompt(prompt),
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingCriteria(max_new_tokens=NUM_NEW_TOKENS, ignore_eos=True),
    )
    async with aclosing(engine.generate(params)) as events:
        async for event in events:
            if isinstance(event, GenerationFinished):
                return event
    raise AssertionError("the stream ended without its last event")


async def generate_together(engine: AsyncEngine, prompts: Sequence[Tokens]) -> list[GenerationFinished]:
    return await asyncio.gather(
        *(generate(engine, prompt, f"request-{index}") for index, prompt in enumerate(prompts))
    )


def tokens_of(responses: Sequence[GenerationFinished]) -> list[Tokens]:
    return [finished.candidates[0].token_ids for finished in responses]


def load_oracle(directory: Path) -> PreTrainedModel:
    """transformers' model with its own attention, in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    return model.eval()


def greedy_oracle(directory: Path) -> list[Tokens]:
    """`generate` on each prompt alone; fails if the model makes too easy or too close a test."""
    model = load_oracle(directory)
    continuations = []
    for prompt in PROMPTS:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            pad_token_id=2,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(output.logits).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > MIN_MARGIN, "a near tie: choose another seed"
        continuations.append(tuple(output.sequences[0, len(prompt) :].tolist()))
        assert len(set(continuations[-1])) >= MIN_DISTINCT_TOKENS, "it repeats itself: choose another seed"
    return continuations


@torch.inference_mode()
def shortfall(oracle: PreTrainedModel, prompt: Tokens, continuation: Tokens) -> Tensor:
    """How far below the best logit each token of the continuation is, in the oracle's eyes."""
    logits = oracle(input_ids=torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
    return logits.amax(dim=-1) - logits.gather(1, torch.tensor(continuation)[:, None])[:, 0]
