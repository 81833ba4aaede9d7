"""The world of the life-cycle machine: files, an engine that is paused between rules, a quiet one as the oracle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from delayed_copies import DelayedCopies
from served_adapters import TestedEngine, load_engine, lora_bytes, make_prompt, write_lora, write_model
from served_fusions import write_fusion

from fusionserve.adapters.side_copies import Copies
from fusionserve.config import EngineConfig
from fusionserve.errors import FusionServeError
from fusionserve.generation import (
    Adaptation,
    AdapterTerm,
    GenerateParams,
    GenerationChunk,
    GenerationEvent,
    GenerationFinished,
    GenerationStarted,
    SamplingParams,
    StoppingCriteria,
    TokenPrompt,
)

NAMES = ("a", "b", "c", "d")
MEMBERS = ("a", "b")
FUSION = "mix"
NUM_CONTENTS = 3
PROMPTS = tuple(make_prompt(seed, length) for seed, length in ((1, 5), (2, 18), (3, 40)))
SAMPLINGS = (SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=5))
MAX_TOKENS = 24
PATIENCE_S = 30.0

ResultT = TypeVar("ResultT")
Contents = tuple[tuple[str, int], ...]  # of the adapters of a request: (name, which of its contents)


@dataclass(frozen=True)
class Wish:
    """What a request asks for, apart from its id; `contents` are those its adapters have when it is admitted."""

    kind: str
    contents: Contents
    prompt: int
    sampling: int
    num_tokens: int = MAX_TOKENS
    deadline_in_s: float | None = None

    def adaptation(self, name_of: Callable[[str, int], str]) -> Adaptation:
        """The adaptation, with the names that `name_of(name, content)` gives."""
        if self.kind == "fusion":
            return Adaptation("fusion", fusion=FUSION)
        scale = 0.5 if self.kind == "blend" else 1.0
        return Adaptation(self.kind, tuple(AdapterTerm(name_of(*one), scale) for one in self.contents))

    def params(self, request_id: str, name_of: Callable[[str, int], str]) -> GenerateParams:
        """The request."""
        deadline_s = None if self.deadline_in_s is None else time.monotonic() + self.deadline_in_s
        return GenerateParams(
            request_id=request_id,
            prompt=TokenPrompt(PROMPTS[self.prompt]),
            adaptation=self.adaptation(name_of),
            sampling=SAMPLINGS[self.sampling],
            stopping=StoppingCriteria(max_new_tokens=self.num_tokens, ignore_eos=True),
            deadline_s=deadline_s,
        )


@dataclass(eq=False)
class Stream:
    """An open request: what was asked, what has come of it so far."""

    wish: Wish
    request_id: str
    events: AsyncGenerator[GenerationEvent, None]
    tokens: list[int] = field(default_factory=list)
    digests: tuple[str, ...] = ()
    error: FusionServeError | None = None
    is_over: bool = False

    async def read(self) -> None:
        """One more event, or the error that ends it."""
        try:
            event = await anext(self.events)
        except FusionServeError as error:
            self.error, self.is_over = error, True
            return
        if isinstance(event, GenerationStarted):
            self.digests = tuple(member.digest for member in event.adaptation.members)
        elif isinstance(event, GenerationChunk):
            self.tokens += event.token_ids
        elif isinstance(event, GenerationFinished):
            assert tuple(self.tokens) == event.candidates[0].token_ids
            self.is_over = True
            await self.events.aclose()


class Files:
    """A base model, four adapters of three contents each, and a fusion of two of them in their first content."""

    def __init__(self, root: Path) -> None:
        self.model = write_model(root / "model")
        self.adapters, self.fusions = root / "adapters", root / "fusions"
        for index, name in enumerate(NAMES):
            for content in range(NUM_CONTENTS):
                write_lora(self.adapters / self.path(name, content), seed=10 * index + content)
        write_fusion(self.fusions, FUSION, MEMBERS, self.adapters, seed=1)
        # The oracle knows every content by a name of its own.
        for index, name in enumerate(NAMES):
            for content in range(1, NUM_CONTENTS):
                write_lora(self.adapters / oracle_name(name, content), seed=10 * index + content)

    def path(self, name: str, content: int) -> str:
        """Where a content lies under the adapters' folder; the first is the one found by its name alone."""
        return name if content == 0 else f"contents/{name}-{content}"

    async def engine(self, copies: Copies | None = None, **options: object) -> TestedEngine:
        """A started engine over these files."""
        fields: dict[str, object] = {
            "model": str(self.model),
            "model_name": "tiny",
            "dtype": "float32",
            "adapter_dirs": (self.adapters,),
            "fusion_dirs": (self.fusions,),
            "max_context_tokens": 96,
            "num_threads": 1,
            **options,
        }
        engine = load_engine(EngineConfig(**fields), copies)  # type: ignore[arg-type]
        await engine.start()
        return engine


def oracle_name(name: str, content: int) -> str:
    """What the oracle calls a content."""
    return name if content == 0 else f"{name}.{content}"


class World:
    """One event loop, the engine under test, and an oracle that serves one request at a time.

    The engine's copies to the pool are late by `copy_delay` questions after them, or are made in the step (None).
    """

    def __init__(self, root: Path, copy_delay: int | None) -> None:
        self._copy_delay = copy_delay
        self._runner = asyncio.Runner()
        self.files = Files(root)
        self._tokens: dict[Wish, tuple[int, ...]] = {}
        self._oracle = self._runner.run(self.files.engine())
        self.digests = {
            (name, content): self._runner.run(
                self._oracle.load_adapter(oracle, None, pin=False, replace=True)
            ).digest
            for name in NAMES
            for content in range(NUM_CONTENTS)
            for oracle in (oracle_name(name, content),)
        }
        self._engine: TestedEngine | None = None

    @property
    def engine(self) -> TestedEngine:
        """The engine under test, paused: host room for three adapters, a pool for a few, blocks for two contexts."""
        if self._engine is None:
            self._engine = self._runner.run(
                self.files.engine(
                    None if self._copy_delay is None else DelayedCopies(self._copy_delay),
                    adapter_host_bytes=3 * lora_bytes(4) + 1,
                    adapter_pool_ranks=28,
                    kv_cache_bytes=12 * 8192,
                    max_batch_requests=6,
                    max_queued_requests=6,
                )
            )
            self._engine.runner.allow(0)
        return self._engine

    def close_engine(self) -> None:
        """Closes the engine under test; the next one is made anew."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.runner.allow(None)
            self._runner.run(engine.close())

    def run(self, awaitable: Awaitable[ResultT]) -> ResultT:
        """Runs the loop until `awaitable` is done, letting the engine take the steps that it waits for."""
        return self._runner.run(self._stepping(awaitable))

    def run_paused(self, awaitable: Awaitable[ResultT]) -> ResultT:
        """Runs the loop until `awaitable` is done, which must not need the engine."""

        async def wait() -> ResultT:
            return await awaitable

        return self._runner.run(wait())

    def expected(self, wish: Wish) -> tuple[int, ...]:
        """The tokens of the same request alone."""
        whole = Wish(wish.kind, wish.contents, wish.prompt, wish.sampling)
        if whole not in self._tokens:
            self._tokens[whole] = self._runner.run(self._ask_oracle(whole))
        return self._tokens[whole][: wish.num_tokens]

    def close(self) -> None:
        """Closes the engines and the loop."""
        self.close_engine()
        self._runner.run(self._oracle.close())
        self._runner.close()

    async def _stepping(self, awaitable: Awaitable[ResultT]) -> ResultT:
        task = asyncio.ensure_future(awaitable)
        end_s = time.monotonic() + PATIENCE_S
        while not task.done():
            if self._engine is not None:
                self._engine.runner.allow(1)
            await asyncio.wait([task], timeout=0.001)
            assert time.monotonic() < end_s, "nothing came of it"
        return task.result()

    async def _ask_oracle(self, wish: Wish) -> tuple[int, ...]:
        async with aclosing(self._oracle.generate(wish.params("oracle", oracle_name))) as events:
            async for event in events:
                if isinstance(event, GenerationFinished):
                    return event.candidates[0].token_ids
        raise AssertionError("the oracle said nothing")
