"""A model runner without a model, which checks the cache and the pool as a real one would have to trust them.

Every slot remembers which tokens, under which adaptation, its keys and values stand for; every rank row remembers its
adapter. A chunk whose context is not exactly its own, or whose rows are another adapter's, fails the test. The next
token is a function of the adaptation, the tokens so far, the seed and the candidate, so company cannot change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any

import pytest
from delayed_copies import DelayedCopies
from schedules import BLOCK_SIZE, as_made, make_scheduler

from fusionserve.adapters.adapter import Adapter
from fusionserve.adapters.pool_ledger import MoveRows, PoolChange, WriteRows
from fusionserve.adapters.resident import Resident
from fusionserve.adapters.side_copies import CopyError
from fusionserve.engine.chunk_result import ChunkResult
from fusionserve.engine.engine import Engine, Output
from fusionserve.engine.fusion_metrics import FusionMetrics
from fusionserve.engine.launched_step import LaunchedStep
from fusionserve.engine.request import Generation, Request
from fusionserve.engine.sampler import Logprobs
from fusionserve.engine.scheduled_batch import ScheduledBatch, ScheduledChunk
from fusionserve.errors import FusionServeError
from fusionserve.generation import GenerationFinished
from fusionserve.metrics import AdapterLabels, FusionLabels

VOCAB = 50
EOS = 0


class FakeRunner:
    """`choose(request)` may stand in for the next token; None means logits that are not finite.

    `error` is raised by the next step, with `loses_copies` before its copies into the pool; `poison` by every step in
    which one of its generations takes part; MemoryError by every step of more than `max_requests` requests. Residents
    are copied ahead by `copies`, if there are any; those in `uncopied` fail to be copied, ahead or not.
    """

    def __init__(
        self, choose: Callable[[Request], int | None] | None = None, copies: DelayedCopies | None = None
    ) -> None:
        self._choose = choose or next_token
        self._copies = copies
        self.uncopied: dict[Resident, Exception] = {}
        self._slots: dict[int, bytes] = {}
        self._rows: dict[int, int] = {}
        self.error: Exception | None = None
        self.loses_copies = False
        self.poison: dict[Generation, Exception] = {}
        self.max_requests = 1 << 30
        self.batches: list[ScheduledBatch] = []

    runs_ahead = False

    def launch(self, batch: ScheduledBatch, before: LaunchedStep | None) -> LaunchedStep:
        pytest.fail("it does not run ahead")

    def execute(self, batch: ScheduledBatch) -> list[ChunkResult]:
        self.batches.append(batch)
        if not self.loses_copies:
            self._copy(batch.pool_changes)
            self._copy_ahead(batch.copies)
        if self.error is not None:
            error, self.error, self.loses_copies = self.error, None, False
            raise error
        if len(batch.chunks) > self.max_requests:
            raise MemoryError
        for chunk in batch.chunks:
            self._check(chunk)
            if chunk.request.generation in self.poison:
                raise self.poison[chunk.request.generation]
        return [self._result(chunk) for chunk in batch.chunks]

    @property
    def num_tokens(self) -> int:
        """Tokens computed so far."""
        return sum(batch.num_tokens for batch in self.batches)

    def _copy_ahead(self, writes: Sequence[WriteRows]) -> None:
        for write in writes:
            assert self._copies is not None
            self._fail_if_uncopied(write)
            self._copies.begin(write.resident.uid, partial(self._write, write))

    def _copy(self, changes: Sequence[PoolChange]) -> None:
        if changes and self._copies is not None:
            self._copies.join()
        for change in changes:
            if isinstance(change, MoveRows):
                # Nothing is left where they were: others may be written there in this very step.
                moved = [self._rows.pop(change.source + row, None) for row in range(change.num_rows)]
                for row, uid in enumerate(moved):
                    if uid is None:
                        pytest.fail("rows are moved that nobody wrote")
                    self._rows[change.target + row] = uid
            else:
                self._fail_if_uncopied(change)
                self._write(change)

    def _fail_if_uncopied(self, write: WriteRows) -> None:
        if write.resident in self.uncopied:
            for row in range(write.resident.num_rows):
                self._rows[write.start + row] = -write.resident.uid  # nobody knows what it left
            raise CopyError(write.resident) from self.uncopied[write.resident]

    def _write(self, write: WriteRows) -> None:
        for row in range(write.resident.num_rows):
            self._rows[write.start + row] = write.resident.uid

    def _check(self, chunk: ScheduledChunk) -> None:
        request = chunk.request
        must(chunk.num_tokens > 0, "a chunk without tokens")
        must(len(request.blocks) * BLOCK_SIZE >= chunk.end, "a chunk without blocks")
        states = _states(request)
        slots = [block * BLOCK_SIZE + offset for block in request.blocks for offset in range(BLOCK_SIZE)]
        for position in range(chunk.start):
            must(self._slots.get(slots[position]) == states[position], f"foreign context at {position}")
        for position in range(chunk.start, chunk.end):
            self._slots[slots[position]] = states[position]
        for adapter, start in zip(request.generation.adapters, chunk.row_starts, strict=True):
            rows = {self._rows.get(start + row) for row in range(adapter.num_rows)}
            must(rows == {adapter.uid}, f"the rows of {adapter.name} hold something else")

    def _result(self, chunk: ScheduledChunk) -> ChunkResult:
        output = chunk.request.generation.params.output
        prompt: tuple[Logprobs, ...] = ()
        if output.prompt_logprobs is not None and chunk.request.index == 0:
            following = chunk.request.generation.prompt_token_ids[chunk.start + 1 : chunk.end + 1]
            prompt = tuple(_logprobs(token_id) for token_id in following)
        if not chunk.is_last:
            return ChunkResult(chunk, prompt_logprobs=prompt)
        token_id = self._choose(chunk.request)
        logprobs = None if output.logprobs is None or token_id is None else _logprobs(token_id)
        return ChunkResult(chunk, token_id, token_id is not None, logprobs, prompt)


def must(condition: bool, message: str) -> None:
    """Fails the test, also where an engine would make an InternalError of an AssertionError."""
    if not condition:
        pytest.fail(message)


class EngineHarness:
    """An Engine over a fake runner, with what it told and released by generation."""

    def __init__(
        self,
        choose: Callable[[Request], int | None] | None = None,
        copies: DelayedCopies | None = None,
        make_runner: type[FakeRunner] = FakeRunner,
        **scheduler_fields: Any,
    ) -> None:
        self.runner = make_runner(choose, copies)
        self.released: list[Adapter] = []
        self.events: dict[Generation, list[Any]] = {}
        self.engine = Engine(
            make_scheduler(copies=copies, **scheduler_fields),
            self.runner,
            eos_token_ids=frozenset({EOS}),
            release_leases=lambda adaptation: self.released.extend(adaptation.adapters),
            token_text=str,
            adapter_labels=AdapterLabels(4),
            fusion_metrics=FusionMetrics(FusionLabels(4)),
        )

    def add(self, *generations: Generation) -> None:
        for generation in generations:
            self.events[generation] = []
            self.engine.add(generation)

    def step(self) -> list[Output]:
        outputs = self.engine.step()
        self.engine.scheduler.check_integrity()
        self.take(outputs)
        return outputs

    def take(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            self.events[output.generation].append(output.event)

    def run(self, max_steps: int = 1000) -> int:
        """Steps until nothing is left to do; returns how many it took."""
        for num_steps in range(max_steps):
            if not self.engine.has_work:
                return num_steps
            self.step()
        raise AssertionError(f"not finished after {max_steps} steps")

    def num_written(self, resident: Resident) -> int:
        """How often the runner was told to write this resident's rows."""
        changes = [change for batch in self.runner.batches for change in batch.pool_changes]
        return sum(isinstance(change, WriteRows) and change.resident is resident for change in changes)

    def last(self, generation: Generation) -> Any:
        """The terminal event; asserts that there is exactly one, and that it is the last."""
        events = self.events[generation]
        terminal = [e for e in events if isinstance(e, GenerationFinished | FusionServeError)]
        assert len(terminal) == 1 and terminal[0] is events[-1], events
        return events[-1]

    def tokens(self, generation: Generation) -> list[tuple[int, ...]]:
        """The tokens of each candidate of a finished generation."""
        finished = self.last(generation)
        assert isinstance(finished, GenerationFinished), finished
        return [candidate.token_ids for candidate in finished.candidates]


def next_token(request: Request) -> int:
    """A token other than EOS that depends on everything that may shape it, and on nothing else."""
    state = _states(request)[-1] + f"{request.generation.seed}:{request.index}".encode()
    return 1 + int.from_bytes(blake2b(state, digest_size=4).digest()) % (VOCAB - 1)


def expected_tokens(generation: Generation) -> list[tuple[int, ...]]:
    """What the fake runner must give each candidate that only its length ends, by the definition."""
    made, expected = as_made(generation), []
    for request in made.requests:
        shadow = Request(made, request.index, request.text)
        for _ in range(made.max_new_tokens):
            shadow.token_ids.append(next_token(shadow))
        expected.append(tuple(shadow.generated_ids))
    return expected


def _states(request: Request) -> list[bytes]:
    """What the keys and values at each position stand for: the adaptation and all tokens up to there."""
    generation = request.generation
    terms = sorted(
        (a.uid, c) for a, c in zip(generation.adapters, generation.adaptation.coefficients, strict=True)
    )
    state, states = f"{generation.params.cache_salt}{terms}".encode(), []
    for token_id in request.token_ids:
        state = blake2b(state + b"/%d" % token_id, digest_size=8).digest()
        states.append(state)
    return states


def _logprobs(token_id: int) -> Logprobs:
    return Logprobs((token_id, -float(token_id), 1), ())
