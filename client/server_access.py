"""What a server wants to see of its clients."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field

import grpc

_SOCKET_FILES = ("unix:", "unix-abstract:")
_ADDRESS = re.compile(r"(?:dns:(?:///)?|ipv[46]:)?(\[[^\]]+\]|[^\[\]:,/%@]+)(?::\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAccess:
    """A bearer token, and TLS's credentials; None talks in the clear, a token only if `allow_insecure` or to here."""

    token: str | None = field(default=None, repr=False)
    credentials: grpc.ChannelCredentials | None = None
    allow_insecure: bool = False

    def exposes_token(self, target: str) -> bool:
        """Whether the token would travel to `target`, in any form of gRPC's, for others to read."""
        if self.token is None or self.credentials is not None or self.allow_insecure:
            return False
        return not _is_here(target)


IN_THE_CLEAR = ServerAccess()


def _is_here(target: str) -> bool:
    """True if nothing but this machine can be meant; a list of addresses, say, may mean another."""
    if target.startswith(_SOCKET_FILES):
        return True
    match = _ADDRESS.fullmatch(target)
    host = match[1].strip("[]").lower() if match else ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
