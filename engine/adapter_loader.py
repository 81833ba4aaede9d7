"""From an adapter's directory to what requests lease, for one base model and its pool."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fusionserve.adapters.adapter import AdapterContent
from fusionserve.adapters.artifact_directory import ArtifactDirectory
from fusionserve.adapters.dora import column_scales
from fusionserve.adapters.lora_loader import LoadPolicy, load_lora_weights, read_plan
from fusionserve.adapters.pinned_memory import pinned_bytes, pinned_memory
from fusionserve.adapters.spare_memory import SpareMemory
from fusionserve.config import EngineConfig
from fusionserve.engine.base_model import BaseModel

_MOST_SPARE = 8  # parts of the host budget: what the next load takes comes on top of it


class AdapterLoader:
    """Reads adapters on worker threads, while the engine's computes."""

    def __init__(self, config: EngineConfig, base: BaseModel) -> None:
        self._base = base
        self._budget_bytes = config.adapter_host_bytes
        self._spare = SpareMemory(config.adapter_host_bytes // _MOST_SPARE)
        on_host = base.device.type == "cpu"
        self._policy = LoadPolicy(
            dtype=base.dtype,
            max_rank=min(config.max_adapter_rank, config.adapter_pool_ranks),
            allow_base_mismatch=config.allow_base_mismatch,
            new_memory=self._spare.take if on_host else pinned_memory,
            taken_bytes=int if on_host else pinned_bytes,
        )
        self.prepares_pool = on_host  # a GPU's pool needs nothing ahead

    def adapted_modules(self, directory: ArtifactDirectory) -> Collection[str]:
        """The paths of the modules whose rank rows it would take, from its header. Raises as `load` does."""
        return read_plan(directory, self._base.modules).modules

    def prepare(self, paths: Iterable[str]) -> None:
        """Gets the memory for these modules' rank rows in the pool, once. Raises MemoryError."""
        self._base.pool.prepare(paths)

    def load(self, directory: ArtifactDirectory) -> AdapterContent:
        """Reads and checks an adapter, and gets what else it needs, so that no step waits for that.

        Raises what `load_lora_weights` raises, and MemoryError.
        """
        base = self._base
        weights = load_lora_weights(
            directory,
            base.modules,
            policy=self._policy,
            budget_bytes=self._budget_bytes,
            base_weight=base.base_weight,
            base_step=base.base_step,
            base_bias=base.base_bias,
        )
        self.prepare(weights.modules)
        self._spare.refill_soon()
        return AdapterContent(weights, column_scales(weights, base.base_weight))
