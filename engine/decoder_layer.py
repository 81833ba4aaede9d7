"""Decoder layers of the Llama family in few, large steps: same weights, same result, a fifth of the operations.

    h = x + O attention(rotate(Q n1), rotate(K n1), V n1)      n1 = rms_norm(x)
    y = h + down(silu(gate n2) * up n2)                        n2 = rms_norm(h)

Queries, keys and values are one product, gate and up another; a residual is added by the product before it. Layers of
other architectures stay as transformers computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from fusionserve.adapters.adapted_linear import AdaptedLinear, Projections
from fusionserve.engine.attention import AttentionBatch
from fusionserve.kernels.paged_attention import AttentionOptions
from fusionserve.kernels.pointwise import rms_norm, silu_product

# Architectures by the class of their layers: how to tell the sliding window from the attention module.
_WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: getattr(attention.config, "sliding_window", None),
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
    "Qwen3DecoderLayer": lambda attention: attention.sliding_window,
}


def install_decoder_layers(model: PreTrainedModel) -> int:
    """Puts a DecoderLayer in place of every layer that one can stand in for; returns how many.

    Call it once the linear modules are adapted ones.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return 0
    fitting = [index for index, layer in enumerate(layers) if _fits(layer)]
    for index in fitting:
        layers[index] = DecoderLayer(layers[index])
    return len(fitting)


class DecoderLayer(nn.Module):
    """Computes what the layer of transformers it is made from computes, and keeps its modules under their names."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        source: Any = layer
        self.input_layernorm = source.input_layernorm
        self.self_attn = source.self_attn
        self.post_attention_layernorm = source.post_attention_layernorm
        self.mlp = source.mlp
        attention, mlp = source.self_attn, source.mlp
        self._queries_keys_values = Projections([attention.q_proj, attention.k_proj, attention.v_proj])
        self._attention_output = Projections([attention.o_proj])
        self._gate_and_up = Projections([mlp.gate_proj, mlp.up_proj])
        self._down = Projections([mlp.down_proj])
        self._options = AttentionOptions(attention.scaling, _WINDOWS[type(layer).__name__](attention))
        self._head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_batch: AttentionBatch,
        **_: object,
    ) -> Tensor:
        """hidden_states [1, num_tokens, hidden] -> that shape; position_embeddings cos, sin [1, num_tokens, dim]."""
        x = hidden_states[0]
        attended = self._attend(_norm(self.input_layernorm, x), position_embeddings, attention_batch)
        x = self._attention_output.add_(attended, x)
        gate, up = self._gate_and_up(_norm(self.post_attention_layernorm, x))
        return self._down.add_(silu_product(gate, up), x)[None]

    def _attend(self, x: Tensor, angles: tuple[Tensor, Tensor], batch: AttentionBatch) -> Tensor:
        dim = self.self_attn.head_dim
        query, key, value = (y.view(len(y), -1, dim) for y in self._queries_keys_values(x))
        query, key = (
            heads if norm is None else _norm(norm, heads)
            for norm, heads in zip(self._head_norms, (query, key), strict=True)
        )
        cos, sin = angles
        attended = batch.rotate_and_attend(
            self.self_attn, (query, key, value), (cos[0], sin[0]), self._options
        )
        return attended.view(len(x), -1)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    module: Any = norm
    return rms_norm(x, module.weight, module.variance_epsilon)


def _fits(layer: nn.Module) -> bool:
    """True for the layers of a known class that were not configured to be anything else."""
    if type(layer).__name__ not in _WINDOWS or type(layer).__module__.split(".")[0] != "transformers":
        return False
    source: Any = layer
    attention, mlp = source.self_attn, source.mlp
    linear = (
        *(getattr(attention, f"{name}_proj") for name in "qkvo"),
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    )
    is_adapted = all(isinstance(module, AdaptedLinear) for module in linear)
    return is_adapted and isinstance(mlp.act_fn, SiLUActivation | nn.SiLU)
