"""Versions, leases, draining, the byte budget, and all of it from several threads."""

from __future__ import annotations

import random
import threading

import pytest
from loose_adapters import FIRST, make_content, make_lora

from fusionserve import metrics
from fusionserve.adapter_status import AdapterState
from fusionserve.adapters.adapter import Adapter, AdapterContent
from fusionserve.adapters.registry import AdapterRegistry
from fusionserve.errors import AlreadyExistsError, CapacityError


def content(rank: int = 1) -> AdapterContent:
    return make_content({FIRST: make_lora(rank, seed=rank)})


SIZE = content().nbytes


class Watched:
    """A registry with room for `room` adapters of rank 1, and the names and versions it let go."""

    def __init__(self, room: int = 4) -> None:
        self.gone: list[tuple[str, int]] = []
        self.registry = AdapterRegistry(room * SIZE, self._note)

    def _note(self, adapter: Adapter) -> None:
        self.registry.get(adapter.name)  # would hang if this were called under the lock
        self.gone.append((adapter.name, adapter.version))

    def publish(self, name: str, rank: int = 1, *, pin: bool | None = None, replace: bool = False) -> Adapter:
        return self.registry.publish(name, content(rank), pin=pin, replace=replace)

    def lease(self, name: str) -> Adapter:
        adapter = self.registry.lease(name)
        assert adapter is not None
        return adapter

    @property
    def names(self) -> set[str]:
        return {entry.loaded.name for entry in self.registry.entries()}


def test_lease_counts_and_is_given_back() -> None:
    watched = Watched()
    adapter = watched.publish("a")
    assert watched.lease("a") is adapter
    assert watched.lease("a") is adapter
    assert watched.registry.lease("b") is None
    watched.registry.check_integrity(2)
    watched.registry.release([adapter, adapter])
    watched.registry.check_integrity(0)
    with pytest.raises(AssertionError, match="more often"):
        watched.registry.release([adapter])


def test_versions_grow_per_name_and_uids_are_never_reused() -> None:
    watched = Watched()
    adapters = [watched.publish("a"), watched.publish("b"), watched.publish("a", replace=True)]
    watched.registry.retire("a", lambda: None)
    adapters.append(watched.publish("a"))
    assert [adapter.version for adapter in adapters] == [1, 1, 2, 3]
    assert len({adapter.uid for adapter in adapters}) == 4


def test_taken_name_is_refused_unless_replacing() -> None:
    watched = Watched()
    watched.publish("a")
    with pytest.raises(AlreadyExistsError):
        watched.publish("a")
    with pytest.raises(AlreadyExistsError):
        watched.registry.refuse_if_loaded("a")
    watched.registry.refuse_if_loaded("b")
    assert watched.gone == []


def test_replaced_version_drains_until_its_last_lease() -> None:
    watched = Watched()
    old = watched.publish("a")
    leases = [watched.lease("a"), watched.lease("a")]
    new = watched.publish("a", replace=True)
    assert watched.lease("a") is new
    assert not watched.registry.are_ready([old])
    assert watched.registry.are_ready([new])
    assert watched.registry.used_bytes == 2 * SIZE
    watched.registry.release([leases[0]])
    assert watched.gone == []
    watched.registry.release([leases[1]])
    assert watched.gone == [("a", 1)]
    entry = watched.registry.get("a")
    assert entry is not None
    assert (entry.loaded, entry.state, entry.num_leases) == (new, AdapterState.READY, 1)
    watched.registry.release([new])


def test_idle_version_goes_at_once_when_replaced() -> None:
    watched = Watched(room=1)
    watched.publish("a")
    watched.publish("a", replace=True)
    assert watched.gone == [("a", 1)]
    assert watched.registry.used_bytes == SIZE


def test_retire_of_an_idle_adapter_is_immediate() -> None:
    watched = Watched()
    watched.publish("a")
    told: list[str] = []
    entries = watched.registry.retire("a", lambda: told.append("gone"))
    assert [(entry.loaded.name, entry.num_leases) for entry in entries] == [("a", 0)]
    assert (told, watched.gone, watched.names) == (["gone"], [("a", 1)], set())
    assert watched.registry.retire("a", lambda: told.append("again")) == []
    assert told == ["gone"]


def test_retire_waits_for_leases_and_tells_everyone_who_asked() -> None:
    watched = Watched()
    adapter = watched.publish("a")
    watched.lease("a")
    told: list[str] = []
    watched.registry.retire("a", lambda: told.append("first"))
    assert watched.registry.lease("a") is None
    entry = watched.registry.get("a")
    assert entry is not None
    assert entry.state is AdapterState.DRAINING
    (again,) = watched.registry.retire("a", lambda: told.append("second"))
    assert again.state is AdapterState.DRAINING
    assert (told, watched.names) == ([], {"a"})
    watched.registry.release([adapter])
    assert (told, watched.names) == (["first", "second"], set())
    watched.registry.check_integrity(0)


def test_retire_covers_every_version_newest_first() -> None:
    watched = Watched()
    versions = []
    for _ in range(2):
        versions.append(watched.publish("a", replace=True))
        watched.lease("a")
    watched.publish("a", replace=True)
    told: list[int] = []
    entries = watched.registry.retire("a", lambda: told.append(len(watched.gone)))
    assert [entry.loaded.version for entry in entries] == [3, 2, 1]
    assert (told, watched.gone) == ([1], [("a", 3)])
    for adapter in versions:
        watched.registry.release([adapter])
    assert told == [1, 2, 3]


def test_name_stands_for_its_newest_version() -> None:
    watched = Watched()
    old = watched.publish("a")
    watched.lease("a")
    new = watched.publish("a", replace=True)
    entries = [(entry.loaded, entry.state) for entry in watched.registry.entries()]
    assert entries == [(new, AdapterState.READY)], "the old one drains"
    watched.lease("a")
    watched.registry.retire("a", lambda: None)
    entry = watched.registry.get("a")
    assert entry is not None and entry.loaded is new
    watched.registry.release([old, new])


def test_gauge_shows_the_bytes_on_the_host() -> None:
    watched = Watched()

    def shown() -> float:
        return metrics.ADAPTER_HOST.used_bytes._value.get() / SIZE

    drained = watched.publish("a")
    watched.lease("a")
    evicted = watched.publish("b")
    watched.registry.retire("a", lambda: None)
    assert shown() == 2
    watched.registry.release([drained])
    assert shown() == 1
    watched.registry.evict([evicted])
    assert shown() == 0


def test_least_recently_leased_idle_adapters_make_room() -> None:
    watched = Watched(room=3)
    for name in "abc":
        watched.publish(name)
    watched.registry.release([watched.lease("a")])
    busy = watched.lease("b")
    watched.publish("d", rank=2)
    assert (watched.gone, watched.names) == ([("c", 1), ("a", 1)], {"b", "d"})
    with pytest.raises(CapacityError) as refusal:
        watched.publish("e", rank=3)
    assert refusal.value.reason == "ADAPTER_HOST_FULL"
    assert watched.names == {"b", "d"}, "a refused load evicts nobody"
    watched.registry.release([busy])
    watched.publish("e", rank=3)
    assert watched.names == {"e"}


def test_pinned_adapters_stay_and_keep_their_pin_when_replaced_unless_it_is_taken() -> None:
    watched = Watched(room=2)
    watched.publish("a", pin=True)
    watched.publish("b")
    watched.publish("c")
    assert watched.names == {"a", "c"}
    watched.publish("a", replace=True)
    watched.publish("d")
    assert watched.names == {"a", "d"}
    with pytest.raises(CapacityError):
        watched.publish("e", rank=2)
    watched.publish("a", pin=False, replace=True)
    watched.publish("e", rank=2)


def test_replacing_counts_the_old_version_only_while_it_is_leased() -> None:
    watched = Watched(room=2)
    watched.publish("a", rank=2)
    old = watched.lease("a")
    with pytest.raises(CapacityError):
        watched.publish("a", rank=2, replace=True)
    assert watched.registry.are_ready([old]), "a refused replacement leaves the old version in place"
    watched.registry.release([old])
    watched.publish("a", rank=2, replace=True)
    assert watched.gone == [("a", 1)]


def test_draining_versions_count_against_the_budget() -> None:
    watched = Watched(room=1)
    adapter = watched.publish("a")
    watched.lease("a")
    watched.registry.retire("a", lambda: None)
    with pytest.raises(CapacityError):
        watched.publish("b")
    watched.registry.release([adapter])
    watched.publish("b")


def test_threads_agree_on_leases_and_bytes() -> None:
    """Leases, reloads and unloads from six threads: every version goes exactly once, after its last lease."""
    watched = Watched(room=3)
    registry = watched.registry
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(400):
                name = chance.choice("abcd")
                kind = chance.random()
                if kind < 0.3:
                    try:
                        registry.publish(name, content(), pin=False, replace=True)
                    except CapacityError:
                        continue
                elif kind < 0.4:
                    registry.retire(name, lambda: None)
                else:
                    adapter = registry.lease(name)
                    if adapter is not None:
                        assert (adapter.name, adapter.version) not in watched.gone
                        assert registry.used_bytes <= registry.budget_bytes
                        registry.release([adapter])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    registry.check_integrity(0)
    assert len(watched.gone) == len(set(watched.gone))
    assert registry.used_bytes == len(registry.entries()) * SIZE
