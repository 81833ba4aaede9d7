"""The host tier: whatever is loaded by name, its versions, leases and pins, under one byte budget.

Adapters have one registry, fusions another. A name has at most one READY version, which takes new leases; older ones
that still have leases are DRAINING. A version is let go when its last lease ends. Everything here is book-keeping under
one lock: reading files happens elsewhere (`artifact_store.py`), so no call blocks for longer than a few dictionary
operations.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from fusionserve.adapter_status import AdapterState
from fusionserve.errors import AlreadyExistsError, CapacityError
from fusionserve.failpoints import reach_failpoint
from fusionserve.metrics import HostMetrics


class Content(Protocol):
    """What reading a directory gives."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the host."""


class Loaded(Protocol):
    """One loaded version of a name: immutable, its `uid` never reused."""

    @property
    def uid(self) -> int:
        """Its identity among everything that was ever loaded."""

    @property
    def name(self) -> str:
        """The name it was loaded under."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the host."""


C = TypeVar("C", bound=Content)
L = TypeVar("L", bound=Loaded)


@dataclass(slots=True)
class _Entry(Generic[L]):
    loaded: L
    pinned: bool = False
    num_leases: int = 0
    state: AdapterState = AdapterState.READY
    on_gone: list[Callable[[], object]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RegistryEntry(Generic[L]):
    """A snapshot of one loaded version."""

    loaded: L
    state: AdapterState
    pinned: bool
    num_leases: int


class HostRegistry(Generic[C, L]):
    """Thread-safe. `on_gone(loaded)` is called, outside the lock, when a version's weights are let go.

    `mint(uid, name, version, content, load_time_s)` makes a version; `noun` names its kind in errors; `uids` are shared
    by all registries whose content meets in one pool.
    """

    def __init__(
        self,
        noun: str,
        mint: Callable[[int, str, int, C, float], L],
        budget_bytes: int,
        on_gone: Callable[[L], None],
        *,
        uids: Iterator[int],
        host_metrics: HostMetrics,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._noun = noun
        self._mint_version = mint
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._ready: OrderedDict[str, _Entry[L]] = OrderedDict()  # by name, least recently used first
        self._draining: list[_Entry[L]] = []
        self._versions: dict[str, int] = {}
        self._uids = uids
        self._metrics = host_metrics
        host_metrics.limit_bytes.set(budget_bytes)
        self._measure()

    def publish(self, name: str, content: C, *, pin: bool | None, replace: bool) -> L:
        """Makes a new READY version, atomically taking the place of the old one, which drains.

        It is pinned if the old one was, unless `pin` says.
        Raises AlreadyExistsError if the name is taken and not `replace`, CapacityError if the budget cannot hold it.
        """
        gone: list[L] = []
        reach_failpoint("host.publish")
        with self._lock:
            if not replace:
                self._refuse_if_loaded(name)
            gone += self._make_room(content.nbytes, name)
            previous = self._ready.pop(name, None)
            if previous is not None:
                gone += self._retire(previous)
            if pin is None:
                pin = previous is not None and previous.pinned
            entry = _Entry(self._mint(name, content), pinned=pin)
            self._ready[name] = entry
            self._measure()
        self._let_go(gone)
        return entry.loaded

    def refuse_if_loaded(self, name: str) -> None:
        """Raises AlreadyExistsError if the name is taken; spares a load that could not be published."""
        with self._lock:
            self._refuse_if_loaded(name)

    def lease(self, name: str) -> L | None:
        """Leases the READY version of `name`, or returns None if there is none."""
        with self._lock:
            entry = self._ready.get(name)
            if entry is None:
                return None
            entry.num_leases += 1
            self._metrics.leases.set(self._num_leases())
            self._ready.move_to_end(name)
            return entry.loaded

    def idle(self) -> list[L]:
        """The READY versions without a lease or a pin, least recently used first."""
        with self._lock:
            return [entry.loaded for entry in self._ready.values() if _is_idle(entry)]

    def evict(self, versions: Sequence[L]) -> None:
        """Lets go of those of `versions` that are still idle."""
        with self._lock:
            idle = [
                name for name, entry in self._ready.items() if _is_idle(entry) and entry.loaded in versions
            ]
            gone = self._evict(idle)
            self._measure()
        self._let_go(gone)

    def evictable(self, replaced: str, released: Sequence[L]) -> list[L]:
        """What could make way for a new version of the name `replaced` once a lease on each of `released` has ended."""
        ended = Counter(loaded.uid for loaded in released)
        with self._lock:
            idle = [e for e in self._entries() if e.num_leases == ended[e.loaded.uid]]
            return [e.loaded for e in idle if not e.pinned or _is_on_its_way_out(e, replaced)]

    def are_ready(self, versions: Sequence[L]) -> bool:
        """True if each of `versions` is the one of its name that takes new leases."""
        with self._lock:
            found = [(self._ready.get(loaded.name), loaded) for loaded in versions]
            return all(entry is not None and entry.loaded is loaded for entry, loaded in found)

    def release(self, versions: Sequence[L]) -> None:
        """Ends one lease on each of `versions`; a draining one without leases goes."""
        gone: list[L] = []
        callbacks: list[Callable[[], object]] = []
        with self._lock:
            for loaded in versions:
                entry = self._entry_of(loaded)
                assert entry.num_leases > 0, f"{self._noun} {loaded.name} is released more often than leased"
                entry.num_leases -= 1
                if entry.num_leases == 0 and entry.state is AdapterState.DRAINING:
                    self._draining.remove(entry)
                    gone.append(entry.loaded)
                    callbacks += entry.on_gone
            self._metrics.leases.set(self._num_leases())
            if gone:
                self._measure()
        self._let_go(gone)
        for callback in callbacks:
            callback()

    def retire(self, name: str, on_gone: Callable[[], object]) -> list[RegistryEntry[L]]:
        """Withdraws the name at once; returns its loaded versions, draining ones included, the newest first.

        `on_gone` runs once for each of them: when its last lease ends, at once if it has none.
        """
        with self._lock:
            ready = self._ready.pop(name, None)
            gone = [] if ready is None else self._retire(ready)
            draining = [entry for entry in reversed(self._draining) if entry.loaded.name == name]
            for entry in draining:
                entry.on_gone.append(on_gone)
            idle = [ready] if ready is not None and gone else []
            snapshots = [_snapshot(entry) for entry in [*idle, *draining]]
            self._measure()
        self._let_go(gone)
        for _ in gone:
            on_gone()
        return snapshots

    def get(self, name: str) -> RegistryEntry[L] | None:
        """The READY version of `name`, else the draining one, else None."""
        with self._lock:
            entry = self._ready.get(name) or self._find_draining(name)
            return None if entry is None else _snapshot(entry)

    def entries(self) -> list[RegistryEntry[L]]:
        """All READY versions, and the draining ones whose name has no READY version."""
        with self._lock:
            draining = [entry for entry in self._draining if entry.loaded.name not in self._ready]
            return [_snapshot(entry) for entry in [*self._ready.values(), *draining]]

    def versions(self) -> list[L]:
        """Every version on the host, draining ones included."""
        with self._lock:
            return [entry.loaded for entry in self._entries()]

    @property
    def used_bytes(self) -> int:
        """Bytes of all versions on the host, draining ones included."""
        with self._lock:
            return self._used_bytes()

    @property
    def num_leases(self) -> int:
        """Leases of all versions."""
        with self._lock:
            return self._num_leases()

    def check_integrity(self, num_leases: int) -> None:
        """Asserts the number of leases, and that nothing drains without one."""
        assert self.num_leases == num_leases, f"{self.num_leases} leases, {num_leases} expected"
        with self._lock:
            assert all(entry.num_leases > 0 for entry in self._draining), "something drains without leases"

    def _refuse_if_loaded(self, name: str) -> None:
        if name in self._ready:
            raise AlreadyExistsError(
                f"{self._noun} {name} is already loaded; ask for a replacement to reload it",
                reason=f"{self._noun.upper()}_ALREADY_LOADED",
                metadata={self._noun: name},
            )

    def _mint(self, name: str, content: C) -> L:
        self._versions[name] = self._versions.get(name, 0) + 1
        return self._mint_version(next(self._uids), name, self._versions[name], content, time.time())

    def _make_room(self, num_bytes: int, replaced: str) -> list[L]:
        """Evicts what is idle and not pinned, least recently used first; raises CapacityError if that is not enough."""
        reusable = self._ready.get(replaced)
        freed_by_replacing = reusable.loaded.nbytes if reusable and reusable.num_leases == 0 else 0
        excess = self._used_bytes() + num_bytes - freed_by_replacing - self.budget_bytes
        victims: list[str] = []
        for name, entry in self._ready.items():
            if excess <= 0:
                break
            if _is_idle(entry) and name != replaced:
                victims.append(name)
                excess -= entry.loaded.nbytes
        if excess > 0:
            raise CapacityError(
                f"the {self._noun}s in use and pinned leave no room on the host",
                reason=f"{self._noun.upper()}_HOST_FULL",
                retry_after_s=1.0,
            )
        return self._evict(victims)

    def _evict(self, names: Sequence[str]) -> list[L]:
        if names:
            reach_failpoint("host.evict")
        self._metrics.evictions.inc(len(names))
        return [self._ready.pop(name).loaded for name in names]

    def _retire(self, entry: _Entry[L]) -> list[L]:
        if entry.num_leases == 0:
            return [entry.loaded]
        entry.state = AdapterState.DRAINING
        self._draining.append(entry)
        return []

    def _entry_of(self, loaded: L) -> _Entry[L]:
        entry = self._ready.get(loaded.name)
        if entry is not None and entry.loaded is loaded:
            return entry
        return next(entry for entry in self._draining if entry.loaded is loaded)

    def _find_draining(self, name: str) -> _Entry[L] | None:
        return next((entry for entry in reversed(self._draining) if entry.loaded.name == name), None)

    def _entries(self) -> list[_Entry[L]]:
        return [*self._ready.values(), *self._draining]

    def _used_bytes(self) -> int:
        return sum(entry.loaded.nbytes for entry in self._entries())

    def _num_leases(self) -> int:
        return sum(entry.num_leases for entry in self._entries())

    def _measure(self) -> None:
        self._metrics.used_bytes.set(self._used_bytes())
        self._metrics.states.labels(AdapterState.READY.value).set(len(self._ready))
        self._metrics.states.labels(AdapterState.DRAINING.value).set(len(self._draining))

    def _let_go(self, versions: Sequence[L]) -> None:
        for loaded in versions:
            self._on_gone(loaded)


def _is_idle(entry: _Entry[L]) -> bool:
    return entry.num_leases == 0 and not entry.pinned


def _is_on_its_way_out(entry: _Entry[L], replaced: str) -> bool:
    """True if its last lease is all that keeps it, pinned or not."""
    return entry.state is AdapterState.DRAINING or entry.loaded.name == replaced


def _snapshot(entry: _Entry[L]) -> RegistryEntry[L]:
    return RegistryEntry(entry.loaded, entry.state, entry.pinned, entry.num_leases)
