import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "path", "pin", "replace", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    pin: bool
    replace: bool
    sha256: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., pin: bool = ..., replace: bool = ..., sha256: _Optional[str] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name", "force")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    force: bool
    def __init__(self, name: _Optional[str] = ..., force: bool = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "next_page_token")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    next_page_token: str
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class LoadFusionRequest(_message.Message):
    __slots__ = ("name", "path", "pin", "replace", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    pin: bool
    replace: bool
    sha256: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., pin: bool = ..., replace: bool = ..., sha256: _Optional[str] = ...) -> None: ...

class LoadFusionResponse(_message.Message):
    __slots__ = ("fusion",)
    FUSION_FIELD_NUMBER: _ClassVar[int]
    fusion: Fusion
    def __init__(self, fusion: _Optional[_Union[Fusion, _Mapping]] = ...) -> None: ...

class UnloadFusionRequest(_message.Message):
    __slots__ = ("name", "force")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    force: bool
    def __init__(self, name: _Optional[str] = ..., force: bool = ...) -> None: ...

class UnloadFusionResponse(_message.Message):
    __slots__ = ("fusion",)
    FUSION_FIELD_NUMBER: _ClassVar[int]
    fusion: Fusion
    def __init__(self, fusion: _Optional[_Union[Fusion, _Mapping]] = ...) -> None: ...

class GetFusionRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetFusionResponse(_message.Message):
    __slots__ = ("fusion",)
    FUSION_FIELD_NUMBER: _ClassVar[int]
    fusion: Fusion
    def __init__(self, fusion: _Optional[_Union[Fusion, _Mapping]] = ...) -> None: ...

class ListFusionsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListFusionsResponse(_message.Message):
    __slots__ = ("fusions", "next_page_token")
    FUSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    fusions: _containers.RepeatedCompositeFieldContainer[Fusion]
    next_page_token: str
    def __init__(self, fusions: _Optional[_Iterable[_Union[Fusion, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "version", "digest", "state", "residency", "max_rank", "target_modules", "host_bytes", "pinned", "active_requests", "held_by_fusions", "load_time")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Adapter.State]
        STATE_AVAILABLE: _ClassVar[Adapter.State]
        STATE_LOADING: _ClassVar[Adapter.State]
        STATE_READY: _ClassVar[Adapter.State]
        STATE_DRAINING: _ClassVar[Adapter.State]
    STATE_UNSPECIFIED: Adapter.State
    STATE_AVAILABLE: Adapter.State
    STATE_LOADING: Adapter.State
    STATE_READY: Adapter.State
    STATE_DRAINING: Adapter.State
    class Residency(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        RESIDENCY_UNSPECIFIED: _ClassVar[Adapter.Residency]
        RESIDENCY_DISK: _ClassVar[Adapter.Residency]
        RESIDENCY_HOST: _ClassVar[Adapter.Residency]
        RESIDENCY_DEVICE: _ClassVar[Adapter.Residency]
    RESIDENCY_UNSPECIFIED: Adapter.Residency
    RESIDENCY_DISK: Adapter.Residency
    RESIDENCY_HOST: Adapter.Residency
    RESIDENCY_DEVICE: Adapter.Residency
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    HELD_BY_FUSIONS_FIELD_NUMBER: _ClassVar[int]
    LOAD_TIME_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    digest: str
    state: Adapter.State
    residency: Adapter.Residency
    max_rank: int
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    host_bytes: int
    pinned: bool
    active_requests: int
    held_by_fusions: _containers.RepeatedScalarFieldContainer[str]
    load_time: _timestamp_pb2.Timestamp
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., state: _Optional[_Union[Adapter.State, str]] = ..., residency: _Optional[_Union[Adapter.Residency, str]] = ..., max_rank: _Optional[int] = ..., target_modules: _Optional[_Iterable[str]] = ..., host_bytes: _Optional[int] = ..., pinned: bool = ..., active_requests: _Optional[int] = ..., held_by_fusions: _Optional[_Iterable[str]] = ..., load_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class FusionMember(_message.Message):
    __slots__ = ("name", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class Fusion(_message.Message):
    __slots__ = ("name", "version", "digest", "state", "residency", "members", "modules", "scope", "d_key", "member_keys", "value_kind", "temperature", "base_member", "pool_ranks", "host_bytes", "pinned", "active_requests", "load_time")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    D_KEY_FIELD_NUMBER: _ClassVar[int]
    MEMBER_KEYS_FIELD_NUMBER: _ClassVar[int]
    VALUE_KIND_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    BASE_MEMBER_FIELD_NUMBER: _ClassVar[int]
    POOL_RANKS_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_TIME_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    digest: str
    state: Adapter.State
    residency: Adapter.Residency
    members: _containers.RepeatedCompositeFieldContainer[FusionMember]
    modules: _containers.RepeatedScalarFieldContainer[str]
    scope: str
    d_key: int
    member_keys: bool
    value_kind: str
    temperature: float
    base_member: bool
    pool_ranks: int
    host_bytes: int
    pinned: bool
    active_requests: int
    load_time: _timestamp_pb2.Timestamp
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., state: _Optional[_Union[Adapter.State, str]] = ..., residency: _Optional[_Union[Adapter.Residency, str]] = ..., members: _Optional[_Iterable[_Union[FusionMember, _Mapping]]] = ..., modules: _Optional[_Iterable[str]] = ..., scope: _Optional[str] = ..., d_key: _Optional[int] = ..., member_keys: bool = ..., value_kind: _Optional[str] = ..., temperature: _Optional[float] = ..., base_member: bool = ..., pool_ranks: _Optional[int] = ..., host_bytes: _Optional[int] = ..., pinned: bool = ..., active_requests: _Optional[int] = ..., load_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...
