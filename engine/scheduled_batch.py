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
