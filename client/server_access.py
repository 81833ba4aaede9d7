"""What a server wants to see of its clients."""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAccess:
    """A bearer token, and TLS's credentials (None talks in the clear)."""

    token: str | None = field(default=None, repr=False)
    credentials: grpc.ChannelCredentials | None = None


IN_THE_CLEAR = ServerAccess()
