"""What the fusion is compared with: other ways to weigh the same adapters, in the same place and by the same code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fusionserve.adapters.base_modules import BaseModules
from fusionserve.fusion.attention import FusionValue
from fusionserve.fusion.config import FusionConfig
from fusionserve.fusion.params import attention_paths, make_params
from fusionserve.kernels.fusion_weights import masked_softmax


class FixedWeights(nn.Module):
    """The same weights for every token: a single adapter, or a blend. They train if they may."""

    def __init__(self, weights: Sequence[float], *, trains: bool = False) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float32), requires_grad=trains)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """x [tokens, d_in] -> [tokens, members]."""
        return self.weights.expand(x.shape[0], -1)


class LinearGate(nn.Module):
    """softmax(W x + b): the token alone decides, whatever the adapters say."""

    def __init__(self, d_in: int, num_members: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, num_members)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self, x: Tensor, u: Tensor, expand: Tensor, member_of_row: Tensor, allowed: Tensor, dropout: float
    ) -> Tensor:
        """x [tokens, d_in] -> [tokens, members]."""
        scores: Tensor = self.linear(x)
        return masked_softmax(scores, allowed.expand_as(scores))


@dataclass(frozen=True, slots=True)
class Weighing:
    """Attentions, or what stands for them, by module path."""

    attentions: Mapping[str, nn.Module]
    values: Mapping[str, FusionValue] = field(default_factory=dict)


def fixed(config: FusionConfig, weights: Sequence[float], *, trains: bool = False) -> Weighing:
    """One set of weights for the whole model, as a blend request has."""
    shared = FixedWeights(weights, trains=trains)
    return Weighing({path: shared for path in attention_paths(config.scope, config.modules)})


def gates(config: FusionConfig, base: BaseModules) -> Weighing:
    """A linear gate wherever the fusion would have an attention, and V where it would have one."""
    paths = attention_paths(config.scope, config.modules)
    gates = {path: LinearGate(base.by_path[path].d_in, len(config.members)) for path in paths}
    return Weighing(gates, make_params(config, base).values)
