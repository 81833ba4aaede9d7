"""What a fusion attends to while it trains: statistics of its weights, and penalties on them."""

from __future__ import annotations

import torch
from torch import Tensor

from fusionserve.fusion.params import FusionParams
from fusionserve.fusion.unfolded import UnfoldedFusion
from fusionserve.training.training_plot import WEIGHT_PREFIX
from fusionserve.training.training_summary import FusionStatistics
from fusionserve.training_config import FusionRun

_METRIC_PREFIX = WEIGHT_PREFIX.removeprefix("eval_")


class FusionWatch:
    """Sums the weights of every attention over the tokens it is shown, and forgets them when asked for the mean."""

    def __init__(self, fusion: UnfoldedFusion, names: tuple[str, ...]) -> None:
        self._fusion = fusion
        self._names = names
        self._sums: dict[str, Tensor] = {}
        self._entropies: dict[str, float] = {}
        self._num_tokens = 0

    def observe(self, is_token: Tensor) -> None:
        """Takes in the weights of the forward pass before, for the tokens of the mask [rows, length]."""
        chosen = is_token.flatten()
        for path, weights in self._fusion.weights.items():
            seen = weights.detach()[chosen].double()
            zeros = seen.new_zeros(seen.shape[1])
            self._sums[path] = self._sums.get(path, zeros) + seen.sum(dim=0)
            self._entropies[path] = self._entropies.get(path, 0.0) + float(entropy(seen).sum())
        self._num_tokens += int(chosen.sum())

    def take(self) -> FusionStatistics:
        """Means since the last call."""
        count = max(1, self._num_tokens)
        by_attention = {path: self._named(sums / count) for path, sums in self._sums.items()}
        means = [sums / count for sums in self._sums.values()]
        statistics = FusionStatistics(
            entropy=sum(self._entropies.values()) / count / max(1, len(self._entropies)),
            mean_weights=self._named(torch.stack(means).mean(dim=0)) if means else {},
            by_attention=by_attention,
        )
        self._sums, self._entropies, self._num_tokens = {}, {}, 0
        return statistics

    def metrics(self) -> dict[str, float]:
        """`take` as numbers for the log."""
        statistics = self.take()
        weights = {f"{_METRIC_PREFIX}{name}": weight for name, weight in statistics.mean_weights.items()}
        return {"entropy": statistics.entropy, **weights}

    def _named(self, weights: Tensor) -> dict[str, float]:
        return {name: round(float(weight), 6) for name, weight in zip(self._names, weights, strict=True)}


class FusionPenalty:
    """What is added to the loss: distance of every V from the identity, entropy, and uneven use of the members."""

    def __init__(self, run: FusionRun, fusion: UnfoldedFusion, params: FusionParams) -> None:
        self._run = run
        self._fusion = fusion
        self._params = params

    def __call__(self, is_token: Tensor) -> Tensor:
        """The penalty for a batch, after its forward pass; `is_token` is [rows, length]."""
        total = torch.zeros((), device=is_token.device)
        if self._run.value_penalty:
            for value in self._params.values.values():
                total = total + self._run.value_penalty * value.distance_from_identity()
        if self._run.entropy_penalty or self._run.balance_penalty:
            total = total + self._of_weights(is_token.flatten())
        return total

    def _of_weights(self, chosen: Tensor) -> Tensor:
        """Mean over the attentions; uneven is the squared distance of the mean weights from 1 / members."""
        penalties = []
        for weights in self._fusion.weights.values():
            seen = weights[chosen]
            uneven = (seen.mean(dim=0) - 1 / seen.shape[1]).square().sum()
            penalties.append(
                self._run.entropy_penalty * entropy(seen).mean() + self._run.balance_penalty * uneven
            )
        return torch.stack(penalties).mean()


def entropy(weights: Tensor) -> Tensor:
    """-sum a ln a over the last axis, in nats; a weight of 0 adds 0, and its gradient is finite."""
    return -(weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(dim=-1)
