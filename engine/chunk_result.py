"""What a step gave for one of its chunks."""

from __future__ import annotations

from dataclasses import dataclass

from fusionserve.engine.fused_weights import ChunkWeights
from fusionserve.engine.sampler import Logprobs
from fusionserve.engine.scheduled_batch import ScheduledChunk


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What a chunk gave: a token if it was the last one, and the log-probabilities asked for.

    `is_finite` False means that the logits were not, so there is no token.
    """

    chunk: ScheduledChunk
    token_id: int | None = None
    is_finite: bool = True
    logprobs: Logprobs | None = None
    prompt_logprobs: tuple[Logprobs, ...] = ()
    fusion_weights: ChunkWeights | None = None
