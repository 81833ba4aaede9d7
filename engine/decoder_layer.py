"""Decoder layers of the Llama family in few, large steps: same weights, same result, a fifth of the operations or less.

    h = x + O attention(rotate(Q n1), rotate(K n1), V n1)      n1 = rms_norm(x)
    y = h + down(silu(gate n2) * up n2)                        n2 = rms_norm(h)

Where native kernels do all of it, a layer is one call, or all layers are (`layer_stack.py`). Else queries, keys and
values are one product, gate and up another, and a residual is added by the product before it. That is also how adapters
are served that say more than rank rows in segments. Layers of other architectures stay as transformers computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from fusionserve.adapters.adapted_linear import AdaptedLinear, Projections
from fusionserve.engine.attention import AttentionBatch
from fusionserve.engine.layer_stack import LayerStack
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_layer import LayerNorm, LayerParts, NativeLayer
from fusionserve.kernels.paged_attention import AttentionOptions
from fusionserve.kernels.pointwise import rms_norm, silu_product

# Architectures by the class of their layers: how to tell the sliding window from the attention module.
_WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: getattr(attention.config, "sliding_window", None),
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
    "Qwen3DecoderLayer": lambda attention: attention.sliding_window,
}


def install_decoder_layers(model: PreTrainedModel) -> list[DecoderLayer]:
    """Puts a DecoderLayer in place of every layer that one can stand in for; returns them, in order.

    Call it once the linear modules are adapted ones.
    """
    base: Any = model.base_model
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return []
    own = {index: DecoderLayer(layer) for index, layer in enumerate(layers) if _fits(layer)}
    for index, layer in own.items():
        layers[index] = layer
    return list(own.values())


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
        self.groups = (self._queries_keys_values, self._attention_output, self._gate_and_up, self._down)
        self.cell = attention.q_proj.cell
        self._options = AttentionOptions(attention.scaling, _WINDOWS[type(layer).__name__](attention))
        self._input_norm, self._inner_norm = _norm(self.input_layernorm), _norm(self.post_attention_layernorm)
        query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self._query_norm = None if query_norm is None else _norm(query_norm)
        self._key_norm = None if key_norm is None else _norm(key_norm)
        self._alone = LayerStack([self])

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_batch: AttentionBatch,
        **_: object,
    ) -> Tensor:
        """hidden_states [1, num_tokens, hidden] -> that shape, maybe that memory; cos, sin [1, num_tokens, dim]."""
        cos, sin = position_embeddings
        return self.compute(hidden_states[0], (cos[0], sin[0]), attention_batch)[None]

    def compute(self, x: Tensor, angles: tuple[Tensor, Tensor], batch: AttentionBatch) -> Tensor:
        """x [num_tokens, hidden] -> that shape, maybe that memory; `angles` are cos and sin [num_tokens, dim]."""
        if self._alone.compute_(x, angles, batch):
            return x
        attended = self._attend(_normalized(self._input_norm, x), angles, batch)
        x = self._attention_output.add_(attended, x)
        gate, up = self._gate_and_up(_normalized(self._inner_norm, x))
        return self._down.add_(silu_product(gate, up), x)

    def cache_in(self, batch: AttentionBatch) -> LayerCache:
        """The layer's keys and values."""
        return batch.cache_of(self.self_attn)

    def native_layer(self, cache: LayerCache) -> NativeLayer | None:
        """The layer over a cache in one kernel, or None where there is none for all of it."""
        parts = self._parts()
        can_compute = parts is not None and NativeLayer.can_compute(parts, cache.keys)
        return NativeLayer(parts, cache) if parts and can_compute else None

    def _parts(self) -> LayerParts | None:
        qkv, output, gate_and_up, down = (group.product for group in self.groups)
        if qkv is None or output is None or gate_and_up is None or down is None:
            return None
        return LayerParts(
            products=(qkv, output, gate_and_up, down),
            input_norm=self._input_norm,
            inner_norm=self._inner_norm,
            query_norm=self._query_norm,
            key_norm=self._key_norm,
            head_dim=self.self_attn.head_dim,
            options=self._options,
        )

    def _attend(self, x: Tensor, angles: tuple[Tensor, Tensor], batch: AttentionBatch) -> Tensor:
        dim = self.self_attn.head_dim
        query, key, value = (y.view(len(y), -1, dim) for y in self._queries_keys_values(x))
        if self._query_norm is not None:
            query = _normalized(self._query_norm, query)
        if self._key_norm is not None:
            key = _normalized(self._key_norm, key)
        attended = batch.rotate_and_attend(self.self_attn, (query, key, value), angles, self._options)
        return attended.view(len(x), -1)


def _norm(module: Any) -> LayerNorm:
    return LayerNorm(module.weight, module.variance_epsilon)


def _normalized(norm: LayerNorm, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, norm.epsilon)


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
