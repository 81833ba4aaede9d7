"""The registry of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

from fusionserve import metrics
from fusionserve.adapters.adapter import Adapter, AdapterContent
from fusionserve.adapters.host_registry import HostRegistry


class AdapterRegistry(HostRegistry[AdapterContent, Adapter]):
    """Loaded adapters; `uids` are shared with the registry of fusions, which live in the same pool."""

    def __init__(
        self, budget_bytes: int, on_gone: Callable[[Adapter], None], uids: Iterator[int] | None = None
    ) -> None:
        super().__init__(
            "adapter",
            Adapter,
            budget_bytes,
            on_gone,
            uids=count(1) if uids is None else uids,
            host_metrics=metrics.ADAPTER_HOST,
        )
