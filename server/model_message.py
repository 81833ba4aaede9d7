"""The base model as a message."""

from __future__ import annotations

from fusionserve import __version__
from fusionserve.model_info import ModelInfo
from fusionserve.v1 import inference_pb2


def to_get_model_response(info: ModelInfo) -> inference_pb2.GetModelResponse:
    """The model, the server's limits and its version."""
    return inference_pb2.GetModelResponse(
        name=info.name,
        architecture=info.architecture,
        dtype=info.dtype,
        quantization=info.quantization,
        weight_bytes=info.weight_bytes,
        max_context_tokens=info.max_context_tokens,
        vocab_size=info.vocab_size,
        has_tokenizer=info.has_tokenizer,
        has_chat_template=info.has_chat_template,
        eos_token_ids=info.eos_token_ids,
        limits=_to_limits(info),
        version=__version__,
    )


def _to_limits(info: ModelInfo) -> inference_pb2.ServerLimits:
    return inference_pb2.ServerLimits(
        max_batch_tokens=info.max_batch_tokens,
        max_batch_requests=info.max_batch_requests,
        adapter_pool_ranks=info.adapter_pool_ranks,
        max_adapter_rank=info.max_adapter_rank,
        adapter_host_bytes=info.adapter_host_bytes,
    )
