"""Decides what each step computes. Python integers only: the model runner makes the tensors.

There is no prefill phase and no decode phase. A step has a budget of tokens; each request gets as many of its pending
tokens as fit, so chunked prefill, prefix caching, decoding and recomputing after a preemption are one rule.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from fusionserve import metrics
from fusionserve.adapters.pool_ledger import PoolChange, PoolLedger
from fusionserve.engine.block_pool import BlockPool, chain_hashes
from fusionserve.engine.request import Request, RequestStatus

_MAX_OVERTAKES = 64  # requests that may pass one waiting for room in the adapter pool


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The next `num_tokens` tokens of `request` from position `start`; `row_starts` are its residents' in the pool."""

    request: Request
    start: int
    num_tokens: int
    row_starts: tuple[int, ...]

    @property
    def end(self) -> int:
        """Position after the last token computed."""
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        """True if all tokens are computed after this chunk, so that the next one can be sampled."""
        return self.end == len(self.request.token_ids)


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step's work; the only thing that crosses from the scheduler to the model runner, which does not change it."""

    chunks: tuple[ScheduledChunk, ...]
    pool_changes: tuple[PoolChange, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step."""
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds of one step: tokens, requests, and tokens of one prompt whose every position needs logits."""

    max_batch_tokens: int
    max_batch_requests: int
    max_logit_tokens: int = 128


class Scheduler:
    """Owns the queue, the running requests, the block pool and the adapter pool's ledger."""

    def __init__(
        self,
        blocks: BlockPool,
        ledger: PoolLedger,
        limits: SchedulerLimits,
        *,
        enable_prefix_cache: bool = True,
    ) -> None:
        self.blocks = blocks
        self.ledger = ledger
        self._limits = limits
        self._enable_prefix_cache = enable_prefix_cache
        self.waiting: list[Request] = []  # sorted by `order`
        self.running: list[Request] = []  # in order of admission
        self.num_preemptions = 0
        self._num_overtakes: dict[Request, int] = {}

    def add(self, request: Request) -> None:
        """Queues a request by priority and arrival."""
        request.status = RequestStatus.WAITING
        bisect.insort(self.waiting, request, key=lambda queued: queued.order)

    def schedule(self) -> ScheduledBatch:
        """Chooses the tokens of the next step: running requests first, decoding ones before chunks of prompts."""
        planned: dict[Request, int] = {}
        num_preemptions = self.num_preemptions
        budget = self._plan_running(planned)
        if self.num_preemptions == num_preemptions:  # else the blocks just freed would go straight back
            self._admit_waiting(budget, planned)
        chunks = tuple(self._chunk(request, num_tokens) for request, num_tokens in planned.items())
        return ScheduledBatch(chunks, self.ledger.take_changes())

    def advance(self, chunk: ScheduledChunk) -> None:
        """Notes that a chunk was computed, and offers its full blocks to the prefix cache."""
        request = chunk.request
        request.num_computed_tokens = chunk.end
        if not self._enable_prefix_cache:
            return
        self._extend_hashes(request)
        num_full = request.num_computed_tokens // self.blocks.block_size
        for index in range(request.num_published_blocks, num_full):
            self.blocks.publish(request.blocks[index], request.block_hashes[index])
        request.num_published_blocks = max(num_full, request.num_published_blocks)

    def remove(self, request: Request) -> None:
        """Takes a request out, whatever its state, and gives back its blocks and its hold on the adapter pool."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._give_back(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._num_overtakes.pop(request, None)
        request.status = RequestStatus.FINISHED

    def requests(self) -> Iterator[Request]:
        """All requests, running and waiting."""
        yield from self.running
        yield from self.waiting

    def check_integrity(self) -> None:
        """Asserts that blocks and pool holds are exactly those of the running requests."""
        self.blocks.check_integrity(sum(len(request.blocks) for request in self.running))
        self.ledger.check_integrity(
            sum(len(request.generation.adaptation.residents) for request in self.running)
        )
        assert all(not request.blocks for request in self.waiting), "a waiting request holds blocks"

    def _plan_running(self, planned: dict[Request, int]) -> int:
        """Plans tokens for the running requests; returns what is left of the budget."""
        budget = self._limits.max_batch_tokens
        for request in sorted(self.running, key=lambda running: running.num_pending_tokens):
            if budget == 0:
                break
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted by an earlier one in this loop
            num_tokens = self._chunk_size(request, budget)
            if self._grow(request, request.num_computed_tokens + num_tokens, planned):
                planned[request] = num_tokens
                budget -= num_tokens
        return budget

    def _grow(self, request: Request, num_tokens: int, planned: dict[Request, int]) -> bool:
        """Gets blocks for the first `num_tokens` tokens, preempting the last in order; False if that was `request`."""
        num_missing = self.blocks.num_blocks_for(num_tokens) - len(request.blocks)
        if num_missing <= 0:
            return True
        while (blocks := self.blocks.allocate(num_missing)) is None:
            victim = max(self.running, key=lambda running: running.order)
            self._preempt(victim)
            planned.pop(victim, None)
            if victim is request:
                return False
        request.blocks += blocks
        return True

    def _preempt(self, request: Request) -> None:
        """Sends a running request back to the queue; its tokens stay, their keys and values are computed again."""
        self.running.remove(request)
        self._give_back(request)
        self.num_preemptions += 1
        metrics.PREEMPTIONS.inc()
        self.add(request)

    def _admit_waiting(self, budget: int, planned: dict[Request, int]) -> None:
        """Admits requests in order. One that waits for room in the adapter pool lets others pass, but not for ever."""
        overtaken: list[Request] = []
        for request in list(self.waiting):
            if budget == 0 or len(self.running) >= self._limits.max_batch_requests:
                return
            if any(self._num_overtakes.get(blocked, 0) >= _MAX_OVERTAKES for blocked in overtaken):
                return
            if self._waits_for_sibling(request):
                continue
            if not self.ledger.hold(request.generation.adaptation.residents):
                overtaken.append(request)
                continue
            if not self._start(request, budget):
                self.ledger.release(request.generation.adaptation.residents)
                return
            for blocked in overtaken:
                self._num_overtakes[blocked] = self._num_overtakes.get(blocked, 0) + 1
            planned[request] = self._chunk_size(request, budget)
            budget -= planned[request]

    def _start(self, request: Request, budget: int) -> bool:
        """Takes cached and fresh blocks for the first chunk; for lack of them changes nothing and returns False."""
        cached = self._find_cached(request)
        num_cached = len(cached) * self.blocks.block_size
        request.num_computed_tokens = num_cached
        num_tokens = num_cached + self._chunk_size(request, budget)
        self.blocks.reference(cached)
        fresh = self.blocks.allocate(self.blocks.num_blocks_for(num_tokens) - len(cached))
        if fresh is None:
            self.blocks.free(cached)
            request.num_computed_tokens = 0
            return False
        request.blocks = [*cached, *fresh]
        request.num_published_blocks = len(cached)
        request.status = RequestStatus.RUNNING
        self.waiting.remove(request)
        self.running.append(request)
        self._num_overtakes.pop(request, None)
        return True

    def _find_cached(self, request: Request) -> list[int]:
        """Cached blocks of the request's beginning; at least one token is left to compute, for its logits."""
        if not self._enable_prefix_cache or request.needs_every_token:
            return []
        self._extend_hashes(request)
        return self.blocks.find(
            request.block_hashes[: (len(request.token_ids) - 1) // self.blocks.block_size]
        )

    def _extend_hashes(self, request: Request) -> None:
        num_hashed = len(request.block_hashes) * self.blocks.block_size
        if num_hashed + self.blocks.block_size > len(request.token_ids):
            return
        parent = request.block_hashes[-1] if request.block_hashes else request.generation.cache_seed
        request.block_hashes += chain_hashes(parent, request.token_ids[num_hashed:], self.blocks.block_size)

    def _chunk_size(self, request: Request, budget: int) -> int:
        num_tokens = min(request.num_pending_tokens, budget)
        if request.wants_prompt_logprobs and request.num_computed_tokens < request.prompt_length:
            num_tokens = min(num_tokens, self._limits.max_logit_tokens)
        return num_tokens

    def _chunk(self, request: Request, num_tokens: int) -> ScheduledChunk:
        residents = request.generation.adaptation.residents
        starts = tuple(self.ledger.start_of(resident) for resident in residents)
        return ScheduledChunk(request, request.num_computed_tokens, num_tokens, starts)

    def _waits_for_sibling(self, request: Request) -> bool:
        """Candidates after the first wait until the prompt is computed once, then take it from the prefix cache."""
        first = request.generation.requests[0]
        return (
            request is not first and not first.is_finished and first.num_computed_tokens < first.prompt_length
        )

    def _give_back(self, request: Request) -> None:
        self.blocks.free(request.blocks)
        self.ledger.release(request.generation.adaptation.residents)
        request.blocks = []
        request.num_computed_tokens = 0
        request.num_published_blocks = 0
