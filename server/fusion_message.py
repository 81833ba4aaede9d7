"""A fusion's status as a message."""

from __future__ import annotations

from fusionserve.adapter_status import FusionStatus
from fusionserve.server.adapter_message import RESIDENCIES, STATES, to_timestamp
from fusionserve.v1 import adapter_pb2


def to_fusion(status: FusionStatus) -> adapter_pb2.Fusion:
    """The status, with the load time left out if there was no load."""
    members = [adapter_pb2.FusionMember(name=member.name, digest=member.digest) for member in status.members]
    return adapter_pb2.Fusion(
        name=status.name,
        version=status.version,
        digest=status.digest,
        state=STATES[status.state],
        residency=RESIDENCIES[status.residency],
        members=members,
        modules=status.modules,
        scope=status.scope,
        d_key=status.d_key,
        member_keys=status.member_keys,
        value_kind=status.value_kind,
        temperature=status.temperature,
        base_member=status.base_member,
        pool_ranks=status.pool_ranks,
        host_bytes=status.host_bytes,
        pinned=status.pinned,
        active_requests=status.active_requests,
        load_time=to_timestamp(status.load_time_s),
    )
