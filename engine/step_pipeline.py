"""Steps one after the other, or, where the device computes by itself, each begun before the last one is read.

A decoding step needs nothing from the host but the tokens of the step before, and the device has those. So the next
step is scheduled as if none of them ended a request, and launched; then the last one is read, and text, stop strings
and events are made while the device computes. For who turns out to have ended it computes once in vain: nothing of
that is read, so it is in no text, no usage and no prefix cache. Blocks and rank rows are free at once all the same:
whoever gets them next is computed behind it, on the same stream.

Whatever is not plain decoding goes in the old order, scheduled when everything is read. So does a step that failed.
"""

from __future__ import annotations

import logging

from fusionserve.engine.chunk_result import ChunkResult
from fusionserve.engine.launched_step import LaunchedStep
from fusionserve.engine.scheduled_batch import ScheduledBatch, ScheduledChunk
from fusionserve.engine.scheduler import Scheduler
from fusionserve.engine.step_execution import StepExecution, StepResults
from fusionserve.kernels.torch_errors import is_device_lost

_log = logging.getLogger(__name__)


class StepPipeline:
    """Brings one step to its end at a time, and may leave the next one launched."""

    def __init__(self, scheduler: Scheduler, execution: StepExecution) -> None:
        self._scheduler = scheduler
        self.execution = execution
        self._launched: LaunchedStep | None = None  # not read

    def run(self) -> tuple[ScheduledBatch, StepResults]:
        """The next step and what came of it. Raises only if the device is lost.

        Results of requests that had ended before are among them.
        """
        batch, launched = self._take_launched()
        ahead = self._schedule_ahead(batch)
        if launched is None and ahead is None:
            return batch, self.execution.execute(batch)
        results = self._try_ahead(batch, launched, ahead)
        return batch, self.execution.execute(batch) if results is None else StepResults(results)

    def _take_launched(self) -> tuple[ScheduledBatch, LaunchedStep | None]:
        """The step that was launched, or else the next; one that has nobody left is not waited for."""
        launched, self._launched = self._launched, None
        batch = launched.batch.still_running if launched is not None else None
        if batch is None or not batch.chunks:
            return self._scheduler.schedule(), None
        return batch, launched

    def _schedule_ahead(self, batch: ScheduledBatch) -> ScheduledBatch | None:
        """The step after `batch`, if that may be launched before `batch` is read."""
        if not self.execution.runs_ahead or batch.pool_changes or batch.copies:
            return None
        if not all(map(_is_free, batch.chunks)):
            return None
        return self._scheduler.schedule_ahead(batch)

    def _try_ahead(
        self, batch: ScheduledBatch, launched: LaunchedStep | None, ahead: ScheduledBatch | None
    ) -> list[ChunkResult] | None:
        """The results of `batch`, with `ahead` launched before they were read; None if any of that failed.

        Then both are forgotten: `batch` is computed again, which shows whose fault it was, and `ahead` is scheduled
        anew. A request may have a block early, and that is all that is left of it.
        """
        try:
            launched = launched or self.execution.launch(batch, None)
            if ahead is not None:
                self._launched = self.execution.launch(ahead, launched)
            return launched.read()
        except Exception as error:
            if is_device_lost(error):
                raise
            _log.exception("a step of %d requests failed with the next one launched", len(batch.chunks))
            self._launched = None
            return None


def _is_free(chunk: ScheduledChunk) -> bool:
    """True for a plain chunk whose token, and the one after it, are drawn from the logits as they are and told alone.

    Penalties look at the tokens before, which the host does not have; bans, biases and log-probabilities wait for the
    device.
    """
    request, params = chunk.request, chunk.request.generation.params
    return (
        chunk.is_plain
        and not params.sampling.changes_logits
        and chunk.num_generated >= params.stopping.min_new_tokens
        and params.output.logprobs is None
        and not request.wants_prompt_logprobs
    )
