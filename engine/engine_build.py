"""Puts an engine together: scheduler, block pool, pool ledger and model runner, sized by the configuration."""

from __future__ import annotations

from collections.abc import Callable

from fusionserve import metrics
from fusionserve.adapters.pool_ledger import PoolLedger
from fusionserve.config import EngineConfig
from fusionserve.engine.base_model import BaseModel
from fusionserve.engine.block_pool import BlockPool
from fusionserve.engine.cache_budget import cache_budget
from fusionserve.engine.cache_memory import CacheMemory
from fusionserve.engine.engine import Engine
from fusionserve.engine.fusion_metrics import FusionMetrics
from fusionserve.engine.leased_adaptation import LeasedAdaptation
from fusionserve.engine.model_runner import ModelRunner, num_cache_blocks
from fusionserve.engine.scheduler import Scheduler, SchedulerLimits
from fusionserve.metrics import AdapterLabels


def build_engine(
    config: EngineConfig,
    base: BaseModel,
    release_leases: Callable[[LeasedAdaptation], None],
    adapter_labels: AdapterLabels,
    fusion_metrics: FusionMetrics,
) -> tuple[Engine, CacheMemory]:
    """The engine of a loaded base, and the memory of its KV cache.

    Raises StartupError if a cache does not fit the budget.
    """
    num_blocks = num_cache_blocks(
        base,
        block_size=config.block_size,
        budget_bytes=cache_budget(config, base),
        max_requests=config.max_batch_requests,
    )
    metrics.BASE_WEIGHT_BYTES.set(base.weight_bytes)
    metrics.KV_BLOCKS.set(num_blocks)
    metrics.ADAPTER_POOL_RANKS.set(config.adapter_pool_ranks)
    limits = SchedulerLimits(
        max_batch_tokens=config.max_batch_tokens,
        min_prompt_tokens=config.min_prompt_tokens,
        prompt_step_s=config.prompt_step_s,
        max_batch_requests=config.max_batch_requests,
    )
    scheduler = Scheduler(
        BlockPool(num_blocks, config.block_size),
        PoolLedger(config.adapter_pool_ranks, base.pool.copies),
        limits,
        enable_prefix_cache=config.enable_prefix_cache,
        fair_weights=config.fair_weights,
    )
    runner = ModelRunner(base, block_size=config.block_size, num_blocks=num_blocks)
    runner.warm_up(config.max_batch_requests)
    engine = Engine(
        scheduler,
        runner,
        eos_token_ids=base.eos_token_ids,
        release_leases=release_leases,
        token_text=base.tokenizer.text_of,
        adapter_labels=adapter_labels,
        fusion_metrics=fusion_metrics,
    )
    return engine, runner.cache_memory
