"""Getting adapters from disk to the host registry and back out: on demand, by command, one load per name at a time.

Runs on the event loop; files are read on worker threads, so neither the loop nor the engine's thread ever waits for a
disk, and the streams of other adapters go on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fusionserve import metrics
from fusionserve.adapter_status import AdapterState, AdapterStatus, Residency
from fusionserve.adapters.adapter import Adapter, AdapterContent
from fusionserve.adapters.artifact_directory import (
    ArtifactDirectory,
    list_adapter_names,
    open_artifact_directory,
    open_directory,
)
from fusionserve.adapters.registry import AdapterRegistry, RegistryEntry
from fusionserve.errors import CapacityError, FusionServeError, NotFoundError

_MAX_CONCURRENT_LOADS = 2
_MAX_LEASE_ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Where a name's files are: `relative` under `root`, or `root` itself if the operator named it."""

    root: Path
    relative: str | None


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a load was asked to do; no source means wherever the name is found."""

    source: AdapterSource | None
    pin: bool
    replace: bool


_ON_DEMAND = _Wish(source=None, pin=False, replace=True)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A load under way."""

    wish: _Wish
    task: asyncio.Task[Adapter]


class AdapterStore:
    """Names to adapters. `load_content` reads and checks an open directory; it is called on a worker thread."""

    def __init__(
        self,
        registry: AdapterRegistry,
        roots: tuple[Path, ...],
        load_content: Callable[[ArtifactDirectory], AdapterContent],
    ) -> None:
        self.registry = registry
        self._roots = roots
        self._load_content = load_content
        self._sources: dict[str, AdapterSource] = {}  # of loaded names, so that an evicted one can come back
        self._loads: dict[str, _Flight] = {}
        self._load_slots = asyncio.Semaphore(_MAX_CONCURRENT_LOADS)

    async def lease(self, names: Sequence[str]) -> tuple[Adapter, ...]:
        """Leases every adapter in `names`, loading those on disk, or none; the caller gives them to the registry.

        When it returns, each is the version that takes new leases: loading one may take a while, and an adapter
        that is unloaded or replaced meanwhile is leased anew. Raises NotFoundError, and whatever loading raises.
        """
        for _ in range(_MAX_LEASE_ATTEMPTS):
            leased = await self._lease_each(names)
            if self.registry.are_ready(leased):
                return tuple(leased)
            self.registry.release(leased)
        raise _unstable(", ".join(names))

    async def load(self, name: str, path: str | None, *, pin: bool, replace: bool) -> Adapter:
        """Loads `name` from the relative `path` (default: the name) under a root.

        Joins a load under way if it is the same first load, else waits for it: it may read another path, or files
        that have changed since.
        Raises AlreadyExistsError if it is loaded and not `replace`; NotFoundError, ArtifactError, CapacityError.
        """
        source = None if path is None else AdapterSource(await self._find_root(name, path), path)
        wish = _Wish(source, pin, replace)
        while (flight := self._loads.get(name)) is not None and (flight.wish != wish or replace):
            await asyncio.wait([flight.task])
        return await self._load_once(name, wish)

    async def load_from(self, name: str, directory: Path) -> Adapter:
        """Loads `name` from a directory the operator chose, which need not lie under a root."""
        return await self._load_once(name, _Wish(AdapterSource(directory, None), pin=False, replace=True))

    async def unload(self, name: str, on_retired: Callable[[Adapter], None]) -> AdapterStatus:
        """Withdraws `name` at once and waits until the last lease on any version of it ends.

        `on_retired` is called in between for each version. Raises NotFoundError if none is loaded.
        """
        if name in self._loads:
            await asyncio.wait([self._loads[name].task])
        loop = asyncio.get_running_loop()
        gone = asyncio.Semaphore(0)
        entries = self.registry.retire(name, partial(loop.call_soon_threadsafe, gone.release))
        if not entries:
            raise NotFoundError(
                f"adapter {name} is not loaded",
                resource_type="adapter",
                resource_name=name,
                reason="ADAPTER_NOT_LOADED",
            )
        self._sources.pop(name, None)
        for entry in entries:
            on_retired(entry.adapter)
        for _ in entries:
            await gone.acquire()
        return _withdrawn(entries[0], on_disk=name in await asyncio.to_thread(self._names_on_disk))

    async def status(self, name: str, device_uids: frozenset[int]) -> AdapterStatus:
        """What is known of one name. Raises NotFoundError."""
        entry = self.registry.get(name)
        if entry is not None:
            return _loaded(entry, device_uids)
        if (
            name in self._loads
            or name in self._sources
            or name in await asyncio.to_thread(self._names_on_disk)
        ):
            return self._on_disk(name)
        raise _unknown(name)

    async def statuses(self, device_uids: frozenset[int]) -> list[AdapterStatus]:
        """All names, loaded and on disk, sorted by name."""
        loaded = {entry.adapter.name: _loaded(entry, device_uids) for entry in self.registry.entries()}
        names = {*loaded, *self._loads, *self._sources, *await asyncio.to_thread(self._names_on_disk)}
        return [loaded.get(name) or self._on_disk(name) for name in sorted(names)]

    async def close(self, grace_s: float) -> None:
        """Waits up to `grace_s` for the loads under way."""
        if self._loads:
            await asyncio.wait([flight.task for flight in self._loads.values()], timeout=grace_s)

    async def _lease_each(self, names: Sequence[str]) -> list[Adapter]:
        leased: list[Adapter] = []
        try:
            for name in names:
                leased.append(await self._lease_one(name))
        except BaseException:
            self.registry.release(leased)
            raise
        return leased

    async def _lease_one(self, name: str) -> Adapter:
        for _ in range(_MAX_LEASE_ATTEMPTS):
            adapter = self.registry.lease(name)
            if adapter is not None:
                return adapter
            await self._load_once(name, _ON_DEMAND)
        raise _unstable(name)

    async def _load_once(self, name: str, wish: _Wish) -> Adapter:
        """Single flight: whoever asks for a name that is being loaded waits for that load."""
        flight = self._loads.get(name)
        if flight is None:
            flight = self._loads[name] = _Flight(wish, asyncio.create_task(self._fly(name, wish)))
            flight.task.add_done_callback(_see_exception)
        return await asyncio.shield(flight.task)  # one caller's cancellation must not end the others' load

    async def _fly(self, name: str, wish: _Wish) -> Adapter:
        try:
            return await self._load(name, wish)
        finally:
            del self._loads[name]  # before the task is done, so that no done load is ever waited for

    async def _load(self, name: str, wish: _Wish) -> Adapter:
        if not wish.replace:
            self.registry.refuse_if_loaded(name)
        started_s = time.monotonic()
        try:
            async with self._load_slots:
                found = (
                    wish.source
                    or self._sources.get(name)
                    or AdapterSource(await self._find_root(name, name), name)
                )
                content = await asyncio.to_thread(self._read, found)
            adapter = self.registry.publish(name, content, pin=wish.pin, replace=wish.replace)
        except FusionServeError as error:
            metrics.ADAPTER_LOAD_FAILURES.labels(error.reason).inc()
            raise
        self._sources[name] = found
        metrics.ADAPTER_LOADS.inc()
        metrics.ADAPTER_LOAD_SECONDS.observe(time.monotonic() - started_s)
        return adapter

    def _read(self, source: AdapterSource) -> AdapterContent:
        if source.relative is None:
            directory = open_directory(source.root)
        else:
            directory = open_artifact_directory(source.root, source.relative)
        with directory:
            return self._load_content(directory)

    async def _find_root(self, name: str, path: str) -> Path:
        return await asyncio.to_thread(self._root_of, name, path)

    def _root_of(self, name: str, path: str) -> Path:
        """The first root that has a directory at the relative `path`."""
        for root in self._roots:
            try:
                open_artifact_directory(root, path).close()
            except NotFoundError:
                continue
            return root
        raise _unknown(name)

    def _names_on_disk(self) -> set[str]:
        names: set[str] = set()
        for root in self._roots:
            try:
                names.update(list_adapter_names(root))
            except NotFoundError:  # a root that was removed has no adapters
                continue
        return names

    def _on_disk(self, name: str) -> AdapterStatus:
        state = AdapterState.LOADING if name in self._loads else AdapterState.AVAILABLE
        return AdapterStatus(name=name, state=state, residency=Residency.DISK)


def _loaded(entry: RegistryEntry, device_uids: frozenset[int]) -> AdapterStatus:
    adapter = entry.adapter
    return AdapterStatus(
        name=adapter.name,
        version=adapter.version,
        digest=adapter.digest,
        state=entry.state,
        residency=Residency.DEVICE if adapter.uid in device_uids else Residency.HOST,
        max_rank=adapter.num_rows,
        target_modules=adapter.weights.target_modules,
        host_bytes=adapter.content.nbytes,
        pinned=entry.pinned,
        active_requests=entry.num_leases,
        load_time_s=adapter.load_time_s,
    )


def _withdrawn(entry: RegistryEntry, *, on_disk: bool) -> AdapterStatus:
    """The last status of an unloaded version: AVAILABLE if its name would load again on demand, else DRAINING's end."""
    return AdapterStatus(
        name=entry.adapter.name,
        version=entry.adapter.version,
        digest=entry.adapter.digest,
        state=AdapterState.AVAILABLE if on_disk else AdapterState.DRAINING,
        residency=Residency.DISK,
    )


def _unstable(names: str) -> CapacityError:
    return CapacityError(
        f"adapter {names} is evicted or replaced as often as it is loaded",
        reason="ADAPTER_HOST_FULL",
        retry_after_s=1.0,
    )


def _see_exception(task: asyncio.Task[Adapter]) -> None:
    """Keeps asyncio from reporting a failed load as unseen when every caller has gone."""
    if not task.cancelled():
        task.exception()


def _unknown(name: str) -> NotFoundError:
    return NotFoundError(
        f"no adapter is named {name}", resource_type="adapter", resource_name=name, reason="ADAPTER_NOT_FOUND"
    )
