"""Getting artifacts from disk to a host registry and back out: on demand, by command, one load per name at a time.

Runs on the event loop; files are read on worker threads, so neither the loop nor the engine's thread ever waits for a
disk, and other streams go on. Adapters and fusions have a store each; how one is read is the subclass's.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

from fusionserve.adapters.artifact_sources import ArtifactSource, ArtifactSources
from fusionserve.adapters.disk_slots import DiskSlots
from fusionserve.adapters.host_registry import C, HostRegistry, L, RegistryEntry
from fusionserve.adapters.name_listing import NameListing
from fusionserve.errors import (
    CapacityError,
    ChecksumError,
    FusionServeError,
    InternalError,
    NotFoundError,
    UnavailableError,
)
from fusionserve.kernels.threads import borrowed_core
from fusionserve.kernels.torch_errors import is_out_of_memory
from fusionserve.metrics import HostMetrics

DEFAULT_LOAD_TIMEOUT_S = 120.0
_BORROWED_S = 0.05  # at most: storage may be slow, and then the core lies idle
_MAX_CONCURRENT_LOADS = 2
_MAX_LEASE_ATTEMPTS = 8
_MEMORY_RETRY_S = 5.0
_SLOW_RETRY_S = 5.0

S = TypeVar("S")  # what is told of one name
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a load was asked to do: from a `path` under a root, a `directory`, or wherever the name is found."""

    path: str | None = None
    directory: Path | None = None
    pin: bool | None = None  # as the version before
    replace: bool = True
    digest: str | None = None  # what the weights must have


_ON_DEMAND = _Wish()


@dataclass(slots=True)
class _Flight(Generic[L]):
    """A load under way; anybody can ask for a name, so it stands for something once its source `is_found`."""

    wish: _Wish
    task: asyncio.Task[L]
    is_found: bool = False


class ArtifactStore(ABC, Generic[C, L, S]):
    """Names to loaded versions of one kind, whose `noun` errors name and whose directories have a `config_file`."""

    def __init__(
        self,
        noun: str,
        config_file: str,
        registry: HostRegistry[C, L],
        roots: tuple[Path, ...],
        host_metrics: HostMetrics,
        load_timeout_s: float,
    ) -> None:
        self.registry = registry
        self._noun = noun
        self._metrics = host_metrics
        self._sources = ArtifactSources(roots, config_file)
        self._loads: dict[str, _Flight[L]] = {}
        self._reading = DiskSlots(_MAX_CONCURRENT_LOADS, load_timeout_s)
        self._listing = NameListing(self._sources.names_on_disk, load_timeout_s)

    @abstractmethod
    async def _read(self, name: str, source: ArtifactSource) -> C:
        """Reads and checks an artifact. What it holds on to goes with `_discard`, or with the version published."""

    @abstractmethod
    def _digest_of(self, content: C) -> str:
        """The sha256 (hex) of the weights file."""

    @abstractmethod
    def _is_current(self, content: C) -> bool:
        """False if content just read must be read again before it may be published."""

    @abstractmethod
    def _discard(self, content: C) -> None:
        """Lets go of content that is not published."""

    @abstractmethod
    def _to_statuses(self, entries: Sequence[RegistryEntry[L]], device_uids: frozenset[int]) -> list[S]:
        """What is told of loaded versions, in their order."""

    @abstractmethod
    def _to_unloaded_status(self, name: str, *, is_loading: bool) -> S:
        """What is told of a name that is on disk only."""

    @abstractmethod
    def _to_withdrawn_status(self, name: str, loaded: L | None, *, on_disk: bool) -> S:
        """The last word on an unloaded version, or one evicted before: AVAILABLE if it would load again on demand."""

    def _on_published(self, loaded: L) -> None:
        """Notes that what `_read` held on to is the published version's."""

    def _clear_way(self, name: str, content: C) -> bool:
        """Ends leases that keep `content` from finding room, and that nobody uses; False if none would help."""
        return False

    def _refuse_unload(self, name: str) -> None:
        """Raises PreconditionError if something else needs the name."""

    async def lease(self, names: Sequence[str]) -> tuple[L, ...]:
        """Leases everything in `names`, loading what is on disk, or none; the caller gives them to the registry.

        When it returns, each is the version that takes new leases: loading one may take a while, and one that is
        unloaded or replaced meanwhile is leased anew. Raises NotFoundError, and whatever loading raises.
        """
        for _ in range(_MAX_LEASE_ATTEMPTS):
            leased = await self._lease_each(names)
            if self.registry.are_ready(leased):
                return tuple(leased)
            self.registry.release(leased)
        raise self._unstable(", ".join(names))

    async def load(
        self, name: str, path: str | None, *, pin: bool | None, replace: bool, digest: str | None = None
    ) -> L:
        """Loads `name` from the relative `path` (default: the name) under a root.

        Joins a load under way if it is the same first load, else waits for it: it may read another path, or files
        that have changed since.
        Raises AlreadyExistsError if it is loaded and not `replace`; ChecksumError if the weights do not have the
        `digest`; NotFoundError, ArtifactError, CapacityError; UnavailableError (LOAD_TIMED_OUT) if it takes too long.
        """
        wish = _Wish(path=path, pin=pin, replace=replace, digest=digest)
        while (flight := self._loads.get(name)) is not None and (flight.wish != wish or replace):
            await asyncio.wait([flight.task])
        return await self._load_once(name, wish)

    async def load_from(self, name: str, directory: Path) -> L:
        """Loads `name` from a directory the operator chose, which need not lie under a root."""
        return await self._load_once(name, _Wish(directory=directory))

    async def unload(self, name: str, on_retired: Callable[[L], None]) -> S:
        """Withdraws `name` at once and waits until the last lease on any version of it ends.

        `on_retired` is called in between for each version. A name that was evicted is forgotten if it would come back
        from elsewhere than its own folder. Raises NotFoundError if there is neither.
        """
        if name in self._loads:
            await asyncio.wait([self._loads[name].task])
        self._refuse_unload(name)
        loop = asyncio.get_running_loop()
        gone = asyncio.Semaphore(0)
        entries = self.registry.retire(name, partial(loop.call_soon_threadsafe, gone.release))
        is_known = self._sources.is_elsewhere(name)
        self._sources.forget(name)
        if not entries and not is_known:
            raise NotFoundError(
                f"{self._noun} {name} is not loaded",
                resource_type=self._noun,
                resource_name=name,
                reason=f"{self._noun.upper()}_NOT_LOADED",
            )
        for entry in entries:
            on_retired(entry.loaded)
        for _ in entries:
            await gone.acquire()
        on_disk = False
        with suppress(UnavailableError):  # it is unloaded all the same
            on_disk = name in await self._list()
        return self._to_withdrawn_status(name, entries[0].loaded if entries else None, on_disk=on_disk)

    async def status(self, name: str, device_uids: frozenset[int]) -> S:
        """What is known of one name. Raises NotFoundError, UnavailableError."""
        entry = self.registry.get(name)
        if entry is not None:
            return self._to_statuses([entry], device_uids)[0]
        if name in self._loading() or self._sources.is_elsewhere(name) or name in await self._list():
            return self._on_disk(name)
        raise self._unknown(name)

    async def statuses(self, device_uids: frozenset[int]) -> list[S]:
        """All names, loaded and on disk, sorted by name. Raises UnavailableError."""
        on_disk = await self._list()
        entries = self.registry.entries()
        told = self._to_statuses(entries, device_uids)
        loaded = {entry.loaded.name: status for entry, status in zip(entries, told, strict=True)}
        names = {*loaded, *self._loading(), *self._sources.elsewhere(), *on_disk}
        return [loaded.get(name) or self._on_disk(name) for name in sorted(names)]

    async def close(self, grace_s: float) -> None:
        """Waits up to `grace_s` for the loads under way."""
        if self._loads:
            await asyncio.wait([flight.task for flight in self._loads.values()], timeout=grace_s)

    async def _lease_each(self, names: Sequence[str]) -> list[L]:
        leased: list[L] = []
        try:
            for name in names:
                leased.append(await self._lease_one(name))
        except BaseException:
            self.registry.release(leased)
            raise
        return leased

    async def _lease_one(self, name: str) -> L:
        for _ in range(_MAX_LEASE_ATTEMPTS):
            loaded = self.registry.lease(name)
            if loaded is not None:
                return loaded
            flight = self._loads.get(name)
            if flight is not None and flight.wish is not _ON_DEMAND:
                # What is wrong with another's wish is not this one's failure.
                await asyncio.wait([flight.task])
            else:
                await self._load_once(name, _ON_DEMAND)
        raise self._unstable(name)

    async def _load_once(self, name: str, wish: _Wish) -> L:
        """Single flight: whoever asks for a name that is being loaded waits for that load."""
        flight = self._loads.get(name)
        if flight is None:
            flight = self._loads[name] = _Flight(wish, asyncio.create_task(self._fly(name, wish)))
            flight.task.add_done_callback(_see_exception)
        return await asyncio.shield(flight.task)  # one caller's cancellation must not end the others' load

    async def _fly(self, name: str, wish: _Wish) -> L:
        try:
            return await self._load(name, wish)
        finally:
            del self._loads[name]  # before the task is done, so that no done load is ever waited for

    async def _load(self, name: str, wish: _Wish) -> L:
        if not wish.replace:
            self.registry.refuse_if_loaded(name)
        started_s = time.monotonic()
        try:
            found, loaded = await self._read_and_publish(name, wish)
        except FusionServeError as error:
            self._metrics.load_failures.labels(error.reason).inc()
            raise
        except Exception as error:
            failure = _out_of_memory() if is_out_of_memory(error) else InternalError("a load failed")
            self._metrics.load_failures.labels(failure.reason).inc()
            raise failure from error
        self._sources.remember(name, found)
        self._metrics.loads.inc()
        self._metrics.load_seconds.observe(time.monotonic() - started_s)
        return loaded

    async def _read_and_publish(self, name: str, wish: _Wish) -> tuple[ArtifactSource, L]:
        for _ in range(_MAX_LEASE_ATTEMPTS):
            found, content = await self._read_in_time(name, wish)
            try:
                self._check_digest(name, content, found)
                if self._is_current(content):
                    loaded = self._publish(name, content, wish)
                    self._on_published(loaded)
                    return found, loaded
            except BaseException:
                self._discard(content)
                raise
            self._discard(content)
        raise self._unstable(name)

    def _publish(self, name: str, content: C, wish: _Wish) -> L:
        try:
            return self.registry.publish(name, content, pin=wish.pin, replace=wish.replace)
        except CapacityError:
            if not self._clear_way(name, content):
                raise
        return self.registry.publish(name, content, pin=wish.pin, replace=wish.replace)

    async def _read_in_time(self, name: str, wish: _Wish) -> tuple[ArtifactSource, C]:
        try:
            return await self._reading.run(
                lambda: self._find_and_read(name, wish), lambda late: self._discard(late[1])
            )
        except TimeoutError:
            raise self._too_slow(f"{self._noun} {name}", "read") from None

    async def _find_and_read(self, name: str, wish: _Wish) -> tuple[ArtifactSource, C]:
        found = await self._find(name, wish)
        self._note_found(name, wish)
        try:
            return found, await self._read(name, found)
        except NotFoundError:
            if wish.path is not None or found.relative is None or self._sources.known(name) is None:
                raise
        # It is no longer where it was loaded from; it may have moved to another root.
        found = replace(found, root=await self._find_root(name, found.relative))
        return found, await self._read(name, found)

    def _note_found(self, name: str, wish: _Wish) -> None:
        """A frame that waits and knows its own flight is kept, with all it has read, by the error it ends with."""
        flight = self._loads.get(name)
        if flight is not None and flight.wish is wish:  # else it has taken too long, and nobody waits
            flight.is_found = True

    async def _find(self, name: str, wish: _Wish) -> ArtifactSource:
        if wish.directory is not None:
            return ArtifactSource(wish.directory, None)
        known = self._sources.known(name)
        if wish.path is None and known is not None:
            return known if wish is _ON_DEMAND else replace(known, digest=wish.digest)
        path = name if wish.path is None else wish.path
        return ArtifactSource(await self._find_root(name, path), path, wish.digest)

    def _check_digest(self, name: str, content: C, source: ArtifactSource) -> None:
        if source.digest is not None and source.digest != self._digest_of(content):
            raise ChecksumError(
                f"the weights of {self._noun} {name} do not have the digest they should have",
                metadata={self._noun: name, "expected": source.digest, "found": self._digest_of(content)},
            )

    async def _find_root(self, name: str, path: str) -> Path:
        root = await asyncio.to_thread(self._sources.root_of, path)
        if root is None:
            raise self._unknown(name)
        return root

    async def _list(self) -> set[str]:
        """The names on disk. Raises UnavailableError."""
        try:
            return await self._listing.names()
        except TimeoutError:
            raise self._too_slow(f"the {self._noun} folders", "listed") from None

    def _loading(self) -> set[str]:
        """The names that are being read."""
        return {name for name, flight in self._loads.items() if flight.is_found}

    def _on_disk(self, name: str) -> S:
        return self._to_unloaded_status(name, is_loading=name in self._loads)

    def _too_slow(self, what: str, done: str) -> UnavailableError:
        return UnavailableError(
            f"{what} could not be {done} in {self._reading.timeout_s:g} s",
            reason="LOAD_TIMED_OUT",
            retry_after_s=_SLOW_RETRY_S,
        )

    def _unstable(self, names: str) -> CapacityError:
        return CapacityError(
            f"{self._noun} {names} is evicted or replaced as often as it is loaded",
            reason=f"{self._noun.upper()}_HOST_FULL",
            retry_after_s=1.0,
        )

    def _unknown(self, name: str) -> NotFoundError:
        return NotFoundError(
            f"no {self._noun} is named {name}",
            resource_type=self._noun,
            resource_name=name,
            reason=f"{self._noun.upper()}_NOT_FOUND",
        )


async def on_borrowed_core(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Awaits `function` on a worker thread, which borrows a core of the engine's to read or to fold."""

    def run() -> T:
        with borrowed_core(_BORROWED_S):
            return function(*arguments, **options)

    return await asyncio.to_thread(run)


def _out_of_memory() -> CapacityError:
    return CapacityError(
        "the server ran out of memory while loading", reason="OUT_OF_MEMORY", retry_after_s=_MEMORY_RETRY_S
    )


def _see_exception(task: asyncio.Task[L]) -> None:
    """Keeps asyncio from reporting a failed load as unseen when every caller has gone."""
    if not task.cancelled():
        task.exception()
