"""The KV cache's memory is there before steps write to it, and what they have written meanwhile stays."""

from __future__ import annotations

import threading

import pytest
import torch

from fusionserve.engine import cache_memory
from fusionserve.engine.cache_memory import CacheMemory
from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.layer_cache import LayerCache

NUM_SLOTS = 65_536
SIZES = (2, 64, 32)  # heads, key and value dims
LIKE = torch.empty(0, dtype=torch.bfloat16)


def make_caches(num_layers: int) -> list[LayerCache]:
    pages = HugePages()
    return [LayerCache.zeros(LIKE, NUM_SLOTS, 16, SIZES, pages) for _ in range(num_layers)]


def wait_for_thread() -> None:
    for thread in threading.enumerate():
        if thread.name == "kv-cache-memory":
            thread.join(30)


def test_memory_comes_and_what_is_written_stays() -> None:
    caches = make_caches(3)
    before = resident_bytes()
    CacheMemory(caches).get_soon()
    for cache in caches:
        cache.keys[:] = 3
        cache.values[1000:2000] = 4
    wait_for_thread()
    num_bytes = sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
    assert resident_bytes() - before > 0.95 * num_bytes
    for cache in caches:
        assert (cache.keys == 3).all() and (cache.values[1000:2000] == 4).all()
        assert int(cache.values.count_nonzero()) == 1000 * 2 * 32


def test_first_slots_come_first_and_it_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    (cache,) = make_caches(1)
    memory = CacheMemory([cache])

    def populate(part: torch.Tensor) -> bool:
        asked.append(part.data_ptr())
        if len(asked) == 3:
            memory.stop()
        return True

    monkeypatch.setattr(cache_memory, "populate", populate)
    memory.get_soon()
    wait_for_thread()
    at_once = (2 << 20) // (2 * 64 * 2)
    assert asked == [cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys[at_once:].data_ptr()]


def test_a_system_without_memory_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []

    def populate(part: torch.Tensor) -> bool:
        asked.append(part)
        return False

    monkeypatch.setattr(cache_memory, "populate", populate)
    CacheMemory(make_caches(2)).get_soon()
    wait_for_thread()
    assert len(asked) == 1


def test_nothing_is_done_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(cache_memory, "populate", asked.append)
    on_device = torch.empty(64, 2, 8, dtype=torch.bfloat16, device="meta")
    CacheMemory([LayerCache(on_device, on_device)]).get_soon()
    wait_for_thread()
    assert not asked


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
