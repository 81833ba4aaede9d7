"""The registry of fusions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fusionserve import metrics
from fusionserve.adapters.host_registry import HostRegistry
from fusionserve.fusion.fusion import Fusion, FusionContent


class FusionRegistry(HostRegistry[FusionContent, Fusion]):
    """Loaded fusions. A fusion's leases on its members end when its version is let go: `on_gone` has to see to it."""

    def __init__(self, budget_bytes: int, on_gone: Callable[[Fusion], None], uids: Iterator[int]) -> None:
        super().__init__("fusion", Fusion, budget_bytes, on_gone, uids=uids, host_metrics=metrics.FUSION_HOST)
