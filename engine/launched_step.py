"""A decoding step that the device was given and the host has not read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusionserve.engine.chunk_result import ChunkResult
from fusionserve.engine.fused_chunks import LateWeights
from fusionserve.engine.sampler import to_tokens
from fusionserve.engine.scheduled_batch import ScheduledBatch, ScheduledChunk
from fusionserve.kernels.host_copy import HostCopy, to_device


class LaunchedStep:
    """Holds what `batch` drew, [num_chunks] as by `choose`, on the device and on its way here.

    `chunks` are those of the batch in the order in which they were computed.
    """

    def __init__(
        self, batch: ScheduledBatch, chunks: Sequence[ScheduledChunk], drawn: Tensor, weights: LateWeights
    ) -> None:
        self.batch = batch
        self._chunks = chunks
        self._drawn, self._on_host = drawn, HostCopy(drawn)
        self._weights = weights

    def drawn_ids(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """The tokens [chunks] that the requests of `chunks` were given, on the device.

        Where logits are not finite it is a token of no meaning: its request ends when it is read.
        """
        places = {chunk.request: place for place, chunk in enumerate(self._chunks)}
        wanted = [places[chunk.request] for chunk in chunks]
        drawn = self._drawn.index_select(0, to_device(wanted, torch.long, self._drawn.device))
        return drawn.clamp(min=0)

    def read(self) -> list[ChunkResult]:
        """One result per chunk; waits for the step to end."""
        tokens = to_tokens(self._on_host.read())
        weights = self._weights.read()
        return [
            ChunkResult(chunk, token, token is not None, fusion_weights=weights.get(chunk))
            for chunk, token in zip(self._chunks, tokens, strict=True)
        ]
