"""An adapter's status as a message."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from fusionserve.adapter_status import AdapterState, AdapterStatus, Residency
from fusionserve.v1 import adapter_pb2

STATES = {
    AdapterState.AVAILABLE: adapter_pb2.Adapter.STATE_AVAILABLE,
    AdapterState.LOADING: adapter_pb2.Adapter.STATE_LOADING,
    AdapterState.READY: adapter_pb2.Adapter.STATE_READY,
    AdapterState.DRAINING: adapter_pb2.Adapter.STATE_DRAINING,
}
RESIDENCIES = {
    Residency.DISK: adapter_pb2.Adapter.RESIDENCY_DISK,
    Residency.HOST: adapter_pb2.Adapter.RESIDENCY_HOST,
    Residency.DEVICE: adapter_pb2.Adapter.RESIDENCY_DEVICE,
}


def to_adapter(status: AdapterStatus) -> adapter_pb2.Adapter:
    """The status, with the load time left out if there was no load."""
    return adapter_pb2.Adapter(
        name=status.name,
        version=status.version,
        digest=status.digest,
        state=STATES[status.state],
        residency=RESIDENCIES[status.residency],
        max_rank=status.max_rank,
        target_modules=status.target_modules,
        host_bytes=status.host_bytes,
        pinned=status.pinned,
        active_requests=status.active_requests,
        held_by_fusions=status.held_by_fusions,
        load_time=to_timestamp(status.load_time_s),
    )


def to_timestamp(epoch_s: float | None) -> Timestamp | None:
    """The time, or none."""
    if epoch_s is None:
        return None
    timestamp = Timestamp()
    timestamp.FromMilliseconds(round(epoch_s * 1000))
    return timestamp
