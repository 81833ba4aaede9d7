"""How to read the decoder layers of the families that transformers has, by the names of its classes and modules.

A family goes by its name before `DecoderLayer`, `Layer` or `Block`. What is written here is tried out at every start
(`decoder_check.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from torch import nn
from transformers.activations import (
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    ReLUSquaredActivation,
    SiLUActivation,
)

from fusionserve.kernels.activations import Activation

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
WIDE_NORMS = {
    "GemmaRMSNorm": 1.0,
    "Gemma2RMSNorm": 1.0,
    "Gemma3RMSNorm": 1.0,
    "Olmo2RMSNorm": 0.0,
    "Olmo3RMSNorm": 0.0,
    "HeliumRMSNorm": 0.0,
}
# LayerNorms, by what is added to their weight first.
LAYER_NORMS = {
    **dict.fromkeys(("LayerNorm", "OlmoLayerNorm", "CohereLayerNorm", "Cohere2LayerNorm"), 0.0),
    "NemotronLayerNorm1P": 1.0,
}
OLMO_EPSILON = 1e-5  # its module does not say

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
BEFORE_BOTH = {"before_attention": "input_layernorm", "before_mlp": "input_layernorm"}


class Rotates(Enum):
    """Which layers of a family turn queries and keys."""

    ALL = "all that do not say otherwise"
    WINDOWED = "those with a sliding window, or all if none has one"
    NONE = "none: positions are learned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to read the layers of a family."""

    norms: Mapping[str, str]
    rotates: Rotates = Rotates.ALL
    has_rotations: bool = False  # one for each type of layer
    by_neighbours: bool = False  # pairs of a head's numbers that are turned are neighbours
    has_neighbours: bool = False  # and so are the angles
    is_parallel: bool = False  # in every configuration
    has_heads_in_turn: bool = False  # one module's outputs are query, key and value of each head
    scales_queries: bool = False  # before they attend, with a scale of one


_LLAMA = Family(norms=_BEFORE)
_COHERE = Family(norms=BEFORE_BOTH, is_parallel=True, by_neighbours=True, has_neighbours=True)
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Granite", "Phi3", "Gemma"), _LLAMA),
    **dict.fromkeys(("Ministral", "Cwm", "SeedOss", "Arcee"), _LLAMA),
    **dict.fromkeys(("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GraniteMoe", "Glm4Moe"), _LLAMA),
    **dict.fromkeys(("Olmo", "StableLm", "Starcoder2", "Nemotron", "Jais2"), _LLAMA),  # with other norms
    **dict.fromkeys(("Glm", "Ernie4_5", "Ernie4_5_Moe", "Helium"), Family(norms=_BEFORE, by_neighbours=True)),
    "Glm4": Family(norms=_GLM4, by_neighbours=True),
    "Cohere": _COHERE,
    "Cohere2": replace(_COHERE, rotates=Rotates.WINDOWED),
    "Gemma2": Family(norms=_BEFORE_AND_AFTER),
    "Gemma3": Family(norms=_BEFORE_AND_AFTER, has_rotations=True),
    "Olmo2": Family(norms=_AFTER),
    "Exaone4": Family(norms=_AFTER, rotates=Rotates.WINDOWED),
    "Olmo3": Family(norms=_AFTER, has_rotations=True),
    "Phi": Family(norms=BEFORE_BOTH, is_parallel=True),
    "GPTNeoX": Family(norms=_BEFORE, has_heads_in_turn=True),
    "GPT2": Family(norms={"before_attention": "ln_1", "before_mlp": "ln_2"}, rotates=Rotates.NONE),
    "OPT": Family(
        norms={"before_attention": "self_attn_layer_norm", "before_mlp": "final_layer_norm"},
        rotates=Rotates.NONE,
        scales_queries=True,
    ),
}
MIXTURES = {
    *(f"{family}SparseMoeBlock" for family in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "Ernie4_5_Moe")),
    *("GraniteMoeMoE", "Glm4MoeMoE"),
}

# The names that families have for the same modules, which may be one or several.
LAYER = ("DecoderLayer", "Layer", "Block")
ATTENTION = ("self_attn", "attention", "attn")
HEADS = (("qkv_proj",), ("query_key_value",), ("c_attn",), ("q_proj", "k_proj", "v_proj"))
HEAD_DIM = ("head_dim", "head_size")
OUTPUT = ("o_proj", "out_proj", "dense", "c_proj")
GATE_AND_UP = (("gate_up_proj",), ("gate_proj", "up_proj"))
UP = (("up_proj",), ("fc1",), ("c_fc",), ("dense_h_to_4h",))
DOWN = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")
MLP = ("mlp", "block_sparse_moe")  # or the layer itself has its modules
ACTIVATION = ("act_fn", "activation_fn", "act")
EPSILON = ("variance_epsilon", "eps")
