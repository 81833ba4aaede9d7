"""Which requests of a load test found their adapters in the server's memory, told by the versions they ran on.

A version grows with every load, and a stream's first message names the versions it runs on. So the request that was
sent first of those on a version which was not in memory at the start has caused its load, also after an eviction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fusionserve.loadtest.catalog import Artifact
from fusionserve.loadtest.request_record import LoadedPart, RequestRecord

COLD = "cold"  # an adapter was read from disk for it
JOINED = "joined"  # sent while another request's load of its adapter went on
WARM = "warm"  # everything was in host memory
NONE = "none"  # base, or it never started


def residencies(records: Sequence[RequestRecord], loaded_versions: Mapping[Artifact, int]) -> dict[int, str]:
    """COLD, JOINED, WARM or NONE by the request's index."""
    loaders = _loaders(records, loaded_versions)
    return {record.index: _residency(record, loaders) for record in records}


def _loaders(
    records: Iterable[RequestRecord], loaded_versions: Mapping[Artifact, int]
) -> dict[LoadedPart, RequestRecord]:
    """By what was loaded during the run: the request that was sent first of those that ran on it."""
    loaders: dict[LoadedPart, RequestRecord] = {}
    for record in sorted(records, key=lambda each: each.sent_s):
        for noun, name, version in record.parts:
            if version > loaded_versions.get((noun, name), 0):
                loaders.setdefault((noun, name, version), record)
    return loaders


def _residency(record: RequestRecord, loaders: Mapping[LoadedPart, RequestRecord]) -> str:
    if not record.parts:
        return NONE
    causes = [loaders[part] for part in record.parts if part in loaders]
    if any(cause is record for cause in causes):
        return COLD
    is_joined = any(cause.started_s is not None and record.sent_s < cause.started_s for cause in causes)
    return JOINED if is_joined else WARM
