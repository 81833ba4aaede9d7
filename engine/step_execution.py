"""Running a batch so that what goes wrong with one request stays that request's own.

A step that raised is computed again without the culprit: keys and values are written to the same slots and the next
token is a function of its request, so computing twice changes nothing. A step that fails for want of memory loses its
newest requests, one, two, four and so on, until the rest fits; any other failure is narrowed down by halves. A resident
that cannot be copied to the pool is given up, which is nobody's business but of those who hold it or wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fusionserve.adapters.pool_ledger import MoveRows, PoolChange, PoolLedger, WriteRows
from fusionserve.adapters.resident import Resident
from fusionserve.adapters.side_copies import CopyError
from fusionserve.engine.chunk_result import ChunkResult
from fusionserve.engine.launched_step import LaunchedStep
from fusionserve.engine.request import Generation
from fusionserve.engine.scheduled_batch import ScheduledBatch, ScheduledChunk
from fusionserve.failpoints import reach_failpoint
from fusionserve.kernels.torch_errors import is_device_lost, is_out_of_memory

_log = logging.getLogger(__name__)


class Runner(Protocol):
    """Carries out a scheduled batch: the model runner, or a fake in tests."""

    @property
    def runs_ahead(self) -> bool:
        """True if a step may be launched before the last one is read."""

    def execute(self, batch: ScheduledBatch) -> list[ChunkResult]:
        """One result per chunk.

        Raises CopyError before anything is computed, for the first resident that cannot be copied: changes before its
        own are made, all of them if it is to be copied ahead.
        """

    def launch(self, batch: ScheduledBatch, before: LaunchedStep | None) -> LaunchedStep:
        """Begins a step of plain chunks without changes to the pool.

        With `before`, which had all of its requests and may not have been read, it continues their tokens.
        """


@dataclass(slots=True)
class StepResults:
    """What came of a batch: results, the generations that cannot go on, and residents not copied, with the reasons.

    Whoever holds one of these has no result; it is to be forgotten once nobody does.
    """

    results: list[ChunkResult] = field(default_factory=list)
    failed: set[Generation] = field(default_factory=set)
    without_memory: set[Generation] = field(default_factory=set)
    uncopied: list[tuple[Resident, BaseException]] = field(default_factory=list)

    def has_given_up(self, resident: Resident) -> bool:
        """True if the resident could not be copied."""
        return any(uncopied is resident for uncopied, _ in self.uncopied)

    def may_run(self, chunk: ScheduledChunk) -> bool:
        """True if all that its request holds was copied so far."""
        return not any(map(self.has_given_up, chunk.request.generation.adaptation.residents))


class StepExecution:
    """Executes batches whose pool changes are `ledger`'s."""

    def __init__(self, runner: Runner, ledger: PoolLedger) -> None:
        self._runner = runner
        self._ledger = ledger

    @property
    def runs_ahead(self) -> bool:
        """As the runner."""
        return self._runner.runs_ahead

    def launch(self, batch: ScheduledBatch, before: LaunchedStep | None) -> LaunchedStep:
        """Has the runner begin a step. Raises whatever goes wrong: `execute` then finds out with whom."""
        reach_failpoint("engine.step")
        return self._runner.launch(batch, before)

    def execute(self, batch: ScheduledBatch) -> StepResults:
        """The results of the batch. Raises only if the device is lost."""
        step = StepResults()
        self._run(batch, step)
        if step.failed:
            ids = ", ".join(generation.request_id for generation in step.failed)
            _log.error("requests that failed alone, too, and end: %s", ids)
        if step.without_memory:
            ids = ", ".join(generation.request_id for generation in step.without_memory)
            _log.error("requests ended for want of memory: %s", ids)
        return step

    def _run(self, batch: ScheduledBatch, step: StepResults) -> None:
        try:
            reach_failpoint("engine.step")
            self._run_once(batch, step)
        except Exception as error:
            if is_device_lost(error):
                raise
            self._ledger.repeat_writes()  # nobody knows which of the copies were made
            chunks = list(filter(step.may_run, batch.chunks))
            if is_out_of_memory(error):
                _log.warning("a step of %d requests ran out of memory", len(chunks))
                self._run_fewer(chunks, step)
            else:
                _log.exception("a step of %d requests failed", len(chunks))
                self._run_halves(chunks, step)

    def _run_once(self, batch: ScheduledBatch, step: StepResults) -> None:
        """Runs the batch, giving up residents that cannot be copied."""
        try:
            step.results += self._runner.execute(batch)
        except CopyError as error:
            _log.exception("an adapter could not be copied to the pool")
            self._ledger.repeat_copies()
            step.uncopied.append((error.resident, error.__cause__ or error))
            self._run_once(self._rest(batch.chunks, _changes_after(batch, error.resident), step), step)

    def _run_fewer(self, chunks: Sequence[ScheduledChunk], step: StepResults) -> None:
        """Ends the newest generations until the rest fits; `chunks` have just failed."""
        kept = sorted({chunk.request.generation for chunk in chunks}, key=lambda g: g.requests[0].order)
        num_ended = 1
        while len(kept) > num_ended:
            step.without_memory.update(kept[-num_ended:])
            kept = kept[:-num_ended]
            num_ended *= 2
            try:
                self._run_once(self._batch(chunks, kept, step), step)
                return
            except Exception as error:
                if is_device_lost(error):
                    raise
                self._ledger.repeat_writes()
        step.without_memory.update(kept)

    def _run_halves(self, chunks: Sequence[ScheduledChunk], step: StepResults) -> None:
        """Finds the culprit; `chunks` have just failed."""
        generations = list(dict.fromkeys(chunk.request.generation for chunk in chunks))
        if len(generations) <= 1:
            step.failed.update(generations)
            return
        middle = len(generations) // 2
        for half in (generations[:middle], generations[middle:]):
            self._run(self._batch(chunks, half, step), step)

    def _batch(
        self, chunks: Sequence[ScheduledChunk], kept: Sequence[Generation], step: StepResults
    ) -> ScheduledBatch:
        """The chunks of some generations; it copies to the pool whatever was not copied for sure."""
        members = set(kept)
        chosen = [chunk for chunk in chunks if chunk.request.generation in members]
        return self._rest(chosen, self._ledger.take_changes(), step)

    def _rest(
        self, chunks: Sequence[ScheduledChunk], changes: Sequence[PoolChange], step: StepResults
    ) -> ScheduledBatch:
        """What is left of these without the residents that are given up and those who hold them."""

        def is_left(change: PoolChange) -> bool:
            return isinstance(change, MoveRows) or not step.has_given_up(change.resident)

        return ScheduledBatch(
            tuple(filter(step.may_run, chunks)),
            tuple(filter(is_left, changes)),
            tuple(filter(is_left, self._ledger.take_copies())),
        )


def _changes_after(batch: ScheduledBatch, resident: Resident) -> Sequence[PoolChange]:
    """The changes behind the one that writes the resident; none if it is to be copied ahead, after all of them."""
    changes = batch.pool_changes
    written = [isinstance(change, WriteRows) and change.resident is resident for change in changes]
    return changes[written.index(True) + 1 :] if any(written) else ()
