"""Decides what each step computes. Python integers only: the model runner makes the tensors.

There is no prefill phase and no decode phase. A step has a budget of tokens; each request gets as many of its pending
tokens as fit, so chunked prefill, prefix caching, decoding and recomputing after a preemption are one rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fusionserve import metrics
from fusionserve.adapters.pool_ledger import PoolLedger
from fusionserve.engine.block_pool import BlockPool, chain_hashes
from fusionserve.engine.fair_queue import FairQueue, FlowService, Rank
from fusionserve.engine.pool_line import PoolLine
from fusionserve.engine.prompt_pace import PromptPace
from fusionserve.engine.request import Request, RequestStatus
from fusionserve.engine.scheduled_batch import ScheduledBatch, ScheduledChunk

_MAX_PREFETCHES = 4  # flows whose next request may have its adapters copied before its turn
# Per step, for flows that have less than their share: each costs a prompt's computation.
_MAX_FAIR_PREEMPTIONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds of one step: tokens, requests, and of each request prompt tokens with logits.

    Beside decoding requests it takes as many prompt tokens as keep it to `prompt_step_s` seconds, and
    `min_prompt_tokens` in any case.
    """

    max_batch_tokens: int
    min_prompt_tokens: int
    prompt_step_s: float
    max_batch_requests: int
    max_logit_tokens: int = 128


@dataclass(slots=True)
class _Plan:
    """A step in the making."""

    budget: int  # tokens that may still be added
    num_tokens: dict[Request, int] = field(default_factory=dict)
    num_dropped: Counter[str] = field(default_factory=Counter)  # by flow, of requests preempted since
    num_preemptions: int = 0
    num_fair_preemptions: int = 0  # of these


class Scheduler:
    """Owns the queue, the running requests, the block pool and the adapter pool's ledger."""

    def __init__(
        self,
        blocks: BlockPool,
        ledger: PoolLedger,
        limits: SchedulerLimits,
        *,
        enable_prefix_cache: bool = True,
        fair_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.blocks = blocks
        self.ledger = ledger
        self._limits = limits
        self._enable_prefix_cache = enable_prefix_cache
        self._pace = PromptPace(limits.min_prompt_tokens, limits.prompt_step_s)
        self._service = FlowService(fair_weights)
        self.waiting = FairQueue(self._service)
        self.running: list[Request] = []  # in order of admission
        self.num_preemptions = 0
        self._pool_line = PoolLine(ledger)
        self._has_yielded = False  # somebody, in the last step
        # Nobody had a right to a place when the last step was scheduled, and nobody has come or gone since.
        self._is_settled = False

    def add(self, request: Request) -> None:
        """Queues a request."""
        request.status = RequestStatus.WAITING
        self._is_settled = False
        self._service.enter(request.flow)
        self.waiting.add(request)

    def schedule(self) -> ScheduledBatch:
        """Chooses the tokens of the next step: decoding requests first, then prompts, running and waiting, in turn."""
        self.ledger.begin_round()
        self._service.advance()
        self._is_settled = True
        plan = _Plan(self._limits.max_batch_tokens)
        decoding, newcomer = self._in_turn(decoding=True), self._newcomer()
        yielding = self._yielding(decoding, newcomer)
        for request in decoding:
            if request not in yielding:
                self._continue(request, plan)
        if decoding:  # every stream and every newcomer waits for the step to end
            plan.budget = min(plan.budget, self._pace.num_tokens)
        if yielding:
            plan.budget = min(plan.budget, self._num_pending_besides({r.flow for r in yielding}))
        self._plan_prompts(plan)
        if newcomer not in plan.num_tokens:  # there was no room for it
            plan.budget = self._limits.max_batch_tokens - sum(plan.num_tokens.values())
            for request in yielding:
                self._continue(request, plan)
        for flow, num_tokens in plan.num_dropped.items():
            self._service.refund(flow, num_tokens)
        self._prefetch()  # may move rows, so that chunks are made after it
        chunks = tuple(self._chunk(request, num_tokens) for request, num_tokens in plan.num_tokens.items())
        return ScheduledBatch(chunks, self.ledger.take_changes(), self.ledger.take_copies())

    def schedule_ahead(self, batch: ScheduledBatch) -> ScheduledBatch | None:
        """What `schedule` would choose after `batch`, whose tokens nobody knows yet, if none of them ends a request.

        `batch` has one token of each running request that is in it. None if `schedule` might choose something else or
        takes blocks from somebody. Who is to have its last token in `batch` is left out.
        """
        chunks = [c for c in batch.chunks if c.num_generated + 1 < c.request.generation.max_new_tokens]
        if not chunks or len(batch.chunks) < len(self.running) or self.ledger.has_work:
            return None
        if self.waiting and not self._is_closed(len(chunks)):
            return None
        missing = (self.blocks.num_blocks_for(c.end + 1) - len(c.request.blocks) for c in chunks)
        if sum(max(0, num_blocks) for num_blocks in missing) > self.blocks.num_free:
            return None
        self._service.advance()
        self._has_yielded, plan = False, _Plan(len(chunks))
        for chunk in chunks:
            self._grow(chunk.request, chunk.end + 1, plan)
            self._service.charge(chunk.request.flow, 1)
        ahead = (ScheduledChunk(c.request, c.end, 1, c.row_starts) for c in chunks)
        return ScheduledBatch(tuple(ahead), pool_changes=())

    def observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """Learns from how long a step took; an empty one, or one that copied adapters, says nothing about the next."""
        if batch.chunks and not (batch.pool_changes or batch.copies):
            self._pace.observe(batch.num_prompt_tokens, seconds)

    def looks_up(self, request: Request) -> bool:
        """True if the request's beginning is looked for in the prefix cache."""
        return self._enable_prefix_cache and not request.needs_every_token

    def advance(self, chunk: ScheduledChunk) -> None:
        """Notes that a chunk was computed, and offers its full blocks to the prefix cache."""
        request = chunk.request
        request.num_computed_tokens = chunk.end
        num_full = request.num_computed_tokens // self.blocks.block_size
        if num_full <= request.num_published_blocks or not self._enable_prefix_cache:
            return
        self._extend_hashes(request)
        for index in range(request.num_published_blocks, num_full):
            self.blocks.publish(request.blocks[index], request.block_hashes[index])
        request.num_published_blocks = num_full

    def withdraw(self, request: Request) -> None:
        """Takes whatever was computed of a request whose numbers are not finite out of the prefix cache.

        Attention multiplies the values of later tokens of a chunk by zero, and NaN stays NaN: keys and values of tokens
        before the bad one may be bad, too, in blocks that others find who do not have it.
        """
        self.blocks.withdraw(request.block_hashes)

    def remove(self, request: Request) -> None:
        """Takes a request out, whatever its state, and gives back its blocks and its hold on the adapter pool."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._give_back(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        self._is_settled = False
        self._service.leave(request.flow)
        self._pool_line.forget(request)
        request.status = RequestStatus.FINISHED

    def requests(self) -> Iterator[Request]:
        """All requests, running and waiting."""
        yield from self.running
        yield from self.waiting

    def check_integrity(self) -> None:
        """Asserts that blocks and pool holds are those of the running requests, and the pool's line of waiting ones."""
        self.blocks.check_integrity(sum(len(request.blocks) for request in self.running))
        self.ledger.check_integrity(
            sum(len(request.generation.adaptation.residents) for request in self.running)
        )
        assert all(not request.blocks for request in self.waiting), "a waiting request holds blocks"
        self._pool_line.check_integrity(self.waiting)

    def _in_turn(self, *, decoding: bool) -> list[Request]:
        """The running requests with one pending token, or those with more, in the order of their turn."""
        chosen = [request for request in self.running if (request.num_pending_tokens == 1) is decoding]
        return sorted(chosen, key=lambda running: (self._service.rank(running), running.num_pending_tokens))

    def _newcomer(self) -> Request | None:
        """The prompt whose turn is next, if there is one."""
        prompts = [*self._in_turn(decoding=False)[:1], *self.waiting.first()]
        return min(prompts, key=self._service.rank, default=None)

    def _yielding(self, decoding: Sequence[Request], newcomer: Request | None) -> list[Request]:
        """Those that sit this step out, so that it is a short one for the newcomer.

        Their flows have more than twice as much running as the newcomer's will have, and have asked for more still.
        Never two steps in a row: a stream is held up by one short step at the most.
        """
        if self._has_yielded or newcomer is None:
            self._has_yielded = False
            return []
        loads, weight = self._service.loads(self.running), self._service.weight
        enough = 2 * (loads.get(newcomer.flow, 0.0) + 1 / weight(newcomer.flow))
        crowding = {flow for flow in loads if loads[flow] > enough and self._service.num_waiting(flow)}
        yielding = [r for r in decoding if r.flow in crowding and r.priority <= newcomer.priority]
        self._has_yielded = bool(yielding)
        return yielding

    def _num_pending_besides(self, flows: Container[str]) -> int:
        """Tokens of prompts of other flows than these."""
        prompts = [*self._in_turn(decoding=False), *self.waiting]
        return sum(request.num_pending_tokens for request in prompts if request.flow not in flows)

    def _plan_prompts(self, plan: _Plan) -> None:
        """Plans the next tokens of prompts, of running requests and of waiting ones that are admitted, in turn."""
        for request in self._in_turn(decoding=False):
            self._admit_waiting(plan, before=self._service.rank(request))
            self._continue(request, plan)
        self._admit_waiting(plan)

    def _prefetch(self) -> None:
        """Has what is next in turn copied ahead, as far as it fits: a later one takes no room of an earlier."""
        for request in self.waiting.first(_MAX_PREFETCHES):
            if not self.ledger.bring_ahead(request.generation.adaptation.residents):
                return

    def _continue(self, request: Request, plan: _Plan) -> None:
        """Plans the next tokens of a running request; one that was preempted since gets none, or has them already."""
        if plan.budget == 0 or request.status is not RequestStatus.RUNNING or request in plan.num_tokens:
            return
        num_tokens = self._chunk_size(request, plan.budget)
        if self._grow(request, request.num_computed_tokens + num_tokens, plan):
            self._plan(request, num_tokens, plan)

    def _plan(self, request: Request, num_tokens: int, plan: _Plan) -> None:
        plan.num_tokens[request] = num_tokens
        plan.budget -= num_tokens
        self._service.charge(request.flow, num_tokens)

    def _grow(self, request: Request, num_tokens: int, plan: _Plan) -> bool:
        """Gets blocks for the first `num_tokens` tokens, preempting the last in order; False if that was `request`."""
        num_missing = self.blocks.num_blocks_for(num_tokens) - len(request.blocks)
        if num_missing <= 0:
            return True
        while (blocks := self.blocks.allocate(num_missing)) is None:
            victim = self._last_in_order()
            self._preempt(victim, plan, "blocks")
            if victim is request:
                return False
        request.blocks += blocks
        return True

    def _last_in_order(self) -> Request:
        """The request that gives way: of the lowest priority, of the flow that has most running, the newest."""
        loads = self._service.loads(self.running)
        return max(self.running, key=lambda r: (-r.priority, loads[r.flow], r.generation.arrival_s, r.index))

    def _preempt(self, request: Request, plan: _Plan, cause: str) -> None:
        """Sends a running request back to the queue; its tokens stay, their keys and values are computed again."""
        self._is_settled = False
        self.running.remove(request)
        num_dropped = plan.num_tokens.pop(request, 0)
        plan.num_dropped[request.flow] += num_dropped
        plan.budget += num_dropped
        self._give_back(request)
        plan.num_preemptions += 1
        self.num_preemptions += 1
        metrics.PREEMPTIONS.labels(cause).inc()
        request.status = RequestStatus.WAITING
        self.waiting.add(request)

    def _admit_waiting(self, plan: _Plan, before: Rank | None = None) -> None:
        """Admits requests in turn, as far as it comes `before`, if that is given.

        One that waits for the adapter pool lets others pass, as far as its line does.
        """
        if plan.num_preemptions > plan.num_fair_preemptions:  # the blocks just freed would go straight back
            return
        self._pool_line.begin_pass()
        stuck: set[str] = set()  # flows with no right to a place
        for request in self.waiting.in_turn():
            if plan.budget == 0 or (before is not None and self._service.rank(request) >= before):
                return
            if request.flow in stuck or self._waits_for_sibling(request):
                continue
            if self._is_full() and self._in_the_way_of(request, plan) is None:
                stuck.add(request.flow)
                continue
            self._is_settled = False
            if not self._pool_line.hold(request):
                continue
            if not self._admit(request, plan):
                self.ledger.release(request.generation.adaptation.residents)
                return
            self._pool_line.note_admitted(request)

    def _admit(self, request: Request, plan: _Plan) -> bool:
        """Starts a request whose adapters are held, in place of one that is in its way if need be."""
        while self._is_full() or not self._start(request, plan.budget):
            victim = self._in_the_way_of(request, plan)
            if victim is None:
                return False
            plan.num_fair_preemptions += 1
            self._preempt(victim, plan, "turn")
        self._service.admit(request.flow)
        self._plan(request, self._chunk_size(request, plan.budget), plan)
        return True

    def _is_closed(self, num_requests: int) -> bool:
        """True if so many are a full batch, in which nobody was in anybody's way when it was last looked at."""
        limits = self._limits  # without room for a token it is not looked at
        return self._is_settled and num_requests == limits.max_batch_requests < limits.max_batch_tokens

    def _is_full(self) -> bool:
        return len(self.running) >= self._limits.max_batch_requests

    def _in_the_way_of(self, request: Request, plan: _Plan) -> Request | None:
        """The newest request of the flow that has most running, if without it that still has as much as `request`'s."""
        if plan.num_fair_preemptions >= _MAX_FAIR_PREEMPTIONS or not self.running:
            return None
        loads, weight = self._service.loads(self.running), self._service.weight
        largest = max(loads, key=lambda flow: loads[flow])
        if loads[largest] - 1 / weight(largest) < loads.get(request.flow, 0.0) + 1 / weight(request.flow):
            return None
        candidates = (r for r in self.running if r.flow == largest and r.priority <= request.priority)
        return max(candidates, key=lambda running: running.order, default=None)

    def _start(self, request: Request, budget: int) -> bool:
        """Takes cached and fresh blocks for the first chunk; for lack of them changes nothing and returns False."""
        cached = self._find_cached(request)
        num_cached = len(cached) * self.blocks.block_size
        request.num_computed_tokens = num_cached
        num_tokens = num_cached + self._chunk_size(request, budget)
        self.blocks.reference(cached)
        num_fresh = self.blocks.num_blocks_for(num_tokens) - len(cached)
        fresh = self.blocks.allocate(num_fresh) if self._may_begin(request) else None
        if fresh is None:
            self.blocks.free(cached)
            request.num_computed_tokens = 0
            return False
        request.blocks = [*cached, *fresh]
        request.num_published_blocks = len(cached)
        request.status = RequestStatus.RUNNING
        self.waiting.remove(request)
        self.running.append(request)
        return True

    def _may_begin(self, request: Request) -> bool:
        """False if it might be preempted for lack of blocks in its prompt, and would find none of them again."""
        return (
            self.looks_up(request)
            or self.blocks.num_blocks_for(len(request.token_ids)) <= self.blocks.num_free
        )

    def _find_cached(self, request: Request) -> list[int]:
        """Cached blocks of the request's beginning; at least one token is left to compute, for its logits."""
        if not self.looks_up(request):
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
