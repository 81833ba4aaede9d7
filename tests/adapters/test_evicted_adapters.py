"""Evicted adapters come back from where they were, and as what they were, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from adapter_disk import SIZE, Disk, digest_of, forget

from fusionserve.adapter_status import AdapterState
from fusionserve.adapters.registry import AdapterRegistry
from fusionserve.adapters.store import AdapterStore
from fusionserve.errors import ChecksumError, NotFoundError


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


async def store_without_a(disk: Disk, path: str | None, digest: str | None = None) -> AdapterStore:
    """One that has loaded `a` from the path and evicted it for `b`, for there is room for one of the two."""
    disk.write("b", "5")
    store = AdapterStore(AdapterRegistry(5 * SIZE, forget), disk.roots, disk.load_content)
    await store.load("a", path, pin=False, replace=False, digest=digest)
    await evict_a(store)
    return store


async def evict_a(store: AdapterStore) -> None:
    store.registry.release(await store.lease(["b"]))
    assert store.registry.get("a") is None


async def test_evicted_adapter_comes_back_from_where_it_was(disk: Disk) -> None:
    disk.write("a", "5")
    disk.write("hidden/a", "4")
    store = await store_without_a(disk, "hidden/a")
    assert (await store.status("a", frozenset())).state is AdapterState.AVAILABLE
    (again,) = await store.lease(["a"])
    assert (again.version, again.weights.max_rank) == (2, 4)
    store.registry.release([again])
    await store.unload("a", forget)
    (default,) = await store.lease(["a"])  # an unloaded name is found under its own name again
    assert default.weights.max_rank == 5
    store.registry.release([default])


async def test_evicted_name_that_came_from_elsewhere_is_forgotten_by_an_unload(disk: Disk) -> None:
    disk.write("hidden/a", "4")
    store = await store_without_a(disk, "hidden/a")
    assert [status.name for status in await store.statuses(frozenset())] == ["a", "b"]
    gone = await store.unload("a", forget)
    assert (gone.name, gone.version, gone.state) == ("a", 0, AdapterState.DRAINING)
    assert [status.name for status in await store.statuses(frozenset())] == ["b"]
    for failing in (store.lease(["a"]), store.status("a", frozenset()), store.unload("a", forget)):
        with pytest.raises(NotFoundError):
            await failing


async def test_evicted_name_is_never_taken_for_another_of_that_name(disk: Disk) -> None:
    disk.write("a", "3")
    disk.write("hidden/a", "4")
    store = await store_without_a(disk, "hidden/a")
    shutil.rmtree(disk.roots[0] / "hidden")
    for _ in range(2):
        with pytest.raises(NotFoundError):
            await store.lease(["a"])
    disk.write("hidden/a", "4")
    (again,) = await store.lease(["a"])
    assert again.weights.max_rank == 4
    store.registry.release([again])


@pytest.mark.parametrize("digest", [None, digest_of("4")])
async def test_evicted_adapter_is_found_where_it_has_moved(disk: Disk, digest: str | None) -> None:
    disk.write("a", "4")
    store = await store_without_a(disk, None, digest)
    (disk.roots[0] / "a").rename(disk.roots[1] / "a")
    store.registry.release(await store.lease(["a"]))
    await evict_a(store)
    shutil.rmtree(disk.roots[1] / "a")
    for _ in range(2):
        with pytest.raises(NotFoundError) as caught:
            await store.lease(["a"])
        assert (caught.value.resource_type, caught.value.resource_name) == ("adapter", "a")
    disk.write("a", "3")  # another one
    if digest is None:
        store.registry.release(await store.lease(["a"]))
    else:
        with pytest.raises(ChecksumError):
            await store.lease(["a"])


async def test_digest_is_asked_for_again_after_an_eviction(disk: Disk) -> None:
    disk.write("a", "5")
    store = await store_without_a(disk, None, digest_of("5"))
    store.registry.release(await store.lease(["a"]))
    await evict_a(store)
    disk.write("a", "4")
    for _ in range(2):
        with pytest.raises(ChecksumError):
            await store.lease(["a"])
    await store.load("a", None, pin=False, replace=True)  # a command that asks for none
    await evict_a(store)
    disk.write("a", "3")
    (again,) = await store.lease(["a"])
    assert again.weights.max_rank == 3
    store.registry.release([again])
