"""What is kept of fusion weights for the report that was asked for."""

import pytest
import torch

from fusionserve.engine import fusion_report
from fusionserve.engine.fused_weights import ChunkWeights, FusedWeights
from fusionserve.engine.fusion_report import FusionReport
from fusionserve.generation import FusionWeightDetail, TokenFusionWeights

pytestmark = pytest.mark.no_kernels

DETAILS = [FusionWeightDetail.MEAN, FusionWeightDetail.PER_MODULE, FusionWeightDetail.PER_TOKEN]


@pytest.mark.parametrize("detail", DETAILS)
def test_tokens_are_kept_for_a_report_by_token_alone(
    detail: FusionWeightDetail, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(position: int, weights: tuple[float, ...]) -> TokenFusionWeights:
        made.append(position)
        return TokenFusionWeights(position, weights)

    monkeypatch.setattr(fusion_report, "TokenFusionWeights", counted)
    weights = torch.tensor(
        [[[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]], [[0.75, 0.25], [1.0, 0.0], [0.25, 0.75]]]
    )
    found = FusedWeights.of(("first", "second"), weights)
    report = FusionReport(detail)
    report.add(ChunkWeights(found, 0, 2), 0)
    report.add(ChunkWeights(found, 1, 3), 1)  # one that is known, and one that is not
    is_by_token = detail is FusionWeightDetail.PER_TOKEN
    assert made == ([0, 1, 2] if is_by_token else [])
    assert [row.weights for row in report.take_untold()] == (
        [(0.5, 0.5), (0.75, 0.25), (0.5, 0.5)] if is_by_token else []
    )
    told = report.finish(("a", "b"))
    assert told is not None and told.members == ("a", "b")
    assert told.mean == pytest.approx((7 / 12, 5 / 12))
    assert len(told.tokens) == len(made)
    assert len(told.modules) == (2 if detail is FusionWeightDetail.PER_MODULE else 0)
