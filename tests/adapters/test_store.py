"""Names to adapters: where files are found, one load per name at a time, and what a listing says."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from adapter_disk import SIZE, Disk, digest_of, forget
from loose_adapters import FIRST, make_content, make_lora

from fusionserve import metrics
from fusionserve.adapter_status import AdapterState, Residency
from fusionserve.adapters import artifact_sources
from fusionserve.adapters.adapter import Adapter, AdapterContent
from fusionserve.adapters.artifact_directory import ArtifactDirectory
from fusionserve.adapters.artifact_sources import ArtifactSources
from fusionserve.adapters.name_listing import NameListing
from fusionserve.adapters.registry import AdapterRegistry
from fusionserve.adapters.store import AdapterStore
from fusionserve.artifact_folders import ADAPTER_CONFIG
from fusionserve.errors import (
    AlreadyExistsError,
    ArtifactError,
    CapacityError,
    ChecksumError,
    NotFoundError,
    UnavailableError,
)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.fixture
async def store(disk: Disk) -> AsyncIterator[AdapterStore]:
    store = AdapterStore(AdapterRegistry(8 * SIZE, forget), disk.roots, disk.load_content)
    yield store
    disk.gate.set()
    await store.close(5)
    store.registry.check_integrity(0)
    assert store._loads == {}


async def reading(disk: Disk, num_reads: int) -> None:
    """Waits until the reader has been called `num_reads` times."""
    async with asyncio.timeout(10):
        while disk.num_reads < num_reads:
            await asyncio.sleep(0.001)


async def test_first_root_with_the_directory_wins(disk: Disk, store: AdapterStore) -> None:
    disk.write("a", "1", root=0)
    disk.write("a", "2", root=1)
    disk.write("b", "3", root=1)
    leased = await store.lease(["a", "b"])
    assert [adapter.weights.max_rank for adapter in leased] == [1, 3]
    store.registry.release(leased)


async def test_empty_directory_shadows_no_adapter(disk: Disk, store: AdapterStore) -> None:
    for name in ("a", "empty"):
        (disk.roots[0] / name).mkdir()
    disk.write("a", "2", root=1)
    store.registry.release(await store.lease(["a"]))
    with pytest.raises(ArtifactError) as refusal:
        await store.lease(["empty"])
    assert refusal.value.reason == "CONFIG_MISSING"


async def test_lease_is_all_or_nothing(disk: Disk, store: AdapterStore) -> None:
    disk.write("a")
    disk.write("broken", "?")
    for second in ("nobody", "broken"):
        with pytest.raises((NotFoundError, ArtifactError)):
            await store.lease(["a", second])
        store.registry.check_integrity(0)


async def test_concurrent_leases_read_once(disk: Disk, store: AdapterStore) -> None:
    disk.write("a")
    before = metrics.ADAPTER_LOADS._value.get()
    disk.gate.clear()
    leases = [asyncio.create_task(store.lease(["a"])) for _ in range(10)]
    await reading(disk, 1)
    disk.gate.set()
    adapters = [adapter for lease in leases for adapter in await lease]
    assert len(set(adapters)) == 1
    assert (disk.num_reads, metrics.ADAPTER_LOADS._value.get() - before) == (1, 1)
    store.registry.release(adapters)


async def test_failed_load_fails_all_who_wait_and_is_tried_again(disk: Disk, store: AdapterStore) -> None:
    disk.write("a", "?")
    failures = metrics.ADAPTER_LOAD_FAILURES.labels("CONFIG_INVALID")._value
    before = failures.get()
    disk.gate.clear()
    leases = [asyncio.create_task(store.lease(["a"])) for _ in range(3)]
    await reading(disk, 1)
    disk.gate.set()
    results = await asyncio.gather(*leases, return_exceptions=True)
    assert [type(result) for result in results] == [ArtifactError] * 3
    assert failures.get() - before == 1
    disk.write("a", "2")
    store.registry.release(await store.lease(["a"]))


async def test_at_most_two_loads_at_a_time(disk: Disk, store: AdapterStore) -> None:
    for name in "abcde":
        disk.write(name)
    disk.gate.clear()
    leases = [asyncio.create_task(store.lease([name])) for name in "abcde"]
    await reading(disk, 2)
    await asyncio.sleep(0.02)
    disk.gate.set()
    for lease in leases:
        store.registry.release(await lease)
    assert disk.most_reading == 2


async def test_explicit_load_waits_for_the_one_under_way(disk: Disk, store: AdapterStore) -> None:
    """The files may have changed since it was read, and pin and path are the command's own."""
    disk.write("a", "1")
    disk.gate.clear()
    lease = asyncio.create_task(store.lease(["a"]))
    await reading(disk, 1)
    disk.write("a", "2")
    loads = [asyncio.create_task(store.load("a", None, pin=True, replace=True)) for _ in range(2)]
    late = asyncio.create_task(store.load("a", None, pin=False, replace=False))
    await asyncio.sleep(0.01)
    disk.gate.set()
    (first,) = await lease
    assert [(adapter.version, adapter.weights.max_rank) for adapter in await asyncio.gather(*loads)] == [
        (2, 2),
        (3, 2),
    ]
    assert (first.version, first.weights.max_rank) == (1, 1)
    with pytest.raises(AlreadyExistsError):
        await late
    entry = store.registry.get("a")
    assert entry is not None
    assert entry.pinned
    store.registry.release([first])


async def test_same_first_load_asked_for_twice_is_one_load(disk: Disk, store: AdapterStore) -> None:
    disk.write("a")
    disk.gate.clear()
    loads = [asyncio.create_task(store.load("a", None, pin=False, replace=False)) for _ in range(2)]
    await reading(disk, 1)
    disk.gate.set()
    first, second = await asyncio.gather(*loads)
    assert first is second


async def test_member_replaced_while_another_loads_is_leased_anew(disk: Disk, store: AdapterStore) -> None:
    disk.write("a")
    disk.write("b")
    await store.load("a", None, pin=False, replace=False)
    disk.gate.clear()
    lease = asyncio.create_task(store.lease(["a", "b"]))
    await reading(disk, 2)
    store.registry.publish("a", make_content({FIRST: make_lora(1, seed=9)}), pin=False, replace=True)
    disk.gate.set()
    leased = await lease
    assert [(adapter.name, adapter.version) for adapter in leased] == [("a", 2), ("b", 1)]
    store.registry.release(leased)


async def test_adapters_evicted_as_fast_as_they_load_end_in_capacity(disk: Disk) -> None:
    for name in "ab":
        disk.write(name, "5")
    store = AdapterStore(AdapterRegistry(5 * SIZE, forget), disk.roots, disk.load_content)
    with pytest.raises(CapacityError) as refusal:
        await store.lease(["a", "b"])
    assert refusal.value.reason == "ADAPTER_HOST_FULL"
    store.registry.check_integrity(0)
    store.registry.release(await store.lease(["b"]))


@pytest.mark.parametrize(("path", "digest"), [("typo", None), (None, digest_of("2"))])
async def test_use_does_not_fail_by_what_is_wrong_with_a_command(
    disk: Disk, store: AdapterStore, path: str | None, digest: str | None
) -> None:
    disk.write("a", "1")
    disk.write("typo", "broken")
    disk.gate.clear()
    command = asyncio.create_task(store.load("a", path, pin=False, replace=False, digest=digest))
    await reading(disk, 1)
    lease = asyncio.create_task(store.lease(["a"]))
    await asyncio.sleep(0.01)
    disk.gate.set()
    store.registry.release(await lease)
    with pytest.raises((ArtifactError, ChecksumError)):
        await command


@pytest.mark.parametrize("ask", ["load", "use"])
async def test_failed_load_leaves_nothing_to_the_collector(ask: str, disk: Disk, store: AdapterStore) -> None:
    """Else what a broken file was read into stays until a full collection."""
    disk.write("broken", "no number")
    read: list[weakref.ref[ArtifactDirectory]] = []

    def load(directory: ArtifactDirectory) -> AdapterContent:
        read.append(weakref.ref(directory))
        return disk.load_content(directory)

    store._load_content = load
    asked = store.lease(["broken"]) if ask == "use" else store.load("broken", None, pin=False, replace=True)
    gc.collect()
    gc.disable()
    try:
        try:
            await asked
        except ArtifactError as error:
            error.__traceback__ = None  # as the server lets go of what it has told
        await asyncio.sleep(0.01)
        assert [directory() for directory in read] == [None]
    finally:
        gc.enable()


@pytest.fixture
async def hung_listing(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[int]]:
    """Whoever lists a folder waits for the end of the test; how many do."""
    gate, waiting = threading.Event(), [0]

    def list_names(root: Path, config_file: str) -> list[str]:
        waiting[0] += 1
        gate.wait(20)
        return []

    monkeypatch.setattr(artifact_sources, "list_artifact_names", list_names)
    yield waiting
    gate.set()


async def test_listing_that_hangs_takes_one_thread_and_loads_go_on(
    disk: Disk, store: AdapterStore, hung_listing: list[int]
) -> None:
    disk.write("a")
    for ask in 10 * (lambda: store.statuses(frozenset()), lambda: store.status("nobody", frozenset())):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(), 0.01)
    assert hung_listing == [1]
    store.registry.release(await asyncio.wait_for(store.lease(["a"]), 5))


async def test_listing_that_hangs_is_unavailable_and_unloads_all_the_same(
    disk: Disk, hung_listing: list[int]
) -> None:
    disk.write("a")
    registry = AdapterRegistry(8 * SIZE, forget)
    store = AdapterStore(registry, disk.roots, disk.load_content)
    await store.load("a", None, pin=False, replace=False)
    store._listing = NameListing(store._sources.names_on_disk, timeout_s=0.05)
    for ask in (store.statuses(frozenset()), store.status("nobody", frozenset())):
        with pytest.raises(UnavailableError, match="adapter folders could not be listed") as refusal:
            await ask
        assert refusal.value.reason == "LOAD_TIMED_OUT"
    assert (await store.status("a", frozenset())).state is AdapterState.READY
    await store.unload("a", forget)
    assert registry.get("a") is None


async def test_operators_directory_need_not_lie_under_a_root(
    disk: Disk, store: AdapterStore, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ADAPTER_CONFIG).write_text("3")
    adapter = await store.load_from("named", tmp_path / "elsewhere")
    assert adapter.weights.max_rank == 3
    assert (await store.status("named", frozenset([adapter.uid]))).residency is Residency.DEVICE
    final = await store.unload("named", forget)
    assert (final.state, final.residency) == (AdapterState.DRAINING, Residency.DISK)
    with pytest.raises(NotFoundError):
        await store.lease(["named"])


@pytest.mark.parametrize("path", ["../one/a", "/etc", "a/../a", "nobody", "", "a/./b"])
async def test_path_outside_the_roots_is_refused(disk: Disk, store: AdapterStore, path: str) -> None:
    disk.write("a")
    with pytest.raises((ArtifactError, NotFoundError)) as refusal:
        await store.load("a", path, pin=False, replace=False)
    assert str(disk.roots[0]) not in refusal.value.message
    assert store.registry.entries() == []


async def test_statuses_list_all_that_is_loaded_or_on_disk(disk: Disk, store: AdapterStore) -> None:
    for name in ("a", "b", "Not-A-Name"):
        disk.write(name)
    (disk.roots[0] / "empty").mkdir()
    disk.write("c", root=1)
    leased = await store.lease(["a"])
    disk.gate.clear()
    lease = asyncio.create_task(store.lease(["c"]))
    await reading(disk, 2)
    statuses = {status.name: status for status in await store.statuses(frozenset())}
    disk.gate.set()
    states = {name: status.state for name, status in statuses.items()}
    assert states == {"a": AdapterState.READY, "b": AdapterState.AVAILABLE, "c": AdapterState.LOADING}
    assert (statuses["a"].active_requests, statuses["a"].host_bytes) == (1, SIZE)
    with pytest.raises(NotFoundError):
        await store.status("nobody", frozenset())
    store.registry.release([*leased, *await lease])


async def test_name_that_is_asked_for_and_not_there_is_not_loading(
    disk: Disk, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, gate = threading.Event(), threading.Event()
    find = ArtifactSources.root_of

    def find_late(sources: ArtifactSources, path: str) -> Path | None:
        looking.set()
        assert gate.wait(20)
        return find(sources, path)

    monkeypatch.setattr(ArtifactSources, "root_of", find_late)
    lease = asyncio.create_task(store.lease(["nobody"]))
    await asyncio.to_thread(looking.wait, 10)
    try:
        with pytest.raises(NotFoundError):
            await store.status("nobody", frozenset())
        assert await store.statuses(frozenset()) == []
    finally:
        gate.set()
    with pytest.raises(NotFoundError):
        await lease


async def test_adapter_from_another_folder_is_loading_once_it_is_found(
    disk: Disk, store: AdapterStore
) -> None:
    disk.write("folder")
    disk.gate.clear()
    load = asyncio.create_task(store.load("a", "folder", pin=False, replace=False))
    await reading(disk, 1)
    states = [(status.name, status.state) for status in await store.statuses(frozenset())]
    assert states == [("a", AdapterState.LOADING), ("folder", AdapterState.AVAILABLE)]
    assert (await store.status("a", frozenset())).state is AdapterState.LOADING
    disk.gate.set()
    await load


async def test_reserved_name_on_disk_is_told_of_once_and_not_listed(
    disk: Disk, store: AdapterStore, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "base", "other"):
        disk.write(name)
    for _ in range(2):
        assert [status.name for status in await store.statuses(frozenset())] == ["a"]
    assert [caplog.text.count(f"{name} is a reserved name") for name in ("base", "other")] == [1, 1]


async def test_unload_waits_for_leases_and_survives_its_callers_departure(
    disk: Disk, store: AdapterStore
) -> None:
    disk.write("a")
    leased = await store.lease(["a"])
    retired: list[Adapter] = []
    impatient = asyncio.create_task(store.unload("a", retired.append))
    patient = asyncio.create_task(store.unload("a", retired.append))
    await asyncio.sleep(0.01)
    impatient.cancel()
    await asyncio.wait([impatient])
    assert not patient.done()
    store.registry.release(leased)
    assert (await asyncio.wait_for(patient, 5)).state is AdapterState.AVAILABLE
    assert retired == [*leased, *leased]


async def test_removed_root_has_no_adapters(disk: Disk, store: AdapterStore) -> None:
    disk.write("b", root=0)
    disk.roots[1].rmdir()
    assert [status.name for status in await store.statuses(frozenset())] == ["b"]
    with pytest.raises(NotFoundError):
        await store.lease(["nobody"])
