"""A whole model of the Llama family from token ids to logits, without what transformers does for others.

    x = embedding[ids];  x = layer(x) for each layer;  logits = head rms_norm(x)

Masks, caches, outputs of every kind and checks of settings are a twentieth of a decoding step of a small model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusionserve.engine.attention import AttentionBatch
from fusionserve.engine.decoder_layer import DecoderLayer
from fusionserve.engine.layer_stack import LayerStack
from fusionserve.engine.rotary_table import RotaryTable
from fusionserve.kernels.pointwise import rms_norm

_ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


class DecoderModel:
    """Computes what the model it is made from computes, with that model's modules."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[DecoderLayer],
        max_context_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        source: Any = model
        base = source.base_model
        self._embedding = source.get_input_embeddings()
        self._layers = tuple(layers)
        self._stack = LayerStack(self._layers)
        self._rotary = RotaryTable(base.rotary_emb, max_context_tokens, dtype)
        self._norm = base.norm
        self._head = source.get_output_embeddings()

    @staticmethod
    def fits(model: PreTrainedModel, layers: Sequence[DecoderLayer]) -> bool:
        """True for a known model all of whose layers are these."""
        base: Any = model.base_model
        return type(model).__name__ in _ARCHITECTURES and len(layers) == len(base.layers)

    def logits(
        self, token_ids: Tensor, positions: Tensor, wanted: Tensor | None, batch: AttentionBatch
    ) -> Tensor:
        """token_ids and positions [num_tokens] -> [wanted, vocab]: of the tokens `wanted`, or of all."""
        x = self._embedding(token_ids)
        angles = self._rotary.angles(positions)
        if not self._stack.compute_(x, angles, batch):
            for layer in self._layers:
                x = layer.compute(x, angles, batch)
        if wanted is not None:
            x = x[wanted]
        x = rms_norm(x, self._norm.weight, self._norm.variance_epsilon)
        logits: Tensor = self._head(x)
        return logits
