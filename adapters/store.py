"""The store of adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusionserve import metrics
from fusionserve.adapter_status import AdapterState, AdapterStatus, Residency
from fusionserve.adapters.adapter import Adapter, AdapterContent
from fusionserve.adapters.artifact_directory import ArtifactDirectory
from fusionserve.adapters.artifact_sources import ArtifactSource
from fusionserve.adapters.artifact_store import (
    DEFAULT_LOAD_TIMEOUT_S,
    ArtifactStore,
    on_borrowed_core,
)
from fusionserve.adapters.host_registry import RegistryEntry
from fusionserve.adapters.registry import AdapterRegistry
from fusionserve.artifact_folders import ADAPTER_CONFIG
from fusionserve.errors import HeldByFusionsError


@dataclass(frozen=True, slots=True)
class FusionHold:
    """A loaded fusion's lease on one of its members."""

    fusion: str
    adapter_uid: int


class AdapterStore(ArtifactStore[AdapterContent, Adapter, AdapterStatus]):
    """Names to adapters. `load_content` reads and checks an open directory; it is called on a worker thread.

    `holds()` lists, by its name, the fusions that keep an adapter loaded, each with the uid of the version it holds.
    `evict_fusions(name, num_bytes)` evicts idle ones if that leaves room for a version of this name; False if not.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        roots: tuple[Path, ...],
        load_content: Callable[[ArtifactDirectory], AdapterContent],
        holds: Callable[[], Mapping[str, Sequence[FusionHold]]] = dict,
        evict_fusions: Callable[[str, int], bool] = lambda name, num_bytes: False,
        load_timeout_s: float = DEFAULT_LOAD_TIMEOUT_S,
    ) -> None:
        super().__init__("adapter", ADAPTER_CONFIG, registry, roots, metrics.ADAPTER_HOST, load_timeout_s)
        self._load_content = load_content
        self._holds = holds
        self._evict_fusions = evict_fusions

    async def _read(self, name: str, source: ArtifactSource) -> AdapterContent:
        return await on_borrowed_core(self._read_now, source)

    def _read_now(self, source: ArtifactSource) -> AdapterContent:
        with source.open() as directory:
            return self._load_content(directory)

    def _digest_of(self, content: AdapterContent) -> str:
        return content.weights.digest

    def _is_current(self, content: AdapterContent) -> bool:
        return True

    def _discard(self, content: AdapterContent) -> None:
        """It holds on to nothing."""

    def _clear_way(self, name: str, content: AdapterContent) -> bool:
        return self._evict_fusions(name, content.nbytes)

    def _refuse_unload(self, name: str) -> None:
        fusions = _names_of(self._holds().get(name, ()))
        if fusions:
            raise HeldByFusionsError(name, fusions)

    def _to_statuses(
        self, entries: Sequence[RegistryEntry[Adapter]], device_uids: frozenset[int]
    ) -> list[AdapterStatus]:
        holds = self._holds()  # once: it goes through all fusions
        return [self._to_status(entry, holds.get(entry.loaded.name, ()), device_uids) for entry in entries]

    def _to_status(
        self, entry: RegistryEntry[Adapter], holds: Sequence[FusionHold], device_uids: frozenset[int]
    ) -> AdapterStatus:
        adapter = entry.loaded
        num_holds = sum(hold.adapter_uid == adapter.uid for hold in holds)
        return AdapterStatus(
            name=adapter.name,
            version=adapter.version,
            digest=adapter.digest,
            state=entry.state,
            residency=Residency.DEVICE if adapter.uid in device_uids else Residency.HOST,
            max_rank=adapter.weights.max_rank,
            target_modules=adapter.weights.target_modules,
            host_bytes=adapter.nbytes,
            pinned=entry.pinned,
            active_requests=entry.num_leases - num_holds,
            held_by_fusions=_names_of(holds),
            load_time_s=adapter.load_time_s,
        )

    def _to_unloaded_status(self, name: str, *, is_loading: bool) -> AdapterStatus:
        state = AdapterState.LOADING if is_loading else AdapterState.AVAILABLE
        return AdapterStatus(name=name, state=state, residency=Residency.DISK)

    def _to_withdrawn_status(self, name: str, loaded: Adapter | None, *, on_disk: bool) -> AdapterStatus:
        return AdapterStatus(
            name=name,
            version=loaded.version if loaded else 0,
            digest=loaded.digest if loaded else "",
            state=AdapterState.AVAILABLE if on_disk else AdapterState.DRAINING,
            residency=Residency.DISK,
        )


def _names_of(holds: Sequence[FusionHold]) -> tuple[str, ...]:
    return tuple(sorted({hold.fusion for hold in holds}))
