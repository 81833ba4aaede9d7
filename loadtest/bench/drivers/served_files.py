"""The sizes our own server is given for a workload, the same in process and over the wire."""

from __future__ import annotations

from fusionserve.loadtest.bench.protocol import Setup

_LEAST_CACHE_BYTES = 256 << 20


def kv_cache_bytes(setup: Setup) -> int:
    """Room for all streams at their longest, and half as much again for what the prefix cache keeps."""
    needed = setup.num_streams * setup.tokens_per_stream * setup.kv_bytes_per_token
    return max(_LEAST_CACHE_BYTES, needed * 3 // 2)


def pool_ranks(setup: Setup, fusion_members: int = 4) -> int:
    """Rank rows for every adapter and the fusion at once, so that no round waits for copies into the pool."""
    return len(setup.adapters) * setup.rank + fusion_members * (2 * setup.rank + 1)
