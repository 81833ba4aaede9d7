"""Refuses to be reachable from other machines by accident."""

from __future__ import annotations

import ipaddress
import logging
import socket

from fusionserve.config import ServerConfig
from fusionserve.errors import StartupError
from fusionserve.server.listen_address import ListenAddress

logger = logging.getLogger(__name__)


def check_exposure(address: ListenAddress, config: ServerConfig) -> None:
    """Raises StartupError (INSECURE_LISTEN) for an address beyond this machine without TLS and tokens.

    `allow_insecure` makes that a warning.
    """
    missing = [
        name for name, value in (("TLS", config.tls_cert), ("tokens", config.token_file)) if value is None
    ]
    if not missing or is_loopback(address):
        return
    lacks = " and ".join(missing)
    if not config.allow_insecure:
        raise StartupError(
            f"{address} can be reached from other machines and has no {lacks}: "
            "give --tls-cert, --tls-key and --token-file, or --allow-insecure on",
            reason="INSECURE_LISTEN",
        )
    logger.warning("INSECURE: %s can be reached from other machines and has no %s", address, lacks)


def tell_of_metrics(address: ListenAddress) -> None:
    """Warns if other machines can read the metrics, which have neither TLS nor tokens."""
    if not is_loopback(address):
        logger.warning(
            "metrics at %s can be read from other machines: they have no TLS and no tokens", address
        )


def is_loopback(address: ListenAddress) -> bool:
    """True if only this machine can connect: whatever the name stands for is a loopback address."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(target[0]).partition("%")[0]).is_loopback for *_, target in found)
