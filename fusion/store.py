"""The store of fusions: a fusion is read, its members are leased, and both are folded together.

The members stay leased as long as a version of the fusion is loaded, so they are neither evicted nor unloaded under it.
An idle fusion, however, goes itself where another adapter needs the room of its members.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from fusionserve import metrics
from fusionserve.adapter_status import AdapterState, FusionMemberStatus, FusionStatus, Residency
from fusionserve.adapters.adapter import Adapter
from fusionserve.adapters.artifact_sources import ArtifactSource
from fusionserve.adapters.artifact_store import (
    DEFAULT_LOAD_TIMEOUT_S,
    ArtifactStore,
    on_borrowed_core,
)
from fusionserve.adapters.base_modules import BaseModules
from fusionserve.adapters.host_registry import RegistryEntry
from fusionserve.adapters.store import AdapterStore, FusionHold
from fusionserve.artifact_folders import FUSION_CONFIG
from fusionserve.errors import ArtifactError, NotFoundError
from fusionserve.fusion.config import FusionConfig
from fusionserve.fusion.fusion import Fusion, FusionContent
from fusionserve.fusion.loader import FusionPolicy, ReadFusion, fold_over, read_fusion
from fusionserve.fusion.registry import FusionRegistry


class FusionStore(ArtifactStore[FusionContent, Fusion, FusionStatus]):
    """Names to fusions over `adapters`. Files are read and folded on worker threads."""

    def __init__(
        self,
        registry: FusionRegistry,
        roots: tuple[Path, ...],
        adapters: AdapterStore,
        base: BaseModules,
        policy: FusionPolicy,
        load_timeout_s: float = DEFAULT_LOAD_TIMEOUT_S,
    ) -> None:
        super().__init__("fusion", FUSION_CONFIG, registry, roots, metrics.FUSION_HOST, load_timeout_s)
        self._adapters = adapters
        self._base = base
        self._policy = policy

    def holds(self) -> Mapping[str, Sequence[FusionHold]]:
        """The loaded fusions that an adapter is a member of, by the adapter's name."""
        holds: defaultdict[str, list[FusionHold]] = defaultdict(list)
        for fusion in self.registry.versions():
            for member in fusion.members:
                holds[member.name].append(FusionHold(fusion.name, member.uid))
        return holds

    def evict_idle(self, adapter_name: str, num_bytes: int) -> bool:
        """Evicts idle fusions, the least recently used first, until their members leave room for an adapter.

        Evicts none that frees nothing, none that is being replaced, and none at all, returning False, if that would not
        be enough. The adapter may be a new version of one that is loaded.
        """
        adapters = self._adapters.registry
        idle = [fusion for fusion in self.registry.idle() if fusion.name not in self._loads]
        missing = adapters.used_bytes + num_bytes - adapters.budget_bytes

        def freed_by(num_fusions: int) -> list[Adapter]:
            released = [member for fusion in idle[:num_fusions] for member in fusion.members]
            return adapters.evictable(adapter_name, released)

        def is_enough(num_fusions: int) -> bool:
            return sum(adapter.nbytes for adapter in freed_by(num_fusions)) >= missing

        fewest = bisect_left(range(len(idle) + 1), True, key=is_enough)
        if fewest > len(idle):
            return False
        freed = set(freed_by(fewest))
        self.registry.evict([fusion for fusion in idle[:fewest] if not freed.isdisjoint(fusion.members)])
        return True

    def release_members(self, fusion: Fusion) -> None:
        """Ends the leases of a version that has been let go."""
        self._adapters.registry.release(fusion.members)
        metrics.FUSION_PINS.dec(len(fusion.members))

    async def _read(self, name: str, source: ArtifactSource) -> FusionContent:
        fusion = await on_borrowed_core(self._read_now, source)
        members = await self._lease_members(fusion.config)
        try:
            weights = [member.weights for member in members]
            folded = await on_borrowed_core(fold_over, fusion, weights, self._base, self._policy)
        except BaseException:
            self._adapters.registry.release(members)
            raise
        return FusionContent(folded, members)

    def _read_now(self, source: ArtifactSource) -> ReadFusion:
        with source.open() as directory:
            return read_fusion(directory, self._base, self._policy)

    async def _lease_members(self, config: FusionConfig) -> tuple[Adapter, ...]:
        try:
            return await self._adapters.lease([member.name for member in config.members])
        except NotFoundError as error:
            raise ArtifactError(
                f"member {error.resource_name} is neither loaded nor found on disk",
                reason="MEMBER_MISSING",
                metadata={"member": error.resource_name},
            ) from None
        except ArtifactError as error:
            raise ArtifactError(
                f"a member cannot be loaded: {error.message}", reason=error.reason, metadata=error.metadata
            ) from None

    def _digest_of(self, content: FusionContent) -> str:
        return content.folded.digest

    def _is_current(self, content: FusionContent) -> bool:
        """A member that was unloaded or replaced meanwhile must not be kept from going."""
        return self._adapters.registry.are_ready(content.members)

    def _discard(self, content: FusionContent) -> None:
        self._adapters.registry.release(content.members)

    def _on_published(self, loaded: Fusion) -> None:
        metrics.FUSION_PINS.inc(len(loaded.members))

    def _to_statuses(
        self, entries: Sequence[RegistryEntry[Fusion]], device_uids: frozenset[int]
    ) -> list[FusionStatus]:
        return [self._to_status(entry, device_uids) for entry in entries]

    def _to_status(self, entry: RegistryEntry[Fusion], device_uids: frozenset[int]) -> FusionStatus:
        fusion, config = entry.loaded, entry.loaded.config
        return FusionStatus(
            name=fusion.name,
            version=fusion.version,
            digest=fusion.digest,
            state=entry.state,
            residency=Residency.DEVICE if fusion.uid in device_uids else Residency.HOST,
            members=tuple(
                FusionMemberStatus(name=member.name, digest=member.digest) for member in fusion.members
            ),
            modules=config.modules,
            scope=config.scope.value,
            d_key=config.d_key,
            member_keys=config.member_keys,
            value_kind=config.value.value,
            temperature=config.temperature,
            base_member=config.base_member,
            pool_ranks=fusion.num_rows,
            host_bytes=fusion.nbytes,
            pinned=entry.pinned,
            active_requests=entry.num_leases,
            load_time_s=fusion.load_time_s,
        )

    def _to_unloaded_status(self, name: str, *, is_loading: bool) -> FusionStatus:
        state = AdapterState.LOADING if is_loading else AdapterState.AVAILABLE
        return FusionStatus(name=name, state=state, residency=Residency.DISK)

    def _to_withdrawn_status(self, name: str, loaded: Fusion | None, *, on_disk: bool) -> FusionStatus:
        return FusionStatus(
            name=name,
            version=loaded.version if loaded else 0,
            digest=loaded.digest if loaded else "",
            state=AdapterState.AVAILABLE if on_disk else AdapterState.DRAINING,
            residency=Residency.DISK,
        )
