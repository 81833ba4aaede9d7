"""A whole model from token ids to logits, without what transformers does for others.

    x = scale * embedding[ids];  x = layer(x) for each layer;  logits = cap tanh(head norm(x) / (divisor cap))

Most families have no scale, cap or divisor. Masks, caches, outputs of every kind and checks of settings are a twentieth
of a decoding step of a small model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusionserve.engine.attention import AttentionBatch
from fusionserve.engine.decoder_layer import DecoderLayer
from fusionserve.engine.layer_form import LayerForm, layer_form, read_norm
from fusionserve.engine.layer_stack import LayerStack
from fusionserve.engine.rotary_table import RotaryTable
from fusionserve.kernels.paged_attention import AttentionOptions
from fusionserve.kernels.pointwise import rms_norm

_GRANITE = "GraniteForCausalLM"
_CAPPED = {"Gemma2ForCausalLM", "Gemma3ForCausalLM"}
_PLAIN = {
    f"{name}ForCausalLM"
    for name in (
        *("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi3", "Gemma", "Olmo2", "Olmo3"),
        *("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe"),
    )
}
_ARCHITECTURES = _PLAIN | _CAPPED | {_GRANITE}


class DecoderModel:
    """Computes what the model it is made from computes, with that model's modules."""

    def __init__(
        self,
        model: PreTrainedModel,
        forms: Sequence[LayerForm],
        max_context_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        source: Any = model
        base, config, name = source.base_model, source.config, type(model).__name__
        rotations = sorted({form.rotation for form in forms})
        self._rotary = [RotaryTable(base.rotary_emb, max_context_tokens, dtype, of) for of in rotations]
        self.layers = [DecoderLayer(form, rotations.index(form.rotation)) for form in forms]
        self._stack = LayerStack(self.layers)
        self._embedding, self._embedding_scale = source.get_input_embeddings(), 1.0
        self._norm, self._head = read_norm(base.norm), source.get_output_embeddings()
        self._divisor, self._cap = 1.0, config.final_logit_softcapping if name in _CAPPED else None
        if name == _GRANITE:
            self._embedding_scale, self._divisor = base.embedding_multiplier, config.logits_scaling

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        options: Mapping[nn.Module, AttentionOptions],
        max_context_tokens: int,
        dtype: torch.dtype,
    ) -> DecoderModel | None:
        """For a model whose linear modules are adapted ones, or None if it is not known or a layer has no form.

        `options` are those that its attention modules attend with.
        """
        layers = getattr(model.base_model, "layers", None)
        if type(model).__name__ not in _ARCHITECTURES or not isinstance(layers, nn.ModuleList):
            return None
        forms = [layer_form(layer, options) for layer in layers]
        known = [form for form in forms if form is not None]
        return cls(model, known, max_context_tokens, dtype) if known and len(known) == len(forms) else None

    def logits(
        self, token_ids: Tensor, positions: Tensor, wanted: Tensor | None, batch: AttentionBatch
    ) -> Tensor:
        """token_ids and positions [num_tokens] -> [wanted, vocab]: of the tokens `wanted`, or of all."""
        x: Tensor = self._embedding(token_ids)
        if self._embedding_scale != 1:
            x = x * self._embedding_scale
        angles = [table.angles(positions) for table in self._rotary]
        if not self._stack.compute_(x, angles, batch):
            for layer in self.layers:
                x = layer.compute(x, angles, batch)
        if wanted is not None:
            x = x[wanted]
        return self._bounded(self._head(rms_norm(x, self._norm)))

    def _bounded(self, logits: Tensor) -> Tensor:
        if self._divisor != 1:
            logits = logits / self._divisor
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap
