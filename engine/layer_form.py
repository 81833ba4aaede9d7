"""What the decoder layers of known architectures are made of, read from transformers' modules.

    h = x + norm(O attention(rotate(Q n), rotate(K n), V n))      n = norm(x)
    y = h + norm(mlp(m))                                          m = norm(h)

    mlp(m) = down(activation(gate m) * up m), or a mixture of experts, which transformers routes

Families differ in which of the norms they have, in what a norm rounds, and in a few numbers. A layer that is configured
to be anything else has no form, and its model stays as transformers computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers.activations import GELUTanh, SiLUActivation

from fusionserve.adapters.adapted_linear import AdaptedLinear
from fusionserve.kernels.native_layer import LayerNorms, LayerSettings
from fusionserve.kernels.paged_attention import AttentionOptions
from fusionserve.kernels.pointwise import Activation, RMSNorm

NO_ROTATION = "none"

ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.SiLU: Activation.SILU,
    SiLUActivation: Activation.SILU,
    GELUTanh: Activation.GELU_TANH,
}
# Norms whose weight multiplies before anything is rounded, by what is added to it first.
_WIDE_NORMS = {
    "GemmaRMSNorm": 1.0,
    "Gemma2RMSNorm": 1.0,
    "Gemma3RMSNorm": 1.0,
    "Olmo2RMSNorm": 0.0,
    "Olmo3RMSNorm": 0.0,
}

# Where the norms of a layer are, by the names of its modules.
_BEFORE = {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
_AFTER = {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"}
_BEFORE_AND_AFTER = {
    **_AFTER,
    "before_attention": "input_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
}


# How to read the layers of a family: where its norms are.
_FAMILIES: dict[str, Mapping[str, str]] = {
    **{
        f"{family}DecoderLayer": _BEFORE
        for family in (
            *("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Granite", "Phi3", "Gemma"),
            *("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe"),
        )
    },
    **{f"{family}DecoderLayer": _BEFORE_AND_AFTER for family in ("Gemma2", "Gemma3")},
    **{f"{family}DecoderLayer": _AFTER for family in ("Olmo2", "Olmo3")},
}
_WITH_ROTATIONS = {"Gemma3DecoderLayer", "Olmo3DecoderLayer"}  # one for each type of layer
_MIXTURES = {f"{family}SparseMoeBlock" for family in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe")}


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedMLP:
    """down(activation(gate x) * up x)"""

    gate_and_up: tuple[AdaptedLinear, ...]  # or one module of both
    down: AdaptedLinear
    activation: Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForm:
    """The modules of a layer, and what they do not say themselves."""

    attention: nn.Module  # the cache of keys and values is its
    heads: tuple[AdaptedLinear, ...]  # queries, keys and values, or one module of all
    output: AdaptedLinear
    mlp: GatedMLP | nn.Module  # a module: of a mixture of experts, [1, num_tokens, hidden] -> that shape
    settings: LayerSettings
    rotation: str  # which of the model's: "", a type of layer, or NO_ROTATION


def layer_form(layer: nn.Module, options: Mapping[nn.Module, AttentionOptions]) -> LayerForm | None:
    """The form of a transformers layer, or None. Its linear modules must be adapted ones by now.

    `options` are those that the model's attention modules attend with.
    """
    name, source = type(layer).__name__, cast(Any, layer)
    if name not in _FAMILIES or not is_of_transformers(layer):
        return None
    attention, mlp, config = source.self_attn, _read_mlp(source.mlp), source.self_attn.config
    heads = _modules(attention, "qkv_proj") or _modules(attention, "q_proj", "k_proj", "v_proj")
    clips = getattr(config, "clip_qkv", None) is not None  # OLMoE's, where it is set
    if mlp is None or clips or not _are_adapted(*heads, attention.o_proj):
        return None
    settings = LayerSettings(
        norms=_norms(source, _FAMILIES[name]),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        options=options[attention],
        residual_scale=getattr(source, "residual_multiplier", 1.0),
    )
    return LayerForm(
        attention=attention,
        heads=heads,
        output=attention.o_proj,
        mlp=mlp,
        settings=settings,
        rotation=_rotation(attention, has_several=name in _WITH_ROTATIONS),
    )


def read_norm(module: Any) -> RMSNorm:
    """A norm of one of the families."""
    epsilon = _first_of(module, "variance_epsilon", "eps")
    added = _WIDE_NORMS.get(type(module).__name__)
    return RMSNorm(module.weight if added is None else module.weight.detach().float() + added, epsilon)


def _read_mlp(mlp: Any) -> GatedMLP | nn.Module | None:
    if type(mlp).__name__ in _MIXTURES:
        mixture: nn.Module = mlp
        return mixture
    activation = ACTIVATIONS.get(type(_first_of(mlp, "act_fn", "activation_fn")))
    gate_and_up = _modules(mlp, "gate_up_proj") or _modules(mlp, "gate_proj", "up_proj")
    if activation is None or not _are_adapted(*gate_and_up, mlp.down_proj):
        return None
    return GatedMLP(gate_and_up=gate_and_up, down=mlp.down_proj, activation=activation)


def _are_adapted(*modules: Any) -> bool:
    return all(isinstance(module, AdaptedLinear) for module in modules)


def _norms(layer: Any, names: Mapping[str, str]) -> LayerNorms:
    places = {place: read_norm(getattr(layer, name)) for place, name in names.items()}
    attention = layer.self_attn
    own = {"query": getattr(attention, "q_norm", None), "key": getattr(attention, "k_norm", None)}
    return LayerNorms(**places, **{name: read_norm(norm) for name, norm in own.items() if norm is not None})


def _rotation(attention: Any, *, has_several: bool) -> str:
    if not getattr(attention, "use_rope", True):
        return NO_ROTATION
    return attention.config.layer_types[attention.layer_idx] if has_several else ""


def _modules(owner: Any, *names: str) -> tuple[Any, ...]:
    """The modules of these names, or none if there is not the first."""
    return tuple(getattr(owner, name) for name in names) if hasattr(owner, names[0]) else ()


def _first_of(module: Any, *names: str) -> Any:
    """The first attribute that there is."""
    return next(getattr(module, name) for name in names if hasattr(module, name))


def is_of_transformers(module: nn.Module) -> bool:
    """True for a module of that library's own, not of a class that has taken its name."""
    return type(module).__module__.split(".")[0] == "transformers"
