"""Factories for the scheduler's world: adapters, generations, requests and schedulers, all without weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch

from fusionserve.adapters.adapter import Adapter, AdapterContent
from fusionserve.adapters.lora_weights import LoRAWeights, ModuleLoRA
from fusionserve.adapters.pool_ledger import PoolLedger
from fusionserve.adapters.side_copies import Copies
from fusionserve.engine.block_pool import BlockPool
from fusionserve.engine.leased_adaptation import LeasedAdaptation
from fusionserve.engine.request import Generation, Request
from fusionserve.engine.scheduled_batch import ScheduledBatch
from fusionserve.engine.scheduler import Scheduler, SchedulerLimits
from fusionserve.engine.text_output import TextOutput
from fusionserve.generation import (
    Adaptation,
    AdapterTerm,
    GenerateParams,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
    TokenPrompt,
)

BLOCK_SIZE = 4

_uids = count(1)
_request_ids = count(1)
_as_made: dict[Generation, Generation] = {}


class LetterDecoder:
    """Token i is the i-th letter of the alphabet, round and round."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + token_id % 26) for token_id in token_ids)


def make_adapter(rank: int = 8, name: str = "") -> Adapter:
    """An adapter of `rank` rows with a uid of its own."""
    uid = next(_uids)
    lora = ModuleLoRA(shrink=torch.zeros(rank, 1), expand=torch.zeros(rank, 1))
    weights = LoRAWeights(digest=f"{uid:064x}", modules={"q_proj": lora}, replacements={})
    return Adapter(uid, name or f"adapter-{uid}", 1, AdapterContent(weights), 0.0)


@dataclass(frozen=True, kw_only=True)
class GenerationSpec:
    """What a test says of a generation; everything else is filled in by `make_generation`."""

    prompt: Sequence[int] = tuple(range(10))
    adapters: tuple[Adapter, ...] = ()
    scales: tuple[float, ...] | None = None
    max_new_tokens: int = 4
    seed: int = 0
    arrival_s: float | None = None
    num_candidates: int = 1
    priority: int = 0
    cache_salt: str = ""
    deadline_s: float | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StoppingCriteria = field(default_factory=StoppingCriteria)
    output: OutputOptions = field(default_factory=OutputOptions)
    decoder: Any = field(default_factory=LetterDecoder)


def make_generation(**spec_fields: Any) -> Generation:
    """A generation with its requests, as admission would make it; fields as in GenerationSpec."""
    spec = GenerationSpec(**spec_fields)
    number = next(_request_ids)
    scales = spec.scales or (1.0,) * len(spec.adapters)
    terms = tuple(AdapterTerm(a.name, scale) for a, scale in zip(spec.adapters, scales, strict=True))
    kind = ("base", "lora", "blend")[min(len(terms), 2)]
    params = GenerateParams(
        request_id=f"request-{number}",
        prompt=TokenPrompt(tuple(spec.prompt)),
        adaptation=Adaptation(kind, terms),
        sampling=spec.sampling,
        stopping=spec.stopping,
        output=spec.output,
        num_candidates=spec.num_candidates,
        priority=spec.priority,
        cache_salt=spec.cache_salt,
        deadline_s=spec.deadline_s,
    )
    generation = Generation(
        params=params,
        prompt_token_ids=tuple(spec.prompt),
        adaptation=LeasedAdaptation(kind, spec.adapters, tuple(term.scale for term in terms)),
        max_new_tokens=spec.max_new_tokens,
        seed=spec.seed,
        arrival_s=float(number) if spec.arrival_s is None else spec.arrival_s,
    )
    stopping = spec.stopping
    for index in range(spec.num_candidates):
        text = TextOutput(spec.decoder, spec.prompt, stopping.stop, include_stop=stopping.include_stop)
        generation.requests.append(Request(generation, index, text))
    _as_made[generation] = replace(generation)
    return generation


def as_made(generation: Generation) -> Generation:
    """A generation as it was before it ended, and let go of its adapters and its requests."""
    return replace(_as_made[generation])


def make_request(**spec_fields: Any) -> Request:
    """The only request of a generation; fields as in GenerationSpec."""
    (request,) = make_generation(**spec_fields).requests
    return request


def make_scheduler(
    *,
    num_blocks: int = 64,
    pool_ranks: int = 64,
    max_batch_tokens: int = 16,
    min_prompt_tokens: int = 1 << 30,
    prompt_step_s: float = 0.0,
    max_batch_requests: int = 8,
    max_logit_tokens: int = 128,
    enable_prefix_cache: bool = True,
    fair_weights: Mapping[str, float] | None = None,
    copies: Copies | None = None,
) -> Scheduler:
    """A scheduler over blocks of BLOCK_SIZE tokens."""
    limits = SchedulerLimits(
        max_batch_tokens=max_batch_tokens,
        min_prompt_tokens=min_prompt_tokens,
        prompt_step_s=prompt_step_s,
        max_batch_requests=max_batch_requests,
        max_logit_tokens=max_logit_tokens,
    )
    return Scheduler(
        BlockPool(num_blocks, BLOCK_SIZE),
        PoolLedger(pool_ranks, copies),
        limits,
        enable_prefix_cache=enable_prefix_cache,
        fair_weights=fair_weights,
    )


def sizes(batch: ScheduledBatch) -> dict[Request, int]:
    """How many tokens each request got."""
    return {chunk.request: chunk.num_tokens for chunk in batch.chunks}


def complete(scheduler: Scheduler, batch: ScheduledBatch, token_id: int = 1) -> None:
    """Does what the engine does after a step: advances, and appends `token_id` where one was due."""
    for chunk in batch.chunks:
        scheduler.advance(chunk)
        if chunk.is_last:
            chunk.request.token_ids.append(token_id)


def add_running(scheduler: Scheduler, **spec_fields: Any) -> Request:
    """A request whose prompt is computed and which decodes from now on."""
    request = make_request(**spec_fields)
    scheduler.add(request)
    while request.num_generated == 0:
        complete(scheduler, scheduler.schedule())
    return request


def assert_idle(scheduler: Scheduler) -> None:
    """Asserts that no request, block or hold is left."""
    scheduler.check_integrity()
    assert not scheduler.running and not scheduler.waiting
    assert scheduler.blocks.num_used == 0
    scheduler.ledger.check_integrity(0)


def first_not_to_pass(
    scheduler: Scheduler, schedule: Callable[[], ScheduledBatch], adapter: Adapter, most: int
) -> tuple[Request, int]:
    """Adds requests of one adapter until one is not scheduled in its step; and how many were before it."""
    for num_passed in range(most):
        passer = make_request(prompt=[3 + num_passed], adapters=(adapter,))
        scheduler.add(passer)
        if passer not in sizes(schedule()):
            return passer, num_passed
        scheduler.remove(passer)
    raise AssertionError(f"{most} requests have passed")
