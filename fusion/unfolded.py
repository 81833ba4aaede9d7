"""A base model with the unfolded fusion in place: what trains, and the oracle of the folded rows.

The members' adapters are frozen; only the attentions (and V) have gradients. V is linear, so it is applied once, to the
weighted sum of the members' outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fusionserve.adapters.lora_weights import LoRAWeights, ModuleLoRA
from fusionserve.fusion.attention import FusionValue
from fusionserve.fusion.config import FusionConfig
from fusionserve.fusion.params import layer_of


class TokenWeighing(Protocol):
    """What weighs the members: modules that are called as FusionAttention is, and V, by module path.

    FusionParams is one; experiments put simpler ones in its place.
    """

    @property
    def attentions(self) -> Mapping[str, nn.Module]:
        """Called with x, u, expand, member_of_row, allowed and dropout; they give weights [tokens, members (+ 1)]."""

    @property
    def values(self) -> Mapping[str, FusionValue]:
        """May be empty."""


class AttentionOutput:
    """The fusion weights that an attention gave in the forward pass at hand, for the modules that share them."""

    def __init__(self) -> None:
        self.weights: Tensor | None = None  # [tokens, members (+ 1)]


class FusedLinear(nn.Module):
    """y = W0 x + b0 + V sum_i a_i s_i B_i A_i x, unfolded, on one linear module of the base."""

    def __init__(
        self,
        base: nn.Module,
        members: Sequence[ModuleLoRA | None],
        attention: nn.Module | None,
        value: FusionValue | None,
        output: AttentionOutput,
        dropout: float,
    ) -> None:
        super().__init__()
        self.base = base
        self.attention = attention
        self.value = value
        self._output = output
        self._dropout = dropout
        present = [member for member in members if member is not None]
        ranks = torch.tensor([0 if member is None else member.rank for member in members])
        self.shrink = _frozen(torch.cat([_wide(member.shrink) for member in present]))
        self.shrink_bias = _frozen(torch.cat([_wide(_bias_of(member)) for member in present]))
        self.expand = _frozen(torch.cat([_wide(member.expand) for member in present]))
        self.member_of_row = _frozen(torch.arange(len(members)).repeat_interleave(ranks))
        self.present = _frozen(ranks > 0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        output: Tensor = self.base(x)
        flat = x.reshape(-1, x.shape[-1]).to(self.shrink.dtype)
        u = functional.linear(flat, self.shrink, self.shrink_bias)  # [tokens, rows]
        if self.attention is not None:
            self._output.weights = self.attention(
                flat, u, self.expand, self.member_of_row, self.present, self._dropout
            )
        weights = self._output.weights
        assert weights is not None, "the first module of a layer has its attention"
        delta = (u * weights[:, self.member_of_row].to(u.dtype)) @ self.expand
        if self.value is not None:
            delta = self.value(delta)
        return output + delta.view(output.shape).to(output.dtype)


class UnfoldedFusion:
    """Puts a fusion onto a base model, in place, until `remove`. The members' weights may be in any dtype."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: FusionConfig,
        weighing: TokenWeighing,
        members: Sequence[LoRAWeights],
        *,
        dropout: float = 0.0,
    ) -> None:
        self._model = model
        self._bases: dict[str, nn.Module] = {}
        self._outputs: dict[str, AttentionOutput] = {}  # by the path of the attention
        in_layer: dict[str, AttentionOutput] = {}
        for path in config.modules:
            attention = weighing.attentions.get(path)
            if attention is not None:
                self._outputs[path] = in_layer[layer_of(path)] = AttentionOutput()
            base = self._bases[path] = model.get_submodule(path)
            loras = [member.modules.get(path) for member in members]
            output = in_layer[layer_of(path)]
            value = weighing.values.get(path)
            _replace(model, path, FusedLinear(base, loras, attention, value, output, dropout))

    @property
    def attention_paths(self) -> tuple[str, ...]:
        """The modules before which an attention runs."""
        return tuple(self._outputs)

    @property
    def weights(self) -> dict[str, Tensor]:
        """By the path of each attention, the fusion weights [tokens, members (+ 1)] of the last forward pass."""
        return {path: output.weights for path, output in self._outputs.items() if output.weights is not None}

    def remove(self) -> None:
        """Puts the base's own modules back."""
        for path, base in self._bases.items():
            _replace(self._model, path, base)


def _frozen(tensor: Tensor) -> nn.Buffer:
    return nn.Buffer(tensor, persistent=False)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _bias_of(module: ModuleLoRA) -> Tensor:
    return module.shrink.new_zeros(module.rank) if module.shrink_bias is None else module.shrink_bias


def _replace(model: PreTrainedModel, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
