"""What a model's configuration says about serving it; a run of two short prompts cannot show these things.

A window or a chunk only matters where the context is longer, and so does a rotary embedding that changes with length.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedConfig

from fusionserve.errors import StartupError

_PLAIN_LAYERS = ("full_attention", "attention")


def check_config(config: PreTrainedConfig, max_context_tokens: int, max_step_tokens: int) -> None:
    """Raises StartupError for a model that cannot be served at this context length, whatever its weights.

    No step has more than `max_step_tokens`.
    """
    if config.is_encoder_decoder:
        raise _unsupported(config, "it is an encoder-decoder")
    text_config = config.get_text_config()
    for layer_type in set(getattr(text_config, "layer_types", None) or ()):
        if layer_type not in (*_PLAIN_LAYERS, "sliding_attention") and not _is_wide_chunk(
            text_config, layer_type, max_context_tokens
        ):
            raise _unsupported(
                config, f"it has {layer_type} layers, and only full and sliding-window attention are served"
            )
    if text_config.model_type == "olmoe" and _has_window(text_config, max_context_tokens):
        raise _unsupported(
            config, "its attention is told of a sliding window that its own mask does not have"
        )
    if _tunes_temperature(text_config, max(max_context_tokens, max_step_tokens)):
        raise _unsupported(
            config,
            "its attention changes with the place in a batch (attn_temperature_tuning) beyond floor_scale",
        )
    for original in _longrope_limits(text_config):
        if max_context_tokens > original:
            raise StartupError(
                f"the rotary embedding (longrope) of this model changes beyond {original} tokens, which would change "
                f"running requests: limit the context to {original}",
                reason="CONTEXT_TOO_LONG",
            )


def num_windowed_layers(config: PreTrainedConfig, num_layers: int, max_context_tokens: int) -> int:
    """How many of `num_layers` attention layers a sliding window keeps from seeing a full context."""
    text_config = config.get_text_config()
    if not _has_window(text_config, max_context_tokens):
        return 0
    layer_types = getattr(text_config, "layer_types", None)
    return list(layer_types).count("sliding_attention") if layer_types else num_layers


def _has_window(config: PreTrainedConfig, max_context_tokens: int) -> bool:
    """True if a sliding window is shorter than the context."""
    window: int = getattr(config, "sliding_window", None) or max_context_tokens
    return window < max_context_tokens


def _is_wide_chunk(config: PreTrainedConfig, layer_type: str, max_context_tokens: int) -> bool:
    chunk: int = getattr(config, "attention_chunk_size", None) or 0
    return layer_type == "chunked_attention" and chunk >= max_context_tokens


def _tunes_temperature(config: PreTrainedConfig, num_tokens: int) -> bool:
    """Llama 4 scales queries by their place among the tokens of a call, and by 1 as long as these are few."""
    if config.model_type != "llama4_text" or not config.attn_temperature_tuning:
        return False
    return bool(num_tokens >= config.floor_scale)


def _longrope_limits(config: PreTrainedConfig) -> Iterator[int]:
    """The length up to which each longrope of the model uses its short factors.

    A length beside the rope's parameters is moved among them only when the model is made; until then theirs may be
    the whole context.
    """
    beside = getattr(config, "original_max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in (parameters, *parameters.values()):
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            inside = rope["original_max_position_embeddings"]
            yield inside if beside is None else min(beside, inside)


def _unsupported(config: PreTrainedConfig, why: str) -> StartupError:
    return StartupError(
        f"models of the type {config.model_type} cannot be served: {why}", reason="ARCHITECTURE_UNSUPPORTED"
    )
