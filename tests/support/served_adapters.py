"""A real engine over a tiny random model, adapters written to disk for it, and hands on its pace and its loads."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from fusionserve.adapters.adapter import AdapterContent
from fusionserve.adapters.artifact_directory import ArtifactDirectory
from fusionserve.adapters.side_copies import Copies
from fusionserve.config import EngineConfig
from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.engine.base_model import load_base_model
from fusionserve.engine.chunk_result import ChunkResult
from fusionserve.engine.engine import Engine
from fusionserve.engine.launched_step import LaunchedStep
from fusionserve.engine.scheduled_batch import ScheduledBatch
from fusionserve.generation import (
    Adaptation,
    AdapterTerm,
    GenerateParams,
    GenerationChunk,
    GenerationEvent,
    GenerationFinished,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
    TokenPrompt,
)
from fusionserve.metrics import AdapterLabels

VOCAB, HIDDEN, INNER, CONTEXT = 48, 32, 40, 512
KV_BLOCK_BYTES = 2 * 2 * 16 * 8 * 4 * 2  # layers, key and value, kv heads * dim, tokens, float32
GREEDY = SamplingParams(temperature=0.0)


def make_model(family: str) -> PreTrainedModel:
    """Two layers with weights large enough for lively text: "llama", "tied_llama", "gpt2" or "phi"."""
    torch.manual_seed(7)
    if family == "phi":
        return _phi()
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_embd=HIDDEN,
                n_layer=2,
                n_head=4,
                n_positions=CONTEXT,
                initializer_range=0.3,
                bos_token_id=0,
                eos_token_id=0,
            )
        ).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,
            tie_word_embeddings=family == "tied_llama",
        )
    ).eval()


def _phi() -> PreTrainedModel:
    """Every module has a bias, the LM head as well."""
    config = PhiConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = PhiForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def write_model(directory: Path, family: str = "llama") -> Path:
    """Saves `make_model(family)` without a tokenizer."""
    make_model(family).save_pretrained(directory)
    return directory


def write_lora(
    directory: Path, *, seed: int, rank: int = 4, size: float = 0.4, has_head: bool = False
) -> Path:
    """A llama adapter of q_proj and down_proj in all layers, and of the head; `size` 0 changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for path, d_in, d_out in (("self_attn.q_proj", HIDDEN, HIDDEN), ("mlp.down_proj", INNER, HIDDEN)):
            prefix = f"base_model.model.model.layers.{layer}.{path}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) * 0.4
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * size
    if has_head:
        tensors["base_model.model.lm_head.lora_A.weight"] = (
            torch.randn(rank, HIDDEN, generator=generator) * 0.4
        )
        tensors["base_model.model.lm_head.lora_B.weight"] = (
            torch.randn(VOCAB, rank, generator=generator) * size
        )
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def write_dora(directory: Path, *, seed: int, rank: int = 4) -> Path:
    """The same with a magnitude for every module, so that its outputs are scaled."""
    write_lora(directory, seed=seed, rank=rank)
    file, config_file = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    tensors = load_file(file)
    for name, tensor in list(tensors.items()):
        if "lora_B" in name:
            magnitude = torch.rand(tensor.shape[0], generator=torch.Generator().manual_seed(seed)) + 0.5
            tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = magnitude
    save_file(tensors, file)
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "use_dora": True}))
    return directory


def lora_bytes(rank: int) -> int:
    """What `write_lora` takes on the host in float32."""
    return 2 * rank * (HIDDEN + HIDDEN + INNER + HIDDEN) * 4


def make_prompt(seed: int, length: int = 8) -> tuple[int, ...]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


PROMPT = make_prompt(1, 40)  # two full blocks and a half


def blend(**weights: float) -> Adaptation:
    """Several adapters with fixed weights."""
    return Adaptation("blend", tuple(AdapterTerm(name, weight) for name, weight in weights.items()))


def lora(name: str, scale: float = 1.0) -> Adaptation:
    """One adapter."""
    return Adaptation("lora", (AdapterTerm(name, scale),))


def make_params(
    request_id: str,
    adaptation: Adaptation | None = None,
    prompt: Sequence[int] = (5, 9, 17, 4, 30),
    *,
    num_tokens: int = 12,
    sampling: SamplingParams = GREEDY,
    output: OutputOptions | None = None,
    deadline_s: float | None = None,
    time_limit_s: float | None = None,
) -> GenerateParams:
    """A greedy request for exactly `num_tokens` tokens."""
    return GenerateParams(
        request_id=request_id,
        prompt=TokenPrompt(tuple(prompt)),
        adaptation=adaptation or Adaptation(),
        sampling=sampling,
        stopping=StoppingCriteria(max_new_tokens=num_tokens, ignore_eos=True, time_limit_s=time_limit_s),
        output=output or OutputOptions(),
        deadline_s=deadline_s,
    )


class PacedRunner:
    """The engine's runner behind a gate: while paused, only as many steps are computed as the test allows."""

    def __init__(self, engine: Engine) -> None:
        self._runner = engine._pipeline.execution._runner
        self.runs_ahead = self._runner.runs_ahead
        self._may_step = threading.Condition()
        self._num_allowed: int | None = None
        self.is_waiting = threading.Event()
        self.num_steps = 0
        self.sizes_ahead: list[int] = []  # requests of those launched before the last was read
        engine._pipeline.execution._runner = self

    def execute(self, batch: ScheduledBatch) -> list[ChunkResult]:
        """One step, as soon as it is allowed."""
        self._pass()
        return self._runner.execute(batch)

    def launch(self, batch: ScheduledBatch, before: LaunchedStep | None) -> LaunchedStep:
        """Begins one, as soon as it is allowed."""
        self._pass()
        if before is not None:
            self.sizes_ahead.append(len(batch.chunks))
        return self._runner.launch(batch, before)

    def _pass(self) -> None:
        with self._may_step:
            self.is_waiting.set()
            assert self._may_step.wait_for(lambda: self._num_allowed != 0, 30), "nobody allowed a step"
            self.is_waiting.clear()
            if self._num_allowed is not None:
                self._num_allowed -= 1
        self.num_steps += 1

    def allow(self, num_steps: int | None) -> None:
        """Lets `num_steps` more steps pass; None is no limit."""
        with self._may_step:
            self._num_allowed = num_steps
            self._may_step.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Holds the engine thread at its next step."""
        self.allow(0)
        try:
            yield
        finally:
            self.allow(None)


class TestedEngine(AsyncEngine):
    """An engine whose loads can be held up and counted, and whose pace can be paused."""

    __test__ = False

    def __init__(self, *args: object) -> None:
        self.load_gate = threading.Event()
        self.load_gate.set()
        self.num_reads = 0
        super().__init__(*args)  # type: ignore[arg-type]
        self._load = self._store._load_content
        self._store._load_content = self._load_through_gate
        self.runner = PacedRunner(self.engine)

    @property
    def registry(self):  # type: ignore[no-untyped-def]
        """The host registry."""
        return self._store.registry

    @property
    def ledger(self):  # type: ignore[no-untyped-def]
        """The adapter pool's ledger."""
        return self.engine.scheduler.ledger

    def _load_through_gate(self, directory: ArtifactDirectory) -> AdapterContent:
        self.num_reads += 1
        assert self.load_gate.wait(30), "nobody opened the gate"
        return self._load(directory)

    @contextmanager
    def slow_loads(self) -> Iterator[None]:
        """Every load started in the block waits for its end."""
        self.load_gate.clear()
        try:
            yield
        finally:
            self.load_gate.set()


def load_engine(config: EngineConfig, copies: Copies | None = None) -> TestedEngine:
    """An engine that copies adapters ahead by `copies`, if there are any."""
    base = load_base_model(config)
    base.pool.copies = copies or base.pool.copies
    return TestedEngine(config, base, AdapterLabels(8))


@asynccontextmanager
async def running_engine(
    model: Path, root: Path | None, copies: Copies | None = None, **options: object
) -> AsyncIterator[TestedEngine]:
    """A started engine; at the end nothing may be left of any request."""
    config = EngineConfig(
        **{
            "model": str(model),
            "model_name": "tiny",
            "dtype": "float32",
            "adapter_dirs": () if root is None else (root,),
            "kv_cache_bytes": 4 << 20,
            "adapter_pool_ranks": 64,
            "num_threads": 1,  # the model is tiny, and waiting for a second core costs more than it gives
            **options,
        }
    )
    engine = load_engine(config, copies)
    await engine.start()
    try:
        yield engine
        await check_at_rest(engine)
    finally:
        await engine.close()


async def until(condition: object, within_s: float = 10.0) -> None:
    """Waits for `condition()` to be true."""
    assert callable(condition)
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come true in time"
        await asyncio.sleep(0.002)


async def check_at_rest(engine: TestedEngine) -> None:
    """Asserts that no request is left, and with them no block, no hold and no lease."""
    await until(lambda: not engine.engine.has_work)
    # The loop hears of a request's end after the engine has done with it.
    await until(lambda: engine._open.is_empty)
    assert list(engine.engine.scheduler.requests()) == []
    assert engine.engine.scheduler.blocks.num_used == 0
    engine.engine.scheduler.check_integrity()
    engine.registry.check_integrity(0)


def loaded(engine: TestedEngine) -> set[str]:
    """The names of the adapters on the host."""
    return {entry.loaded.name for entry in engine.registry.entries()}


@dataclass(frozen=True, slots=True)
class Outcome:
    """All events of a request; `tokens` as the last one tells them."""

    events: tuple[GenerationEvent, ...]
    finished: GenerationFinished

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of the first candidate."""
        return self.finished.candidates[0].token_ids


async def collect(engine: AsyncEngine, params: GenerateParams) -> Outcome:
    """Runs a request to its end; the chunks must add up to the final tokens."""
    async with aclosing(engine.generate(params)) as stream:
        events = tuple([event async for event in stream])
    finished = events[-1]
    assert isinstance(finished, GenerationFinished)
    for candidate in finished.candidates:
        chunks = [
            e for e in events if isinstance(e, GenerationChunk) and e.candidate_index == candidate.index
        ]
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == candidate.token_ids
    return Outcome(events, finished)


async def tokens_of(engine: AsyncEngine, name: str, num_tokens: int = 12) -> tuple[int, ...]:
    """What adapter `name` says to PROMPT with nobody else around."""
    params = make_params(f"reference-{name}", lora(name), PROMPT, num_tokens=num_tokens)
    return (await collect(engine, params)).tokens


def long_request(name: str, request_id: str = "long") -> GenerateParams:
    """PROMPT under adapter `name`, for long enough to meet other things."""
    return make_params(request_id, lora(name), PROMPT, num_tokens=60)


async def collect_all(engine: AsyncEngine, requests: Sequence[GenerateParams]) -> list[Outcome]:
    """Runs requests at once, in one crowded batch."""
    return list(await asyncio.gather(*(collect(engine, params) for params in requests)))


class OpenStream:
    """A request whose events are read in the background."""

    def __init__(self, engine: AsyncEngine, params: GenerateParams) -> None:
        self.num_tokens = 0
        self._engine = engine
        self._params = params
        self.task = asyncio.create_task(self._run())

    async def has_tokens(self, num_tokens: int = 1) -> None:
        """Waits until at least `num_tokens` tokens have arrived."""
        await until(lambda: self.num_tokens >= num_tokens or self.task.done())
        assert self.num_tokens >= num_tokens, "the stream ended before"

    async def tokens(self) -> tuple[int, ...]:
        """All its tokens, once it has ended normally."""
        return (await self.task).candidates[0].token_ids

    async def _run(self) -> GenerationFinished:
        async with aclosing(self._engine.generate(self._params)) as stream:
            async for event in stream:
                if isinstance(event, GenerationChunk):
                    self.num_tokens += len(event.token_ids)
                if isinstance(event, GenerationFinished):
                    return event
        raise AssertionError("the stream had no last event")


async def begin(engine: TestedEngine, *requests: GenerateParams) -> list[OpenStream]:
    """Starts streams on a paused engine and lets it run until each has a token or a few."""
    num_before = len(engine._streams)
    streams = [OpenStream(engine, params) for params in requests]
    await until(lambda: len(engine._streams) == num_before + len(requests))
    engine.runner.allow(4)  # one may have begun without the last requests
    for stream in streams:
        await stream.has_tokens()
    return streams
