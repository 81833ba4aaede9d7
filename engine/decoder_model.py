"""A whole model from token ids to logits, without what transformers does for others; `model_form.py` says what it is.

Masks, caches, outputs of every kind and checks of settings are a twentieth of a decoding step of a small model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusionserve.engine.attention import AttentionBatch
from fusionserve.engine.decoder_layer import DecoderLayer
from fusionserve.engine.layer_stack import LayerStack
from fusionserve.engine.model_form import ModelForm
from fusionserve.engine.rotary_table import RotaryTable
from fusionserve.kernels.norms import normalize
from fusionserve.kernels.rotation import Angles


class DecoderModel:
    """Computes what the model computes whose form it has, with that model's modules.

    `max_context_tokens` is how many positions there are, and `dtype` the type of activations.
    """

    def __init__(self, form: ModelForm, max_context_tokens: int, dtype: torch.dtype) -> None:
        self._form = form
        rotations = list(dict.fromkeys(layer.rotation for layer in form.layers))
        device = form.norm.weight.device
        self._rotary = [
            RotaryTable(form.rotary, max_context_tokens, dtype, rotation, device) for rotation in rotations
        ]
        self.layers = [DecoderLayer(layer, rotations.index(layer.rotation)) for layer in form.layers]
        self._stack = LayerStack(self.layers)

    def logits(
        self, token_ids: Tensor, positions: Tensor, wanted: Tensor | None, batch: AttentionBatch
    ) -> Tensor:
        """token_ids and positions [num_tokens] -> [wanted, vocab]: of the tokens `wanted`, or of all."""
        x = self._embedded(token_ids, positions)
        angles = [table.angles(positions) for table in self._rotary]
        computed = self._stack.compute_(x, angles, batch)
        x = self._compute(x, angles, batch) if computed is None else computed
        if wanted is not None:
            x = x[wanted]
        return self._bounded(self._form.head(normalize(x, self._form.norm)))

    def _compute(self, x: Tensor, angles: Sequence[Angles], batch: AttentionBatch) -> Tensor:
        """The same layer by layer."""
        for layer in self.layers:
            x = layer.compute(x, angles, batch)
        return x

    def _embedded(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[num_tokens, hidden], in memory of its own."""
        form = self._form
        x: Tensor = form.embedding(token_ids)
        if form.embedding_scale != 1:
            x = x * form.embedding_scale
        return x if form.positions is None else x + form.positions.index_select(0, positions)

    def _bounded(self, logits: Tensor) -> Tensor:
        divisor, cap = self._form.divisor, self._form.cap
        if divisor != 1:
            logits = logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap
