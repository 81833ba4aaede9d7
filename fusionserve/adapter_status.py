"""What the server tells about an adapter or a fusion."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class AdapterState(Enum):
    """Life cycle: AVAILABLE is on disk and loads on demand, DRAINING takes no new requests."""

    AVAILABLE = "available"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Residency(Enum):
    """The fastest tier that holds the adapter's weights."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterStatus:
    """A snapshot of one adapter; `version` 0 and an empty digest mean it has not been loaded."""

    name: str
    version: int = 0
    digest: str = ""
    state: AdapterState
    residency: Residency
    max_rank: int = 0
    target_modules: tuple[str, ...] = ()
    host_bytes: int = 0
    pinned: bool = False
    active_requests: int = 0
    held_by_fusions: tuple[str, ...] = ()  # loaded fusions that it is a member of
    load_time_s: float | None = None  # seconds since the epoch, UTC


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionMemberStatus:
    """A member by name, with the digest of the weights that the fusion was trained with."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionStatus:
    """A snapshot of one fusion; `version` 0 and an empty digest mean it has not been loaded."""

    name: str
    version: int = 0
    digest: str = ""
    state: AdapterState
    residency: Residency
    members: tuple[FusionMemberStatus, ...] = ()
    modules: tuple[str, ...] = ()  # paths
    scope: str = ""
    d_key: int = 0
    member_keys: bool = False
    value_kind: str = ""
    temperature: float = 0.0
    base_member: bool = False
    pool_ranks: int = 0  # rank rows it takes in the device's pool
    host_bytes: int = 0
    pinned: bool = False
    active_requests: int = 0
    load_time_s: float | None = None  # seconds since the epoch, UTC
