"""The host tier: every loaded adapter by name, its versions, leases and pins, under one byte budget.

A name has at most one READY version, which takes new leases; older versions that still have leases are DRAINING. A
version is let go when its last lease ends. Everything here is book-keeping under one lock: reading files happens
elsewhere (`store.py`), so no call blocks for longer than a few dictionary operations.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from fusionserve import metrics
from fusionserve.adapter_status import AdapterState
from fusionserve.adapters.adapter import Adapter, AdapterContent
from fusionserve.errors import AlreadyExistsError, CapacityError


@dataclass(slots=True)
class _Entry:
    adapter: Adapter
    pinned: bool = False
    num_leases: int = 0
    state: AdapterState = AdapterState.READY
    on_gone: list[Callable[[], object]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """A snapshot of one loaded version."""

    adapter: Adapter
    state: AdapterState
    pinned: bool
    num_leases: int


class AdapterRegistry:
    """Thread-safe. `on_gone(adapter)` is called, outside the lock, when a version's weights are let go."""

    def __init__(self, budget_bytes: int, on_gone: Callable[[Adapter], None]) -> None:
        self.budget_bytes = budget_bytes
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._ready: OrderedDict[str, _Entry] = OrderedDict()  # by name, least recently used first
        self._draining: list[_Entry] = []
        self._versions: dict[str, int] = {}
        self._uids = count(1)
        metrics.ADAPTER_HOST_LIMIT_BYTES.set(budget_bytes)
        self._measure()

    def publish(self, name: str, content: AdapterContent, *, pin: bool, replace: bool) -> Adapter:
        """Makes a new READY version, atomically taking the place of the old one, which drains.

        Raises AlreadyExistsError if the name is taken and not `replace`, CapacityError if the budget cannot hold it.
        """
        gone: list[Adapter] = []
        with self._lock:
            if not replace:
                self._refuse_if_loaded(name)
            gone += self._make_room(content.nbytes, name)
            previous = self._ready.pop(name, None)
            if previous is not None:
                gone += self._retire(previous)
            entry = _Entry(
                self._mint(name, content), pinned=pin or (previous is not None and previous.pinned)
            )
            self._ready[name] = entry
            self._measure()
        self._let_go(gone)
        return entry.adapter

    def refuse_if_loaded(self, name: str) -> None:
        """Raises AlreadyExistsError if the name is taken; spares a load that could not be published."""
        with self._lock:
            self._refuse_if_loaded(name)

    def lease(self, name: str) -> Adapter | None:
        """Leases the READY version of `name`, or returns None if there is none."""
        with self._lock:
            entry = self._ready.get(name)
            if entry is None:
                return None
            entry.num_leases += 1
            self._ready.move_to_end(name)
            return entry.adapter

    def are_ready(self, adapters: Sequence[Adapter]) -> bool:
        """True if each of `adapters` is the version that takes new leases."""
        with self._lock:
            found = [(self._ready.get(adapter.name), adapter) for adapter in adapters]
            return all(entry is not None and entry.adapter is adapter for entry, adapter in found)

    def release(self, adapters: Sequence[Adapter]) -> None:
        """Ends one lease on each of `adapters`; a draining version without leases goes."""
        gone: list[Adapter] = []
        callbacks: list[Callable[[], object]] = []
        with self._lock:
            for adapter in adapters:
                entry = self._entry_of(adapter)
                assert entry.num_leases > 0, f"adapter {adapter.name} is released more often than leased"
                entry.num_leases -= 1
                if entry.num_leases == 0 and entry.state is AdapterState.DRAINING:
                    self._draining.remove(entry)
                    gone.append(entry.adapter)
                    callbacks += entry.on_gone
            if gone:
                self._measure()
        self._let_go(gone)
        for callback in callbacks:
            callback()

    def retire(self, name: str, on_gone: Callable[[], object]) -> list[RegistryEntry]:
        """Withdraws the name at once; returns its loaded versions, draining ones included, the newest first.

        `on_gone` runs once for each of them: when its last lease ends, at once if it has none.
        """
        with self._lock:
            ready = self._ready.pop(name, None)
            gone = [] if ready is None else self._retire(ready)
            draining = [entry for entry in reversed(self._draining) if entry.adapter.name == name]
            for entry in draining:
                entry.on_gone.append(on_gone)
            idle = [ready] if ready is not None and gone else []
            snapshots = [_snapshot(entry) for entry in [*idle, *draining]]
            self._measure()
        self._let_go(gone)
        for _ in gone:
            on_gone()
        return snapshots

    def get(self, name: str) -> RegistryEntry | None:
        """The READY version of `name`, else the draining one, else None."""
        with self._lock:
            entry = self._ready.get(name) or self._find_draining(name)
            return None if entry is None else _snapshot(entry)

    def entries(self) -> list[RegistryEntry]:
        """All READY versions, and the draining ones whose name has no READY version."""
        with self._lock:
            draining = [entry for entry in self._draining if entry.adapter.name not in self._ready]
            return [_snapshot(entry) for entry in [*self._ready.values(), *draining]]

    @property
    def used_bytes(self) -> int:
        """Bytes of all versions on the host, draining ones included."""
        with self._lock:
            return self._used_bytes()

    @property
    def num_leases(self) -> int:
        """Leases of all versions."""
        with self._lock:
            return sum(entry.num_leases for entry in [*self._ready.values(), *self._draining])

    def check_integrity(self, num_leases: int) -> None:
        """Asserts the number of leases, and that nothing drains without one."""
        assert self.num_leases == num_leases, f"{self.num_leases} leases, {num_leases} expected"
        with self._lock:
            assert all(entry.num_leases > 0 for entry in self._draining), "a draining adapter without leases"

    def _refuse_if_loaded(self, name: str) -> None:
        if name in self._ready:
            raise AlreadyExistsError(
                f"adapter {name} is already loaded; ask for a replacement to reload it",
                reason="ADAPTER_ALREADY_LOADED",
                metadata={"adapter": name},
            )

    def _mint(self, name: str, content: AdapterContent) -> Adapter:
        self._versions[name] = self._versions.get(name, 0) + 1
        return Adapter(next(self._uids), name, self._versions[name], content, time.time())

    def _make_room(self, num_bytes: int, replaced: str) -> list[Adapter]:
        """Evicts idle, unpinned adapters, least recently used first; raises CapacityError if that is not enough."""
        reusable = self._ready.get(replaced)
        freed_by_replacing = reusable.adapter.content.nbytes if reusable and reusable.num_leases == 0 else 0
        excess = self._used_bytes() + num_bytes - freed_by_replacing - self.budget_bytes
        victims: list[str] = []
        for name, entry in self._ready.items():
            if excess <= 0:
                break
            if entry.num_leases == 0 and not entry.pinned and name != replaced:
                victims.append(name)
                excess -= entry.adapter.content.nbytes
        if excess > 0:
            raise CapacityError(
                "the adapters in use and pinned leave no room on the host",
                reason="ADAPTER_HOST_FULL",
                retry_after_s=1.0,
            )
        metrics.ADAPTER_EVICTIONS.labels("host").inc(len(victims))
        return [self._ready.pop(name).adapter for name in victims]

    def _retire(self, entry: _Entry) -> list[Adapter]:
        if entry.num_leases == 0:
            return [entry.adapter]
        entry.state = AdapterState.DRAINING
        self._draining.append(entry)
        return []

    def _entry_of(self, adapter: Adapter) -> _Entry:
        entry = self._ready.get(adapter.name)
        if entry is not None and entry.adapter is adapter:
            return entry
        return next(entry for entry in self._draining if entry.adapter is adapter)

    def _find_draining(self, name: str) -> _Entry | None:
        return next((entry for entry in reversed(self._draining) if entry.adapter.name == name), None)

    def _used_bytes(self) -> int:
        return sum(entry.adapter.content.nbytes for entry in [*self._ready.values(), *self._draining])

    def _measure(self) -> None:
        metrics.ADAPTER_HOST_BYTES.set(self._used_bytes())
        metrics.ADAPTERS.labels(AdapterState.READY.value).set(len(self._ready))
        metrics.ADAPTERS.labels(AdapterState.DRAINING.value).set(len(self._draining))

    def _let_go(self, adapters: Sequence[Adapter]) -> None:
        for adapter in adapters:
            self._on_gone(adapter)


def _snapshot(entry: _Entry) -> RegistryEntry:
    return RegistryEntry(entry.adapter, entry.state, entry.pinned, entry.num_leases)
