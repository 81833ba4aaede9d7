"""What the decoder layers of known architectures are made of, read from transformers' modules.

    h = x + norm(O attention(rotate(Q n), rotate(K n), V n))      n = norm(x)
    y = h + norm(mlp(m))                                          m = norm(h), or norm(x) where both run in parallel

    mlp(m) = down(activation(gate m) * up m), or without a gate down(activation(up m)),
             or a mixture of experts, which transformers routes

Families (`layer_families.py`) differ in which of the norms they have, in what a norm rounds, and in a few numbers. A
layer that is configured to be anything else has no form, and its model stays as transformers computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from fusionserve.adapters.adapted_linear import AdaptedLinear
from fusionserve.engine import layer_families as families
from fusionserve.engine.layer_families import Family, Rotates
from fusionserve.kernels.native_layer import LayerNorms, LayerSettings, MLPSettings
from fusionserve.kernels.norms import LayerNorm, Norm, RMSNorm
from fusionserve.kernels.paged_attention import AttentionOptions


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
    attention, mlp = first_of(source, families.ATTENTION), _read_mlp(_mlp_of(source))
    heads, output = _modules(attention, families.HEADS), first_of(attention, families.OUTPUT)
    if mlp is None or _is_unusual(source, attention) or not _are_adapted(*heads, output):
        return None
    return LayerForm(
        attention=attention,
        heads=heads,
        output=output,
        mlp=mlp,
        settings=_settings(source, attention, family, options[attention]),
        rotation=_rotation(family, attention, options[attention]),
    )


def _settings(layer: Any, attention: Any, family: Family, options: AttentionOptions) -> LayerSettings:
    config = attention.config
    num_kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    if family.scales_queries:
        options = replace(options, softmax_scale=options.softmax_scale * attention.scaling)
    return LayerSettings(
        norms=_norms(layer, attention, families.BEFORE_BOTH if _has_one_norm(layer) else family.norms),
        num_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=first_of(attention, families.HEAD_DIM),
        options=options,
        is_parallel=family.is_parallel or getattr(layer, "use_parallel_residual", False),
        head_groups=num_kv_heads if family.has_heads_in_turn else 1,
        residual_scale=getattr(layer, "residual_multiplier", 1.0),
    )


def read_norm(module: Any, device: torch.device) -> Norm:
    """A norm of one of the families, for activations on a device."""
    name = type(module).__name__
    if name in families.LAYER_NORMS:
        return _read_layer_norm(module, families.LAYER_NORMS[name], device)
    epsilon, added = first_of(module, families.EPSILON), families.WIDE_NORMS.get(name)
    return RMSNorm(module.weight if added is None else module.weight.detach().float() + added, epsilon)


def _read_layer_norm(module: Any, added: float, device: torch.device) -> LayerNorm:
    """With a weight and a bias where it has none, as OLMo's."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    width = module.normalized_shape if weight is None else weight.shape
    wide_weight = torch.ones(width, device=device) if weight is None else weight.detach().float() + added
    wide_bias = torch.zeros(width, device=device) if bias is None else bias.detach().float()
    is_olmo = not any(hasattr(module, name) for name in families.EPSILON)
    epsilon = families.OLMO_EPSILON if is_olmo else first_of(module, families.EPSILON)
    return LayerNorm(wide_weight, wide_bias, epsilon)


def _family_of(layer: nn.Module) -> Family | None:
    name = type(layer).__name__
    family = next((name.removesuffix(suffix) for suffix in families.LAYER if name.endswith(suffix)), "")
    return families.FAMILIES.get(family) if is_of_transformers(layer) else None


def _is_unusual(layer: Any, attention: Any) -> bool:
    """True if it is configured to what none of the forms has."""
    clips = getattr(attention.config, "clip_qkv", None) is not None  # OLMo's
    norms_sums = not getattr(layer, "do_layer_norm_before", True)  # OPT's
    norms_each_head = getattr(attention, "qk_layernorm", False)  # StableLM's and Phi's
    query_norm = getattr(attention, "q_norm", None)
    has_norms_of_heads = query_norm is not None and query_norm.weight.dim() > 1  # Cohere's
    return clips or norms_sums or norms_each_head or has_norms_of_heads


def _has_one_norm(layer: Any) -> bool:
    """True for StableLM's parallel layers, which have no other."""
    return getattr(layer, "post_attention_layernorm", layer) is None


def _mlp_of(layer: Any) -> Any:
    return next((getattr(layer, name) for name in families.MLP if hasattr(layer, name)), layer)


def _read_mlp(mlp: Any) -> DenseMLP | nn.Module | None:
    if type(mlp).__name__ in families.MIXTURES:
        mixture: nn.Module = mlp
        return mixture
    activation = families.ACTIVATIONS.get(type(first_of(mlp, families.ACTIVATION)))
    pair, down = _modules(mlp, families.GATE_AND_UP), first_of(mlp, families.DOWN)
    inner = pair or _modules(mlp, families.UP)
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


def _rotation(family: Family, attention: Any, options: AttentionOptions) -> RotaryForm | None:
    if family.rotates is Rotates.NONE or not getattr(attention, "use_rope", True):
        return None
    if family.rotates is Rotates.WINDOWED and attention.config.sliding_window and not options.sliding_window:
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
