"""The engine proper: `step()` is schedule, execute, update. One thread runs it; it knows nothing of the event loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fusionserve import metrics
from fusionserve.adapters.resident import Resident
from fusionserve.engine.chunk_result import ChunkResult
from fusionserve.engine.fusion_metrics import FusionMetrics
from fusionserve.engine.leased_adaptation import LeasedAdaptation
from fusionserve.engine.request import Generation, Request, RequestStatus
from fusionserve.engine.sampler import Logprobs
from fusionserve.engine.scheduled_batch import ScheduledBatch
from fusionserve.engine.scheduler import Scheduler
from fusionserve.engine.step_execution import Runner, StepExecution, StepResults
from fusionserve.engine.step_pipeline import StepPipeline
from fusionserve.errors import ArtifactError, CapacityError, DeadlineError, FusionServeError, InternalError
from fusionserve.generation import (
    Candidate,
    FinishReason,
    FusionWeights,
    GenerationChunk,
    GenerationEvent,
    GenerationFinished,
    GenerationStarted,
    Timings,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from fusionserve.kernels.torch_errors import is_out_of_memory

_log = logging.getLogger(__name__)

_MEMORY_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class Output:
    """An event of a generation, or the error that ends it, on its way to the event loop."""

    generation: Generation
    event: GenerationEvent | FusionServeError


class Engine:
    """Holds every generation between its admission and its one terminal event.

    `release_leases` gives an adaptation back to the host registries; `token_text` shows one token of a report.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        eos_token_ids: frozenset[int],
        release_leases: Callable[[LeasedAdaptation], None],
        token_text: Callable[[int], str],
        adapter_labels: metrics.AdapterLabels,
        fusion_metrics: FusionMetrics,
    ) -> None:
        self.scheduler = scheduler
        self._pipeline = StepPipeline(scheduler, StepExecution(runner, scheduler.ledger))
        self._eos_token_ids = eos_token_ids
        self._release_leases = release_leases
        self._token_text = token_text
        self._adapter_labels = adapter_labels
        self._fusion_metrics = fusion_metrics
        self._generations: set[Generation] = set()
        self._outputs: list[Output] = []
        self.is_stalled = False  # the last step computed nothing although requests wait

    @property
    def has_work(self) -> bool:
        """True if a step would compute something or has something to say."""
        return bool(self._generations or self._outputs)

    @property
    def is_copying(self) -> bool:
        """True if the last step left adapters on their way to the pool."""
        return self.scheduler.ledger.is_copying

    def add(self, generation: Generation) -> None:
        """Takes over a generation and its leases."""
        self._generations.add(generation)
        metrics.PROMPT_TOKENS.inc(len(generation.prompt_token_ids))
        for adapter in generation.adapters:
            metrics.ADAPTER_REQUESTS.labels(self._adapter_labels.label(adapter.name)).inc()
        if generation.adaptation.fusion is not None:
            self._fusion_metrics.count_request(generation.adaptation.fusion)
        for request in generation.requests:
            self.scheduler.add(request)

    def abort(self, generation: Generation) -> None:
        """Ends a generation whose client has gone; one that has ended is fine."""
        if generation in self._generations:
            self._finish(generation, None)

    def abort_users(self, resident: Resident, error: FusionServeError) -> None:
        """Ends every request that uses this version of an adapter or a fusion with `error`."""
        for generation in self._users(resident):
            self._finish(generation, error)

    def abort_all(self, error: FusionServeError) -> None:
        """Ends every request with `error`."""
        for generation in list(self._generations):
            self._finish(generation, error)

    def forget(self, uid: int) -> None:
        """Frees the pool rows of a version that the host has let go; the last lease has ended before."""
        self.scheduler.ledger.forget(uid)
        self._measure_holdings()

    def step(self) -> list[Output]:
        """Schedules, executes and updates once; returns what the requests' clients are to be told."""
        started_s = time.monotonic()
        self._expire(started_s)
        batch, step = self._pipeline.run()
        self._note_scheduled(batch, started_s)
        self._end_failed(step)
        self._update(step.results, time.monotonic())
        self.is_stalled = not batch.chunks and bool(self._generations)
        elapsed_s = time.monotonic() - started_s
        self.scheduler.observe(batch, elapsed_s)
        self._measure(batch, elapsed_s)
        return self.take_outputs()

    def take_outputs(self) -> list[Output]:
        """Hands over the events gathered so far."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def _expire(self, now_s: float) -> None:
        for generation in list(self._generations):
            deadline_s, time_limit_at_s = generation.params.deadline_s, generation.time_limit_at_s
            if deadline_s is not None and now_s >= deadline_s:
                self._finish(generation, DeadlineError("the deadline passed before the request finished"))
            elif time_limit_at_s is not None and now_s >= time_limit_at_s:
                with self._ending_alone(generation):
                    for request in [r for r in generation.requests if not r.is_finished]:
                        self._end_candidate(request, FinishReason.TIME_LIMIT, now_s)

    @contextmanager
    def _ending_alone(self, generation: Generation) -> Iterator[None]:
        """What raises in its block ends this generation and no other."""
        try:
            yield
        except Exception:
            _log.exception("request %s cannot be told of and ends", generation.request_id)
            self._fail({generation} & self._generations)

    def _note_scheduled(self, batch: ScheduledBatch, now_s: float) -> None:
        for chunk in batch.chunks:
            generation = chunk.request.generation
            if generation.first_scheduled_s is None:
                generation.first_scheduled_s = now_s
                generation.num_cached_tokens = chunk.start
                metrics.QUEUE_SECONDS.observe(now_s - generation.arrival_s)
                if self.scheduler.looks_up(chunk.request):
                    metrics.PREFIX_QUERY_TOKENS.inc(len(generation.prompt_token_ids))
                    metrics.PREFIX_HIT_TOKENS.inc(chunk.start)

    def _update(self, results: Iterable[ChunkResult], now_s: float) -> None:
        running = [each for each in results if _is_running(each)]  # the others ended before the step was read
        self._fusion_metrics.count_tokens(running)
        for result in running:
            if _is_running(result):  # else an earlier result ended it
                with self._ending_alone(result.chunk.request.generation):
                    self._update_one(result, now_s)

    def _update_one(self, result: ChunkResult, now_s: float) -> None:
        request = result.chunk.request
        self._emit_started_once(request.generation)
        if not result.is_finite:
            for candidate in request.generation.requests:
                self.scheduler.withdraw(candidate)
            self._finish(request.generation, _not_finite())
            return
        self.scheduler.advance(result.chunk)
        self._record_prompt_logprobs(result)
        self._record_fusion_weights(result)
        if result.token_id is not None:
            self._accept_token(request, result.token_id, result.logprobs, now_s)

    def _emit_started_once(self, generation: Generation) -> None:
        if generation.is_started:
            return
        generation.is_started = True
        usage = Usage(
            prompt_tokens=len(generation.prompt_token_ids), cached_tokens=generation.num_cached_tokens
        )
        self._emit(
            generation,
            GenerationStarted(
                request_id=generation.request_id, usage=usage, adaptation=generation.adaptation.resolve()
            ),
        )

    def _record_prompt_logprobs(self, result: ChunkResult) -> None:
        """Adds a chunk's prompt log-probabilities; after a preemption, only those not recorded before."""
        if not result.prompt_logprobs:
            return
        recorded = result.chunk.request.generation.prompt_logprobs
        num_known = max(0, len(recorded) - result.chunk.start)
        recorded += [self._to_token_logprobs(logprobs) for logprobs in result.prompt_logprobs[num_known:]]

    def _record_fusion_weights(self, result: ChunkResult) -> None:
        request, weights = result.chunk.request, result.fusion_weights
        if weights is not None and request.reports_fusion_weights:
            request.fusion_report.add(weights, result.chunk.start)

    def _accept_token(self, request: Request, token_id: int, logprobs: Logprobs | None, now_s: float) -> None:
        stopping = request.generation.params.stopping
        request.token_ids.append(token_id)
        if logprobs is not None:
            request.logprobs.append(self._to_token_logprobs(logprobs))
        self._measure_token(request, now_s)
        is_stop_token = token_id in stopping.stop_token_ids
        is_stop_token |= token_id in self._eos_token_ids and not stopping.ignore_eos
        if is_stop_token and not stopping.include_stop:
            self._end_candidate(request, FinishReason.STOP, now_s, stop_token_id=token_id)
            return
        may_stop = not is_stop_token and request.num_generated >= stopping.min_new_tokens
        text = request.text.push(token_id, may_stop=may_stop)
        if is_stop_token:
            self._end_candidate(request, FinishReason.STOP, now_s, text, stop_token_id=token_id)
        elif request.text.stop_string is not None:
            self._end_candidate(request, FinishReason.STOP_STRING, now_s, text)
        elif request.num_generated >= request.generation.max_new_tokens:
            self._end_candidate(request, FinishReason.LENGTH, now_s, text)
        else:
            self._emit_chunk(request, text)

    def _end_candidate(
        self,
        request: Request,
        reason: FinishReason,
        now_s: float,
        text: str = "",
        *,
        stop_token_id: int | None = None,
    ) -> None:
        """Ends one candidate with its last chunk; ends the generation if it was the last candidate."""
        self._emit_started_once(request.generation)
        self.scheduler.remove(request)
        self._emit_chunk(request, text + request.text.flush())
        generation = request.generation
        generation.candidates.append(
            Candidate(
                index=request.index,
                text=request.text.text,
                token_ids=tuple(request.generated_ids),
                finish_reason=reason,
                stop_string=request.text.stop_string,
                stop_token_id=stop_token_id,
                logprobs=tuple(request.logprobs),
            )
        )
        if len(generation.candidates) == len(generation.requests):
            self._finish(generation, _finished(generation, now_s))

    def _finish(self, generation: Generation, last: GenerationFinished | FusionServeError | None) -> None:
        """The one door out: says the last word if anyone listens, frees blocks and pool rows, gives back the leases."""
        self._generations.remove(generation)
        if last is not None:
            self._outputs.append(Output(generation, last))
        for request in generation.requests:
            if not request.is_finished:
                self.scheduler.remove(request)
        self._release_leases(generation.adaptation)
        generation.let_go()
        metrics.REQUEST_SECONDS.observe(time.monotonic() - generation.arrival_s)
        self._measure_holdings()

    def _end_failed(self, step: StepResults) -> None:
        """Ends whatever cannot go on, with those who hold or await an adapter that cannot be copied."""
        self._fail(step.failed)
        for generation in step.without_memory:
            self._finish(generation, _out_of_memory())
        for resident, error in step.uncopied:
            if is_out_of_memory(error):
                self.abort_users(resident, _out_of_memory())
            else:
                self._fail(self._users(resident))
            self.forget(resident.uid)

    def _users(self, resident: Resident) -> list[Generation]:
        return [g for g in self._generations if resident in g.adaptation.residents]

    def _fail(self, generations: Iterable[Generation]) -> None:
        for generation in generations:
            metadata = {"request_id": generation.request_id}
            self._finish(generation, InternalError("the request failed inside the server", metadata=metadata))

    def _emit_chunk(self, request: Request, text: str) -> None:
        """Tells of the tokens generated since the last chunk; nothing if there are none."""
        token_ids = tuple(request.untold_ids)
        if not token_ids and not text:
            return
        logprobs = tuple(request.logprobs[request.num_told_tokens :])
        request.num_told_tokens += len(token_ids)
        chunk = GenerationChunk(
            candidate_index=request.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            fusion_weights=request.fusion_report.take_untold(),
        )
        self._emit(request.generation, chunk)

    def _emit(self, generation: Generation, event: GenerationEvent) -> None:
        self._outputs.append(Output(generation, event))

    def _to_token_logprobs(self, logprobs: Logprobs) -> TokenLogprobs:
        chosen, *top = (
            TokenLogprob(token_id, self._token_text(token_id), logprob, rank)
            for token_id, logprob, rank in (logprobs.chosen, *logprobs.top)
        )
        return TokenLogprobs(chosen, tuple(top))

    def _measure_token(self, request: Request, now_s: float) -> None:
        generation = request.generation
        if generation.first_token_s is None:
            generation.first_token_s = now_s
            metrics.TIME_TO_FIRST_TOKEN_SECONDS.observe(now_s - generation.arrival_s)
        if request.last_token_s is not None:
            metrics.INTER_TOKEN_SECONDS.observe(now_s - request.last_token_s)
        request.last_token_s = now_s
        metrics.GENERATED_TOKENS.inc()
        for adapter in generation.adapters:
            metrics.ADAPTER_GENERATED_TOKENS.labels(self._adapter_labels.label(adapter.name)).inc()

    def _measure(self, batch: ScheduledBatch, step_s: float) -> None:
        self._measure_holdings()
        if batch.chunks:
            metrics.STEP_SECONDS.observe(step_s)
            metrics.STEP_TOKENS.inc(batch.num_tokens)

    def _measure_holdings(self) -> None:
        """Sets the gauges; also where no step may follow, so that an idle server never looks busy."""
        scheduler = self.scheduler
        metrics.REQUESTS_RUNNING.set(len(scheduler.running))
        metrics.REQUESTS_QUEUED.set(len(scheduler.waiting))
        metrics.KV_BLOCKS_USED.set(scheduler.blocks.num_used)
        metrics.ADAPTER_POOL_RANKS_USED.set(scheduler.ledger.num_used)
        metrics.ADAPTER_POOL_RANKS_HELD.set(scheduler.ledger.num_held)


def _not_finite() -> ArtifactError:
    return ArtifactError("the model's output under this adaptation is not finite", reason="OUTPUT_NOT_FINITE")


def _out_of_memory() -> CapacityError:
    return CapacityError(
        "the server ran out of memory in this request's step",
        reason="OUT_OF_MEMORY",
        retry_after_s=_MEMORY_RETRY_S,
    )


def _finished(generation: Generation, now_s: float) -> GenerationFinished:
    candidates = tuple(sorted(generation.candidates, key=lambda candidate: candidate.index))
    usage = Usage(
        prompt_tokens=len(generation.prompt_token_ids),
        cached_tokens=generation.num_cached_tokens,
        generated_tokens=sum(len(candidate.token_ids) for candidate in candidates),
    )
    first_scheduled_s = generation.first_scheduled_s or now_s
    timings = Timings(
        queue_s=first_scheduled_s - generation.arrival_s,
        time_to_first_token_s=(generation.first_token_s or now_s) - generation.arrival_s,
        total_s=now_s - generation.arrival_s,
    )
    return GenerationFinished(
        request_id=generation.request_id,
        candidates=candidates,
        usage=usage,
        adaptation=generation.adaptation.resolve(),
        timings=timings,
        prompt_logprobs=tuple(generation.prompt_logprobs),
        fusion_weights=_fusion_weights(generation),
    )


def _fusion_weights(generation: Generation) -> FusionWeights | None:
    """The report of the first candidate, if one was asked for."""
    fusion, first = generation.adaptation.fusion, generation.requests[0]
    if fusion is None or not first.reports_fusion_weights:
        return None
    return first.fusion_report.finish(fusion.config.weight_names)


def _is_running(result: ChunkResult) -> bool:
    return result.chunk.request.status is RequestStatus.RUNNING
