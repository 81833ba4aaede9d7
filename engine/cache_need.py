"""What one context takes of the KV cache, known before anything is made for each of its positions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fusionserve.config import MEBIBYTE, EngineConfig
from fusionserve.engine.fit_check import CacheShape
from fusionserve.errors import StartupError

_HOST_BYTES = 512 * MEBIBYTE


def cache_bytes_per_token(shapes: Mapping[nn.Module, CacheShape], dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes in all layers."""
    return sum(s.num_kv_heads * (s.key_dim + s.value_dim) for s in shapes.values()) * dtype.itemsize


def largest_budget(config: EngineConfig, device: torch.device) -> int:
    """The bytes of the configuration; by default 512 MiB of the host, or all that a GPU has free by now."""
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if device.type != "cuda":
        return _HOST_BYTES
    torch.cuda.empty_cache()  # loading leaves some
    free, _ = torch.cuda.mem_get_info(device)
    return free


def check_context_fits(
    max_context_tokens: int, bytes_per_token: int, *, block_size: int, budget_bytes: int
) -> None:
    """Raises StartupError KV_CACHE_TOO_SMALL if a budget has no room for one full context."""
    num_bytes = -(-max_context_tokens // block_size) * block_size * bytes_per_token
    if budget_bytes < num_bytes:
        raise StartupError(
            f"the KV cache needs {num_bytes >> 20} MiB for one context of {max_context_tokens} tokens: "
            "give it more, or limit the context",
            reason="KV_CACHE_TOO_SMALL",
        )
