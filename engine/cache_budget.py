"""How many bytes the KV cache gets: what the user says, or what a GPU has left for it."""

from __future__ import annotations

import torch

from fusionserve.config import EngineConfig
from fusionserve.engine.base_model import BaseModel
from fusionserve.engine.cache_need import largest_budget

_PART_OF_FREE = 0.9  # the rest is for graphs, libraries and what lies in holes
_WIDE_ROWS = 8  # that a token has in a layer, as wide as the widest module, some of them in float32
_DRAW_BYTES = 40  # of a logit while a token is drawn: in the model's type, float32 and float64
_ITEM_BYTES = 32 << 10  # of a token's items, if it is a fusion's


def cache_budget(config: EngineConfig, base: BaseModel) -> int:
    """The bytes of the configuration; by default 512 MiB of the host, or most of what a GPU has free by now."""
    largest = largest_budget(config, base.device)
    if config.kv_cache_bytes is not None or base.device.type != "cuda":
        return largest
    taken = pool_bytes(base, config.adapter_pool_ranks) + step_bytes(config, base)
    return max(0, int(largest * _PART_OF_FREE) - taken)


def pool_bytes(base: BaseModel, num_ranks: int) -> int:
    """Of the adapter pool, once adapters have touched every module."""
    per_rank = sum(module.d_in + module.d_out + 1 for module in base.modules.by_path.values())
    return num_ranks * per_rank * base.dtype.itemsize


def step_bytes(config: EngineConfig, base: BaseModel) -> int:
    """Of the largest step's activations and tables, and of its draws; log-probabilities of prompts may take more."""
    layers = [module for module in base.modules.by_path.values() if not module.is_vocabulary]
    widest = max((max(module.d_in, module.d_out) for module in layers), default=0)
    per_token = _WIDE_ROWS * widest * torch.float32.itemsize + _ITEM_BYTES
    return config.max_batch_tokens * per_token + config.max_batch_requests * base.vocab_size * _DRAW_BYTES
