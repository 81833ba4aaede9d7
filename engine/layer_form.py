"""What the decoder layers of known architectures are made of, read from transformers' modules.

    h = x + norm(O attention(rotate(Q n), rotate(K n), V n))      n = norm(x)
    y = h + norm(mlp(m))                                          m = norm(h), or norm(x) where both run in parallel

    mlp(m) = down(activation(gate m) * up m), or without a gate down(activation(up m)),
             or a mixture of experts, which transformers routes

Families differ in which of the norms they have, in what a norm rounds, and in a few numbers. A layer that is configured
to be anything else has no form, and its model stays as transformers computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, cast

import torch
from torch import nn
from transformers.activations import (
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    ReLUSquaredActivation,
    SiLUActivation,
)

from fusionserve.adapters.adapted_linear import AdaptedLinear
from fusionserve.kernels.activations import Activation
from fusionserve.kernels.native_layer import LayerNorms, LayerSettings, MLPSettings
from fusionserve.kernels.norms import LayerNorm, Norm, RMSNorm
from fusionserve.kernels.paged_attention import AttentionOptions

ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.SiLU: Activation.SILU,
    SiLUActivation: Activation.SILU,
    GELUTanh: Activation.GELU_TANH,
    NewGELUActivation: Activation.GELU_TANH,
    GELUActivation: Activation.GELU,
    nn.ReLU: Activation.RELU,
    ReLUSquaredActivation: Activation.RELU_SQUARED,
}
# RMSNorms whose weight multiplies before anything is rounded, by what is added to it first.
_WIDE_NORMS = {
    "GemmaRMSNorm": 1.0,
    "Gemma2RMSNorm": 1.0,
    "Gemma3RMSNorm": 1.0,
    "Olmo2RMSNorm": 0.0,
    "Olmo3RMSNorm": 0.0,
    "HeliumRMSNorm": 0.0,
}
# LayerNorms, by what is added to their weight first.
_LAYER_NORMS = {
    **dict.fromkeys(("LayerNorm", "OlmoLayerNorm", "CohereLayerNorm", "Cohere2LayerNorm"), 0.0),
    "NemotronLayerNorm1P": 1.0,
}
_OLMO_EPSILON = 1e-5  # its module does not say

# Where the norms of a layer are, by the names of its modules.
_BEFORE = {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
_AFTER = {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"}
_BEFORE_AND_AFTER = {
    **_AFTER,
    "before_attention": "input_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
}
_GLM4 = {
    **_BEFORE,
    "after_attention": "post_self_attn_layernorm",
    "after_mlp": "post_mlp_layernorm",
}
_BEFORE_BOTH = {"before_attention": "input_layernorm", "before_mlp": "input_layernorm"}


class Rotates(Enum):
    """Which layers of a family turn queries and keys."""

    ALL = "all that do not say otherwise"
    WINDOWED = "those with a sliding window"
    NONE = "none: positions are learned"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """How to read the layers of a family."""

    norms: Mapping[str, str]
    rotates: Rotates = Rotates.ALL
    has_rotations: bool = False  # one for each type of layer
    by_neighbours: bool = False
    has_neighbours: bool = False
    is_parallel: bool = False  # in every configuration
    has_heads_in_turn: bool = False  # one module's outputs are query, key and value of each head
    scales_queries: bool = False  # before they attend, with a scale of one


_LLAMA = _Family(norms=_BEFORE)
_COHERE = _Family(norms=_BEFORE_BOTH, is_parallel=True, by_neighbours=True, has_neighbours=True)
_FAMILIES: dict[str, _Family] = {
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Granite", "Phi3", "Gemma"), _LLAMA),
    **dict.fromkeys(("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "SeedOss", "Arcee"), _LLAMA),
    **dict.fromkeys(("Ministral", "Cwm"), _LLAMA),
    **dict.fromkeys(("Olmo", "StableLm", "Starcoder2", "Nemotron", "Jais2"), _LLAMA),  # with other norms
    **dict.fromkeys(("Glm", "Ernie4_5", "Helium"), _Family(norms=_BEFORE, by_neighbours=True)),
    "Glm4": _Family(norms=_GLM4, by_neighbours=True),
    "Cohere": _COHERE,
    "Cohere2": replace(_COHERE, rotates=Rotates.WINDOWED),
    "Gemma2": _Family(norms=_BEFORE_AND_AFTER),
    "Gemma3": _Family(norms=_BEFORE_AND_AFTER, has_rotations=True),
    "Olmo2": _Family(norms=_AFTER),
    "Olmo3": _Family(norms=_AFTER, has_rotations=True),
    "Phi": _Family(norms=_BEFORE_BOTH, is_parallel=True),
    "GPTNeoX": _Family(norms=_BEFORE, has_heads_in_turn=True),
    "GPT2": _Family(norms={"before_attention": "ln_1", "before_mlp": "ln_2"}, rotates=Rotates.NONE),
    "OPT": _Family(
        norms={"before_attention": "self_attn_layer_norm", "before_mlp": "final_layer_norm"},
        rotates=Rotates.NONE,
        scales_queries=True,
    ),
}
_MIXTURES = {f"{family}SparseMoeBlock" for family in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe")}

# The names that families have for the same modules, which may be one or several.
_LAYER = ("DecoderLayer", "Layer", "Block")
_ATTENTION = ("self_attn", "attention", "attn")
_HEADS = (("qkv_proj",), ("query_key_value",), ("c_attn",), ("q_proj", "k_proj", "v_proj"))
_HEAD_DIM = ("head_dim", "head_size")
_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
_GATE_AND_UP = (("gate_up_proj",), ("gate_proj", "up_proj"))
_UP = (("up_proj",), ("fc1",), ("c_fc",), ("dense_h_to_4h",))
_DOWN = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")
_ACTIVATION = ("act_fn", "activation_fn", "act")
_EPSILON = ("variance_epsilon", "eps")


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryForm:
    """Which of a model's rotations it is, and what it turns."""

    layer_type: str  # of a model with one for each; else ""
    by_neighbours: bool  # pairs of a head's numbers are neighbours; else counterparts in halves
    has_neighbours: bool  # so are the angles that the model computes


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMLP:
    """down(activation(gate x) * up x), or down(activation(up x))."""

    inner: tuple[AdaptedLinear, ...]  # gate and up, or one module of both; or up alone
    down: AdaptedLinear
    settings: MLPSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForm:
    """The modules of a layer, and what they do not say themselves."""

    attention: nn.Module  # the cache of keys and values is its
    heads: tuple[AdaptedLinear, ...]  # queries, keys and values, or one module of all
    output: AdaptedLinear
    mlp: DenseMLP | nn.Module  # a module: of a mixture of experts, [1, num_tokens, hidden] -> that shape
    settings: LayerSettings
    rotation: RotaryForm | None  # None: it turns nothing


def layer_form(layer: nn.Module, options: Mapping[nn.Module, AttentionOptions]) -> LayerForm | None:
    """The form of a transformers layer, or None. Its linear modules must be adapted ones by now.

    `options` are those that the model's attention modules attend with.
    """
    family, source = _family_of(layer), cast(Any, layer)
    if family is None:
        return None
    attention = first_of(source, _ATTENTION)
    config, heads, output = attention.config, _modules(attention, _HEADS), first_of(attention, _OUTPUT)
    mlp = _read_mlp(getattr(source, "mlp", source))
    if mlp is None or _is_unusual(source, attention) or not _are_adapted(*heads, output):
        return None
    is_parallel = family.is_parallel or getattr(source, "use_parallel_residual", False)
    num_kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    own_options = options[attention]
    if family.scales_queries:
        own_options = replace(own_options, softmax_scale=own_options.softmax_scale * attention.scaling)
    settings = LayerSettings(
        norms=_norms(source, attention, _BEFORE_BOTH if _has_one_norm(source) else family.norms),
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=first_of(attention, _HEAD_DIM),
        options=own_options,
        is_parallel=is_parallel,
        head_groups=num_kv_heads if family.has_heads_in_turn else 1,
        residual_scale=getattr(source, "residual_multiplier", 1.0),
    )
    return LayerForm(
        attention=attention,
        heads=heads,
        output=output,
        mlp=mlp,
        settings=settings,
        rotation=_rotation(family, attention),
    )


def read_norm(module: Any, device: torch.device) -> Norm:
    """A norm of one of the families, for activations on a device."""
    name = type(module).__name__
    if name in _LAYER_NORMS:
        return _read_layer_norm(module, _LAYER_NORMS[name], device)
    epsilon, added = first_of(module, _EPSILON), _WIDE_NORMS.get(name)
    return RMSNorm(module.weight if added is None else module.weight.detach().float() + added, epsilon)


def _read_layer_norm(module: Any, added: float, device: torch.device) -> LayerNorm:
    """With a weight and a bias where it has none, as OLMo's."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    width = module.normalized_shape if weight is None else weight.shape
    wide_weight = torch.ones(width, device=device) if weight is None else weight.detach().float() + added
    wide_bias = torch.zeros(width, device=device) if bias is None else bias.detach().float()
    epsilon = next((getattr(module, name) for name in _EPSILON if hasattr(module, name)), _OLMO_EPSILON)
    return LayerNorm(wide_weight, wide_bias, epsilon)


def _family_of(layer: nn.Module) -> _Family | None:
    name = type(layer).__name__
    family = next((name.removesuffix(suffix) for suffix in _LAYER if name.endswith(suffix)), "")
    return _FAMILIES.get(family) if is_of_transformers(layer) else None


def _is_unusual(layer: Any, attention: Any) -> bool:
    """True if it is configured to what none of the forms has."""
    clips = getattr(attention.config, "clip_qkv", None) is not None  # OLMo's
    norms_sums = not getattr(layer, "do_layer_norm_before", True)  # OPT's
    norms_heads = any(
        getattr(attention, name, False) for name in ("qk_layernorm", "use_qk_norm")
    )  # each its own way
    return clips or norms_sums or norms_heads


def _has_one_norm(layer: Any) -> bool:
    """True for StableLM's parallel layers, which have no other."""
    return getattr(layer, "post_attention_layernorm", layer) is None


def _read_mlp(mlp: Any) -> DenseMLP | nn.Module | None:
    if type(mlp).__name__ in _MIXTURES:
        mixture: nn.Module = mlp
        return mixture
    activation = ACTIVATIONS.get(type(first_of(mlp, _ACTIVATION)))
    pair, down = _modules(mlp, _GATE_AND_UP), first_of(mlp, _DOWN)
    inner = pair or _modules(mlp, _UP)
    if activation is None or not _are_adapted(*inner, down):
        return None
    return DenseMLP(inner=inner, down=down, settings=MLPSettings(activation, is_gated=bool(pair)))


def _are_adapted(*modules: Any) -> bool:
    return all(isinstance(module, AdaptedLinear) for module in modules)


def _norms(layer: Any, attention: Any, names: Mapping[str, str]) -> LayerNorms:
    own = {"query": getattr(attention, "q_norm", None), "key": getattr(attention, "k_norm", None)}
    modules = {place: getattr(layer, name) for place, name in names.items()} | own
    device = next(layer.parameters()).device
    return LayerNorms(
        **{place: read_norm(norm, device) for place, norm in modules.items() if norm is not None}
    )


def _rotation(family: _Family, attention: Any) -> RotaryForm | None:
    is_left_out = family.rotates is Rotates.WINDOWED and attention.sliding_window is None
    if family.rotates is Rotates.NONE or is_left_out or not getattr(attention, "use_rope", True):
        return None
    return RotaryForm(
        layer_type=attention.config.layer_types[attention.layer_idx] if family.has_rotations else "",
        by_neighbours=family.by_neighbours,
        has_neighbours=family.has_neighbours,
    )


def _modules(owner: Any, choices: Sequence[tuple[str, ...]]) -> tuple[Any, ...]:
    """The modules of the first choice that there is, or none."""
    names = next((names for names in choices if hasattr(owner, names[0])), ())
    return tuple(getattr(owner, name) for name in names)


def first_of(owner: Any, names: Sequence[str]) -> Any:
    """The first attribute that there is."""
    return next(getattr(owner, name) for name in names if hasattr(owner, name))


def is_of_transformers(module: nn.Module) -> bool:
    """True for a module of that library's own, not of a class that has taken its name."""
    return type(module).__module__.split(".")[0] == "transformers"
