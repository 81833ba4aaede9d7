"""Tiny random models of many architectures, saved as a user's checkpoint would be.

The weights are scaled so that attention matters and greedy output neither repeats itself nor stands at a near tie.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    CwmConfig,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    HeliumConfig,
    Jais2Config,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)
from transformers.pytorch_utils import Conv1D

VOCAB_SIZE = 160
CONTEXT = 96
WINDOW = 11  # of the models with sliding windows; most of a test's context lies outside

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_EXPERTS = {**_GROUPED, "num_hidden_layers": 2, "moe_intermediate_size": 32}
_WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {
    **_GROUPED,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "layer_types": _WINDOWED,
}


def _gpt2() -> PreTrainedConfig:
    """Its vocabulary does not divide into panels, as the real one's."""
    names = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
    return GPT2Config(
        vocab_size=VOCAB_SIZE + 1, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False, **names
    )


def _opt() -> PreTrainedConfig:
    return OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=64)


def _granite() -> PreTrainedConfig:
    multipliers = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 1.5}
    return GraniteConfig(**_GROUPED, **multipliers, attention_multiplier=0.4)


def _phi3() -> PreTrainedConfig:
    """Of a head, some numbers are turned, as in Phi 4 mini."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    return Phi3Config(**_GROUPED, sliding_window=WINDOW, rope_parameters=rope)


def _deepseek_v3() -> PreTrainedConfig:
    """Latent attention: values are narrower than keys."""
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16}
    dims = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    sizes = {**_EXPERTS, "num_key_value_heads": 4, "first_k_dense_replace": 1}
    return DeepseekV3Config(**sizes, **latent, **dims, **experts)


def _qwen2_moe() -> PreTrainedConfig:
    """One expert is everybody's."""
    return Qwen2MoeConfig(
        **_EXPERTS, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=48
    )


def _granitemoe() -> PreTrainedConfig:
    multipliers = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 1.5}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return GraniteMoeConfig(**_GROUPED, **multipliers, **experts, attention_multiplier=0.4)


def _glm4_moe() -> PreTrainedConfig:
    """The first layer is dense."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    return Glm4MoeConfig(**_EXPERTS, **experts, first_k_dense_replace=1, use_qk_norm=True, head_dim=16)


def _ernie4_5_moe() -> PreTrainedConfig:
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1}
    return Ernie4_5_MoeConfig(**_EXPERTS, **experts)


def _gpt_oss() -> PreTrainedConfig:
    """Attention has sinks."""
    sizes = {**_GROUPED, "num_hidden_layers": 2, "intermediate_size": 32, "head_dim": 16}
    types = ["sliding_attention", "full_attention"]
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssConfig(**sizes, **experts, sliding_window=WINDOW, layer_types=types)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**{**_GROUPED, "intermediate_size": 58}, head_dim=16),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "deepseek_v3": _deepseek_v3,
    "gemma": lambda: GemmaConfig(**_GROUPED, head_dim=16),
    "gemma2": lambda: Gemma2Config(**_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=30.0),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES),
    "gpt_neox_serial": lambda: GPTNeoXConfig(**_SIZES, use_parallel_residual=False, attention_bias=False),
    "gpt2": _gpt2,
    "phi": lambda: PhiConfig(**_SIZES),
    "phi3": _phi3,
    "opt": _opt,
    "stablelm": lambda: StableLmConfig(**_GROUPED, use_qkv_bias=True),
    "stablelm_parallel": lambda: StableLmConfig(**_GROUPED, use_parallel_residual=True),
    "starcoder2": lambda: Starcoder2Config(**_GROUPED, sliding_window=WINDOW),
    "nemotron": lambda: NemotronConfig(**_GROUPED, head_dim=16),
    "arcee": lambda: ArceeConfig(**_GROUPED, head_dim=16),
    "seed_oss": lambda: SeedOssConfig(**_GROUPED, head_dim=16),
    "ministral": lambda: MinistralConfig(
        **_GROUPED, head_dim=16, sliding_window=WINDOW, layer_types=_WINDOWED
    ),
    "cwm": lambda: CwmConfig(**_GROUPED, head_dim=16, sliding_window=WINDOW, layer_types=_WINDOWED),
    "jais2": lambda: Jais2Config(**_GROUPED, head_dim=16),
    "glm": lambda: GlmConfig(**_GROUPED, head_dim=16, attention_bias=True),
    "glm4": lambda: Glm4Config(**_GROUPED, head_dim=16),
    "ernie4_5": lambda: Ernie4_5Config(**_GROUPED, head_dim=16),
    "helium": lambda: HeliumConfig(**_GROUPED, head_dim=16),
    "cohere": lambda: CohereConfig(**_GROUPED, logit_scale=0.4),
    "cohere2": lambda: Cohere2Config(
        **_GROUPED, sliding_window=WINDOW, layer_types=_WINDOWED, logit_scale=0.4
    ),
    "exaone4": lambda: Exaone4Config(**_GROUPED, sliding_window=WINDOW, layer_types=_WINDOWED),
    "exaone4_full": lambda: Exaone4Config(
        **_GROUPED, sliding_window=None, layer_types=["full_attention"] * 3
    ),
    "olmo": lambda: OlmoConfig(**_GROUPED),
    "olmo2": lambda: Olmo2Config(**_GROUPED),
    "olmo3": lambda: Olmo3Config(**_GROUPED, sliding_window=WINDOW, layer_types=_WINDOWED),
    "smollm3": lambda: SmolLM3Config(**_GROUPED, no_rope_layers=[1, 0, 1]),
    "granite": _granite,
    "qwen3_moe": lambda: Qwen3MoeConfig(**_EXPERTS, head_dim=12, num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _qwen2_moe,
    "olmoe": lambda: OlmoeConfig(**_GROUPED, num_experts=4, num_experts_per_tok=2),
    "granitemoe": _granitemoe,
    "glm4_moe": _glm4_moe,
    "ernie4_5_moe": _ernie4_5_moe,
    "gpt_oss": _gpt_oss,
    "mixtral": lambda: MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
}


# Those that the engine computes by a decoder of its own, natively in one call.
FAMILIES = {
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3", "arcee", "seed_oss"),
    *("gemma", "gemma2", "gemma3", "olmo", "olmo2", "olmo3", "nemotron", "starcoder2", "phi", "gpt2", "opt"),
    *("gpt_neox", "gpt_neox_serial", "stablelm", "stablelm_parallel", "jais2", "ministral", "cwm"),
    *("glm", "glm4", "ernie4_5", "helium", "cohere", "cohere2", "exaone4", "exaone4_full"),
}
# So are these, but not in one native call.
MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe", "ernie4_5_moe"}
_SEED = 2
# The models of the usual one come near a tie, or repeat themselves.
_SEEDS = {"phi": 3, "gpt_neox_serial": 3, "qwen3": 3, "cohere": 4}


def make_tiny_model(config: PreTrainedConfig, *, seed: int = _SEED) -> PreTrainedModel:
    """A model of `config` with lively seeded weights, in float32."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _enliven(model)
    return model.eval()


def save_tiny_model(architecture: str, directory: Path) -> Path:
    """Saves the tiny model of CONFIGS[architecture]; there are no tokenizer files."""
    make_tiny_model(CONFIGS[architecture](), seed=_SEEDS.get(architecture, _SEED)).save_pretrained(directory)
    return directory


@torch.no_grad()
def _enliven(model: PreTrainedModel) -> None:
    """Small embeddings and strong products, so that context decides; norms and biases that are not trivial."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn_like(parameter)
            if isinstance(module, nn.Embedding):
                parameter.copy_(noise * 0.3)
            elif parameter.dim() >= 2:
                d_in = parameter.shape[0 if isinstance(module, Conv1D) else -1]
                parameter.copy_(noise * 2.5 * d_in**-0.5)
            elif name == "bias":
                parameter.copy_(noise * 0.1)
            else:  # a norm's weight; larger ones on queries and keys make attention choose
                parameter.add_(noise * 0.1 + (0.8 if path.endswith(("q_norm", "k_norm")) else 0.0))
