"""What is counted of fusions: requests, tokens, and how their members were weighed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fusionserve import metrics
from fusionserve.engine.chunk_result import ChunkResult
from fusionserve.engine.fused_weights import ChunkWeights, mean_and_entropy
from fusionserve.fusion.fusion import Fusion
from fusionserve.metrics import FusionLabels


class FusionMetrics:
    """Counts by fusion under capped labels; a fusion without a label of its own shares `other`, without members."""

    def __init__(self, labels: FusionLabels) -> None:
        self._labels = labels

    def count_request(self, fusion: Fusion) -> None:
        """Counts one request."""
        metrics.FUSION_REQUESTS.labels(self._labels.label(fusion.name)).inc()

    def count_tokens(self, results: Iterable[ChunkResult]) -> None:
        """Counts the tokens of a step with their entropy and the weight of each member, before a request of it ends.

        With a request its fusion may go, and with that the series it is counted in. Left out are tokens whose weights
        are not finite: their request ends, but a counter would never be one again.
        """
        chunks: dict[Fusion, list[ChunkWeights]] = {}
        for result in results:
            fusion, weights = result.chunk.request.generation.adaptation.fusion, result.fusion_weights
            if fusion is not None and weights is not None:
                chunks.setdefault(fusion, []).append(weights)
        for fusion, of_fusion in chunks.items():
            self._count_chunks(fusion, of_fusion)

    def _count_chunks(self, fusion: Fusion, chunks: Sequence[ChunkWeights]) -> None:
        label = self._labels.label(fusion.name)
        mean, entropy = mean_and_entropy(chunks)
        if not math.isfinite(total := float(entropy.sum())):
            is_finite = entropy.isfinite()
            mean, total = mean[is_finite], float(entropy[is_finite].sum())
        metrics.FUSION_TOKENS.labels(label).inc(len(mean))
        metrics.FUSION_ENTROPY.labels(label).inc(total)
        if label == FusionLabels.OTHER:
            return
        for member, weight in zip(fusion.config.weight_names, mean.sum(dim=0).tolist(), strict=True):
            metrics.FUSION_MEMBER_WEIGHT.labels(label, member).inc(weight)
