"""What is counted of fusions: requests, tokens, and how their members were weighed."""

from __future__ import annotations

from fusionserve import metrics
from fusionserve.engine.fusion_report import ChunkWeights
from fusionserve.fusion.fusion import Fusion
from fusionserve.metrics import FusionLabels


class FusionMetrics:
    """Counts by fusion under capped labels; a fusion without a label of its own shares `other`, without members."""

    def __init__(self, labels: FusionLabels) -> None:
        self._labels = labels

    def count_request(self, fusion: Fusion) -> None:
        """Counts one request."""
        metrics.FUSION_REQUESTS.labels(self._labels.label(fusion.name)).inc()

    def count_tokens(self, fusion: Fusion, weights: ChunkWeights) -> None:
        """Counts the tokens of one chunk with their entropy and the weight of each member."""
        label = self._labels.label(fusion.name)
        metrics.FUSION_TOKENS.labels(label).inc(len(weights.mean))
        metrics.FUSION_ENTROPY.labels(label).inc(float(weights.entropy.sum()))
        if label == FusionLabels.OTHER:
            return
        sums = weights.mean.sum(dim=0).tolist()
        for member, weight in zip(fusion.config.weight_names, sums, strict=True):
            metrics.FUSION_MEMBER_WEIGHT.labels(label, member).inc(weight)
