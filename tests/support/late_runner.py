"""A fake runner whose device computes by itself: in order, later than it is told, and seen only by reading.

What a step was given is what the host knew when it was launched. The tokens of a step before that was not read are
looked up when the device computes, which is as late as it can be: when something behind it is read or executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from fake_runner import EOS, EngineHarness, FakeRunner, must, next_token

from fusionserve.engine.chunk_result import ChunkResult
from fusionserve.engine.fused_chunks import LateWeights
from fusionserve.engine.launched_step import LaunchedStep
from fusionserve.engine.request import Generation, Request
from fusionserve.engine.scheduled_batch import ScheduledBatch, ScheduledChunk


class LateRunner(FakeRunner):
    """`log` has what was launched, read and executed, by the number of its step; failures come by `fails_at`."""

    runs_ahead = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.fails_at = "launch"
        self.log: list[tuple[str, int]] = []
        self.num_ahead = 0
        self.num_in_vain = 0  # chunks of steps that were read, of requests that had ended before
        self._queue: list[LateStep] = []

    def execute(self, batch: ScheduledBatch) -> list[ChunkResult]:
        self._compute_all()
        if batch.chunks:
            self.log.append(("execute", len(self.batches)))
        return super().execute(batch)

    def launch(self, batch: ScheduledBatch, before: LaunchedStep | None) -> LaunchedStep:
        must(bool(batch.chunks), "an empty step is launched")
        must(not batch.pool_changes and not batch.copies, "a step with changes to the pool is launched")
        assert before is None or isinstance(before, LateStep)
        step = LateStep(self, len(self.batches), batch, before)
        self.batches.append(batch)
        self.log.append(("launch", step.number))
        self.fail("launch", batch)
        self.num_ahead += before is not None
        self._queue.append(step)
        return step

    def read(self, step: LateStep) -> list[ChunkResult]:
        """Has the device come as far as this step."""
        self.log.append(("read", step.number))
        while step in self._queue:
            self._queue.pop(0).compute()
        try:
            self.fail("read", step.batch)
        except Exception:  # nobody may trust what it gave, or what follows from that
            step.results = [replace(result, token_id=EOS) for result in step.results]
            raise
        self.num_in_vain += sum(chunk.request.is_finished for chunk in step.batch.chunks)
        return step.results

    def compute(self, chunk: ScheduledChunk) -> ChunkResult:
        """What the device does for a chunk."""
        self._check(chunk)
        return self._result(chunk)

    def fail(self, moment: str, batch: ScheduledBatch) -> None:
        """Raises what is due."""
        if moment != self.fails_at:
            return
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if len(batch.chunks) > self.max_requests:
            raise MemoryError
        for chunk in batch.chunks:
            if chunk.request.generation in self.poison:
                raise self.poison[chunk.request.generation]

    def _compute_all(self) -> None:
        for step in self._queue:
            step.compute()
        self._queue.clear()


class LateStep(LaunchedStep):
    """A step with what the host knew of its requests when it was launched."""

    def __init__(
        self, runner: LateRunner, number: int, batch: ScheduledBatch, before: LateStep | None
    ) -> None:
        nothing = torch.zeros(2, len(batch.chunks), dtype=torch.long)
        super().__init__(batch, batch.chunks, nothing, LateWeights(()))
        self.number = number
        self.results: list[ChunkResult] = []
        self._runner = runner
        self._before = before
        self._known = [_known(chunk) for chunk in batch.chunks]

    def read(self) -> list[ChunkResult]:
        return self._runner.read(self)

    def compute(self) -> None:
        """What the device does, once it is this step's turn."""
        late = {} if self._before is None else {r.chunk.request: r.token_id for r in self._before.results}
        for chunk, known in zip(self.batch.chunks, self._known, strict=True):
            if self._before is not None:
                must(len(known.request.token_ids) == chunk.start, "a token that nobody has read was known")
                token_id = late[chunk.request]
                known.request.token_ids.append(1 if token_id is None else token_id)
            must(chunk.end == len(known.request.token_ids), "a chunk that does not end with the newest token")
            self.results.append(replace(self._runner.compute(known), chunk=chunk))


def _known(chunk: ScheduledChunk) -> ScheduledChunk:
    """The chunk as it is, whatever becomes of its request."""
    request = chunk.request
    copy = Request(replace(request.generation), request.index, request.text)
    copy.token_ids, copy.blocks = list(request.token_ids), list(request.blocks)
    return replace(chunk, request=copy)


def launches_before_reads(log: Sequence[tuple[str, int]]) -> list[int]:
    """The numbers of the steps that were read with a later one launched already."""
    launched = -1
    found = []
    for what, number in log:
        if what == "launch":
            launched = number
        elif what == "read" and launched > number:
            found.append(number)
    return found


class LateHarness(EngineHarness):
    """An engine over a runner that computes late."""

    runner: LateRunner

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, make_runner=LateRunner, **fields)

    def start(self, *generations: Generation) -> None:
        """Takes steps until all decode, and the next one is launched."""
        self.add(*generations)
        while not self.runner.num_ahead:
            self.step()


def ends_at(num_tokens: int, last: int | None = EOS) -> Any:
    """Chooses `last` after so many tokens."""
    return lambda request: last if request.num_generated == num_tokens else next_token(request)
