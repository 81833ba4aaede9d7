"""Turns a client's parameters into a generation: tokens, checks that need the model, and leases on its adapters."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from fusionserve.adapters.adapter import Adapter
from fusionserve.adapters.store import AdapterStore
from fusionserve.engine.leased_adaptation import LeasedAdaptation
from fusionserve.engine.request import Generation, Request
from fusionserve.engine.text_output import TextOutput
from fusionserve.engine.tokenizer import Tokenizer
from fusionserve.engine.unadmitted import TimeLimitPassed
from fusionserve.errors import (
    CapacityError,
    DeadlineError,
    InvalidRequestError,
    PreconditionError,
    UnavailableError,
)
from fusionserve.fusion.fusion import Fusion
from fusionserve.fusion.store import FusionStore
from fusionserve.generation import Adaptation, ChatPrompt, GenerateParams, Prompt, TextPrompt, TokenPrompt

# Real texts have 3 to 8 bytes a token. What has more than this would be refused once it is tokenized, which takes
# a second per megabyte.
MAX_BYTES_PER_TOKEN = 64
_LEAST_MAX_TEXT_BYTES = 64 << 10
_SHORT_TEXT_BYTES = 16 << 10


class Admission:
    """Admits requests to the engine; everything wrong with one is found here, before anything is allocated for it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        store: AdapterStore,
        fusions: FusionStore,
        *,
        vocab_size: int,
        max_context_tokens: int,
        default_max_new_tokens: int,
        pool_ranks: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._store = store
        self._fusions = fusions
        self._vocab_size = vocab_size
        self._max_context_tokens = max_context_tokens
        self._default_max_new_tokens = default_max_new_tokens
        self._pool_ranks = pool_ranks
        self._max_text_bytes = max(_LEAST_MAX_TEXT_BYTES, MAX_BYTES_PER_TOKEN * max_context_tokens)
        self._limits: set[asyncio.Timeout] = set()  # of the requests that are being admitted
        self.has_ended = False
        # Two lanes, so that a book does not hold up a question.
        self._short_texts = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._long_texts = ThreadPoolExecutor(1, thread_name_prefix="tokenizer-long")

    async def admit(self, params: GenerateParams, take_tokens: Callable[[int], None]) -> Generation:
        """Tokenizes, checks, and leases the adapters, loading them if need be.

        `take_tokens(n)` is called before the leases with the most tokens the request may come to have; it may refuse.
        Raises InvalidRequestError, NotFoundError, PreconditionError, CapacityError, DeadlineError, what loading an
        adapter raises, UnavailableError if `end` is called before it is done, and TimeLimitPassed if the request's own
        time limit passes before.
        """
        arrival_s = time.monotonic()
        time_limit_at_s = arrival_s + _or_never(params.stopping.time_limit_s)
        limit = asyncio.timeout_at(min(time_limit_at_s, _or_never(params.deadline_s)))
        self._limits.add(limit)
        try:
            async with limit:
                return await self._admit(params, take_tokens, arrival_s)
        except TimeoutError:
            if self.has_ended:
                raise shutting_down() from None
            if time_limit_at_s < _or_never(params.deadline_s):
                raise TimeLimitPassed(params, time.monotonic() - arrival_s) from None
            raise DeadlineError("the deadline passed before the request was admitted") from None
        finally:
            self._limits.discard(limit)

    def end(self) -> None:
        """Ends the requests that are being admitted; whoever is admitted all the same must not be run."""
        self.has_ended = True
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(0.0)

    async def _admit(
        self, params: GenerateParams, take_tokens: Callable[[int], None], arrival_s: float
    ) -> Generation:
        prompt_ids = await self.encode(params.prompt, add_special_tokens=True)
        self._check_prompt(prompt_ids)
        self._check_tokens(params)
        if params.stopping.stop and not self._tokenizer.is_present:
            raise PreconditionError(
                "stop strings need a tokenizer, and this model has none", reason="NO_TOKENIZER"
            )
        max_new_tokens = self._max_new_tokens(params, len(prompt_ids))
        take_tokens(len(prompt_ids) + params.num_candidates * max_new_tokens)
        adaptation = await self._lease(params.adaptation)
        generation = Generation(
            params=params,
            prompt_token_ids=prompt_ids,
            adaptation=adaptation,
            max_new_tokens=max_new_tokens,
            seed=secrets.randbits(63) if params.sampling.seed is None else params.sampling.seed,
            arrival_s=arrival_s,
        )
        generation.requests += [
            self._make_request(generation, index) for index in range(params.num_candidates)
        ]
        return generation

    async def encode(self, prompt: Prompt, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of a prompt, found on a worker thread.

        Raises InvalidRequestError (PROMPT_TOO_LONG) for a text of more bytes than any that fits the context has.
        """
        if isinstance(prompt, TokenPrompt):
            return prompt.token_ids
        num_bytes = _count_bytes(prompt)
        if num_bytes > self._max_text_bytes:
            raise InvalidRequestError(
                f"the prompt has {num_bytes} bytes of text, at most {self._max_text_bytes} are taken",
                field="prompt",
                reason="PROMPT_TOO_LONG",
                metadata={"max_prompt_bytes": str(self._max_text_bytes)},
            )
        lane = self._short_texts if num_bytes <= _SHORT_TEXT_BYTES else self._long_texts
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            lane, lambda: self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        )

    def check_token_ids(self, token_ids: tuple[int, ...], field: str) -> None:
        """Raises InvalidRequestError if an id is outside the vocabulary."""
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is outside the vocabulary of {self._vocab_size}",
                    field=field,
                    reason="TOKEN_OUT_OF_RANGE",
                    metadata={"vocab_size": str(self._vocab_size)},
                )

    def close(self) -> None:
        """Ends the tokenizer's threads."""
        for lane in (self._short_texts, self._long_texts):
            lane.shutdown(wait=False, cancel_futures=True)

    def _check_prompt(self, prompt_ids: tuple[int, ...]) -> None:
        if not prompt_ids:
            raise InvalidRequestError("the prompt has no tokens", field="prompt", reason="PROMPT_EMPTY")
        if len(prompt_ids) >= self._max_context_tokens:
            raise InvalidRequestError(
                f"the prompt has {len(prompt_ids)} tokens, "
                f"the context holds {self._max_context_tokens} with the new ones",
                field="prompt",
                reason="PROMPT_TOO_LONG",
                metadata={"max_prompt_tokens": str(self._max_context_tokens - 1)},
            )
        self.check_token_ids(prompt_ids, "token_ids")

    def _check_tokens(self, params: GenerateParams) -> None:
        self.check_token_ids(params.stopping.stop_token_ids, "stopping.stop_token_ids")
        self.check_token_ids(tuple(params.sampling.logit_bias), "sampling.logit_bias")

    def _max_new_tokens(self, params: GenerateParams, prompt_length: int) -> int:
        room = self._max_context_tokens - prompt_length
        wanted = params.stopping.max_new_tokens
        if wanted is not None and wanted > room:
            raise InvalidRequestError(
                f"{wanted} new tokens do not fit: the context of {self._max_context_tokens} has room for {room}",
                field="stopping.max_new_tokens",
                reason="CONTEXT_EXCEEDED",
                metadata={"max_new_tokens": str(room)},
            )
        granted = min(self._default_max_new_tokens, room) if wanted is None else wanted
        if params.stopping.min_new_tokens > granted:
            raise InvalidRequestError(
                f"min_new_tokens is more than the {granted} tokens the request may generate",
                field="stopping.min_new_tokens",
                reason="OUT_OF_RANGE",
            )
        return granted

    async def _lease(self, wanted: Adaptation) -> LeasedAdaptation:
        """Leases every adapter of the request, or the fusion, or nothing at all."""
        if wanted.kind == "fusion":
            return await self._lease_fusion(wanted)
        adapters = await self._store.lease([term.name for term in wanted.terms])
        try:
            self._check_adapters(wanted, adapters)
        except BaseException:
            self._store.registry.release(adapters)
            raise
        return LeasedAdaptation(wanted.kind, adapters, tuple(term.scale for term in wanted.terms))

    async def _lease_fusion(self, wanted: Adaptation) -> LeasedAdaptation:
        (fusion,) = await self._fusions.lease([wanted.fusion])
        try:
            excluded = _excluded_members(fusion, wanted.excluded_members)
        except BaseException:
            self._fusions.registry.release((fusion,))
            raise
        return LeasedAdaptation(wanted.kind, fusion=fusion, excluded=excluded)

    def _check_adapters(self, wanted: Adaptation, adapters: tuple[Adapter, ...]) -> None:
        for term, adapter in zip(wanted.terms, adapters, strict=True):
            if wanted.kind == "blend" and not adapter.weights.is_low_rank_only:
                raise PreconditionError(
                    f"adapter {adapter.name} cannot take part in a blend: DoRA and whole saved modules do not add up",
                    reason="BLEND_UNSUPPORTED",
                    metadata={"adapter": adapter.name},
                )
            if adapter.weights.has_magnitudes and term.scale != 1.0:
                raise PreconditionError(
                    f"adapter {adapter.name} is a DoRA and has no scale but 1",
                    reason="SCALE_UNSUPPORTED",
                    metadata={"adapter": adapter.name},
                )
        num_rows = sum(adapter.num_rows for adapter in adapters)
        if num_rows > self._pool_ranks:
            raise CapacityError(
                f"the adapters take {num_rows} rank rows together, the pool has {self._pool_ranks}",
                reason="ADAPTER_TOO_BIG",
            )

    def _make_request(self, generation: Generation, index: int) -> Request:
        stopping = generation.params.stopping
        text = TextOutput(
            self._tokenizer.decoder,
            generation.prompt_token_ids,
            stopping.stop,
            include_stop=stopping.include_stop,
        )
        return Request(generation, index, text)


def shutting_down() -> UnavailableError:
    """What a request is told that comes too late, or takes too long."""
    return UnavailableError("the server is shutting down", reason="DRAINING")


def _or_never(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _count_bytes(prompt: TextPrompt | ChatPrompt) -> int:
    texts = (prompt.text,) if isinstance(prompt, TextPrompt) else (content for _, content in prompt.messages)
    return sum(len(text.encode()) for text in texts)


def _excluded_members(fusion: Fusion, names: Sequence[str]) -> frozenset[int]:
    """Indices of the members a request leaves out. Raises InvalidRequestError for a stranger, or if none is left."""
    members = [member.name for member in fusion.config.members]
    for name in names:
        if name not in members:
            raise InvalidRequestError(
                f"fusion {fusion.name} has no member {name}",
                field="fusion.excluded_members",
                reason="UNKNOWN_MEMBER",
                metadata={"fusion": fusion.name, "member": name},
            )
    if set(names) >= set(members):
        raise InvalidRequestError(
            "every member of the fusion is excluded",
            field="fusion.excluded_members",
            reason="NO_MEMBER_LEFT",
            metadata={"fusion": fusion.name},
        )
    return frozenset(members.index(name) for name in names)
