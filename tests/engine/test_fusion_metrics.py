"""The counters of fusions: sums over tokens, from weights that are numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from fusionserve.engine.fusion_metrics import FusionMetrics
from fusionserve.engine.fusion_report import ChunkWeights
from fusionserve.fusion.fusion import Fusion
from fusionserve.metrics import REGISTRY, FusionLabels


def counted(name: str, fusion: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(f"fusionserve_{name}_total", {"fusion": fusion, **labels})
    assert value is not None
    return value


def test_weights_that_are_not_finite_leave_the_counters_whole() -> None:
    fusion = cast(
        Fusion, SimpleNamespace(name="blown-up", config=SimpleNamespace(weight_names=("left", "right")))
    )
    even, inf, nan = [0.5, 0.5], [float("inf"), 0.0], [float("nan"), float("nan")]
    two_attentions = torch.tensor([[even, nan, even, even], [even, even, [1.0, 0.0], inf]])
    chunks = [
        ChunkWeights.of(("q", "k"), weights) for weights in (two_attentions[:, :3], two_attentions[:, 3:])
    ]
    FusionMetrics(FusionLabels(4)).count_tokens(fusion, chunks)
    assert counted("fusion_tokens", "blown-up") == 2
    assert counted("fusion_entropy_nats", "blown-up") == pytest.approx(1.5 * torch.log(torch.tensor(2.0)))
    assert counted("fusion_member_weight", "blown-up", member="left") == pytest.approx(0.5 + 0.75)
    assert counted("fusion_member_weight", "blown-up", member="right") == pytest.approx(0.5 + 0.25)
