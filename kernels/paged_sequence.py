"""One request's part of a batch over the paged cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One request's part of the batch: tokens [start, end), the first at `position`, and the blocks of its context."""

    start: int
    end: int
    position: int
    blocks: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """New tokens."""
        return self.end - self.start

    @property
    def length(self) -> int:
        """Positions up to the last new token's."""
        return self.position + self.num_tokens

    def new_slots(self, block_size: int) -> Iterator[int]:
        """The slots of the new tokens."""
        for position in range(self.position, self.length):
            yield self.blocks[position // block_size] * block_size + position % block_size
