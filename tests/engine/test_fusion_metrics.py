"""The counters of fusions: sums over tokens, from weights that are numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from fusionserve.engine.chunk_result import ChunkResult
from fusionserve.engine.fused_weights import ChunkWeights, FusedWeights, mean_and_entropy
from fusionserve.engine.fusion_metrics import FusionMetrics
from fusionserve.engine.scheduled_batch import ScheduledChunk
from fusionserve.fusion.fusion import Fusion, FusionContent
from fusionserve.metrics import REGISTRY, FusionLabels

pytestmark = pytest.mark.no_kernels


def counted(name: str, fusion: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(f"fusionserve_{name}_total", {"fusion": fusion, **labels})
    assert value is not None
    return value


def result_of(fusion: Fusion, weights: ChunkWeights) -> ChunkResult:
    """Of a request's chunk with the fusion."""
    generation = SimpleNamespace(adaptation=SimpleNamespace(fusion=fusion))
    chunk = SimpleNamespace(request=SimpleNamespace(generation=generation))
    return ChunkResult(cast(ScheduledChunk, chunk), fusion_weights=weights)


def test_weights_that_are_not_finite_leave_the_counters_whole() -> None:
    config = SimpleNamespace(weight_names=("left", "right"))
    content = cast(FusionContent, SimpleNamespace(folded=SimpleNamespace(config=config)))
    fusion = Fusion(uid=1, name="blown-up", version=1, content=content, load_time_s=0.0)
    even, inf, nan = [0.5, 0.5], [float("inf"), 0.0], [float("nan"), float("nan")]
    two_attentions = torch.tensor([[even, nan, even, even], [even, even, [1.0, 0.0], inf]])
    found = FusedWeights.of(("q", "k"), two_attentions)
    chunks = [ChunkWeights(found, 0, 3), ChunkWeights(found, 3, 4)]
    FusionMetrics(FusionLabels(4)).count_tokens([result_of(fusion, weights) for weights in chunks])
    assert counted("fusion_tokens", "blown-up") == 2
    assert counted("fusion_entropy_nats", "blown-up") == pytest.approx(1.5 * torch.log(torch.tensor(2.0)))
    assert counted("fusion_member_weight", "blown-up", member="left") == pytest.approx(0.5 + 0.75)
    assert counted("fusion_member_weight", "blown-up", member="right") == pytest.approx(0.5 + 0.25)


def test_chunks_that_are_left_out_are_not_counted() -> None:
    """Of a step's chunks some may have ended before it was read; those of a fusion's versions come from two finds."""
    by_module = torch.tensor([[[0.9, 0.1], [0.3, 0.7], [0.6, 0.4]]])
    found, other = FusedWeights.of(("q",), by_module), FusedWeights.of(("q",), by_module[:, 2:])
    chunks = [ChunkWeights(found, 0, 1), ChunkWeights(found, 2, 3), ChunkWeights(other, 0, 1)]
    mean, entropy = mean_and_entropy(chunks)
    assert torch.equal(mean, by_module[0, [0, 2, 2]])
    assert torch.equal(entropy, torch.special.entr(mean).sum(dim=-1))
    mean, _ = mean_and_entropy([ChunkWeights(found, 0, 2), ChunkWeights(found, 2, 3)])
    assert torch.equal(mean, by_module[0])
