"""One step's work, as the scheduler hands it to the model runner."""

from __future__ import annotations

from dataclasses import dataclass

from fusionserve.adapters.pool_ledger import PoolChange, WriteRows
from fusionserve.engine.request import Request


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

    @property
    def num_generated(self) -> int:
        """Tokens that the request has generated when the one after this chunk is drawn."""
        return self.end - self.request.prompt_length

    @property
    def is_plain(self) -> bool:
        """True for a single last token, with rank rows at most: what a recorded step computes."""
        adapters = self.request.generation.adapters
        return (
            self.num_tokens == 1
            and self.is_last
            and all(adapter.weights.is_low_rank_only for adapter in adapters)
        )


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step's work; the only thing that crosses from the scheduler to the model runner, which does not change it.

    `pool_changes` are made before the chunks are computed, `copies` are begun beside them.
    """

    chunks: tuple[ScheduledChunk, ...]
    pool_changes: tuple[PoolChange, ...]
    copies: tuple[WriteRows, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_prompt_tokens(self) -> int:
        """Of these, tokens of prompts; a last single one counts as decoding."""
        return sum(chunk.num_tokens for chunk in self.chunks if chunk.num_tokens > 1)

    @property
    def still_running(self) -> ScheduledBatch:
        """The chunks of requests that have not ended meanwhile."""
        chunks = tuple(chunk for chunk in self.chunks if not chunk.request.is_finished)
        return ScheduledBatch(chunks, self.pool_changes, self.copies)
