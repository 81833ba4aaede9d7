"""Where a listener is bound."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from fusionserve.errors import StartupError


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """A host and a port; port 0 stands for any free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> ListenAddress:
        """Reads HOST:PORT, an IPv6 host in brackets. Raises StartupError for anything else."""
        host, colon, port = text.rpartition(":")
        is_port = port.isascii() and port.isdigit() and int(port) <= 65535
        is_bracketed = host.startswith("[") and host.endswith("]")
        host = host[1:-1] if is_bracketed else host
        if not colon or not host or not is_port or (":" in host) != is_bracketed:
            raise StartupError(f"{text!r} is not HOST:PORT", reason="LISTEN_ADDRESS_INVALID")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def bind(self) -> socket.socket:
        """A socket bound here. Raises StartupError if the port is taken or the host is not this machine."""
        try:
            (family, *_, target), *_ = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            listener = socket.socket(family, socket.SOCK_STREAM)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(target)
            except BaseException:
                listener.close()
                raise
        except OSError as error:
            raise StartupError(
                f"cannot listen on {self}: {error.strerror}", reason="LISTEN_FAILED"
            ) from error
        return listener
