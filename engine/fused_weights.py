"""The fusion weights that a step found, and each chunk's part of them, which is cut out only for those who read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class FusedWeights:
    """The fusion weights of neighbouring tokens."""

    modules: tuple[str, ...]  # the paths of the attentions
    by_module: Tensor  # [attentions, tokens, members (+ 1)]
    mean: Tensor  # [tokens, members (+ 1)], over the attentions
    entropy: Tensor  # [tokens] in nats, mean over the attentions

    @classmethod
    def of(cls, modules: tuple[str, ...], by_module: Tensor) -> FusedWeights:
        """From the weights [attentions, tokens, members (+ 1)] of these attentions."""
        entropy = torch.special.entr(by_module).sum(dim=-1).mean(dim=0)
        return cls(modules, by_module, by_module.mean(dim=0), entropy)

    @property
    def num_tokens(self) -> int:
        """Tokens that they are of."""
        return len(self.entropy)


@dataclass(frozen=True, slots=True, eq=False)
class ChunkWeights:
    """Those of a chunk, whose tokens are [start, end) of all that its step found."""

    found: FusedWeights
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return self.end - self.start

    def part(self, first: int = 0) -> FusedWeights:
        """Of the chunk's tokens from `first` on."""
        found, tokens = self.found, slice(self.start + first, self.end)
        return FusedWeights(
            found.modules, found.by_module[:, tokens], found.mean[tokens], found.entropy[tokens]
        )


def mean_and_entropy(chunks: Sequence[ChunkWeights]) -> tuple[Tensor, Tensor]:
    """The means [tokens, members (+ 1)] and entropies [tokens] of different chunks of one fusion."""
    found = chunks[0].found
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    if num_tokens == found.num_tokens and all(chunk.found is found for chunk in chunks):
        return found.mean, found.entropy
    parts = [chunk.part() for chunk in chunks]
    return torch.cat([part.mean for part in parts]), torch.cat([part.entropy for part in parts])
