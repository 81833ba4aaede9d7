"""What the server tells about the base model and the engine's limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The served base model; `quantization` is "none" for plain weights.

    `weight_bytes` are those of the base's weights in memory, quantized ones with their scales.
    """

    name: str
    architecture: str
    dtype: str
    quantization: str = "none"
    weight_bytes: int = 0
    max_context_tokens: int
    vocab_size: int
    has_tokenizer: bool
    has_chat_template: bool
    eos_token_ids: tuple[int, ...] = ()
    max_batch_tokens: int
    max_batch_requests: int
    adapter_pool_ranks: int
    max_adapter_rank: int
    adapter_host_bytes: int
