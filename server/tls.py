"""TLS for the gRPC listener, with certificates that may be replaced while it runs."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from fusionserve.config import ServerConfig
from fusionserve.errors import StartupError
from fusionserve.server.watched_file import WatchedFiles


def to_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """What the configuration says of TLS; None is none.

    The files are looked at, at most once a second, when a client connects: new connections get the new certificate,
    open ones go on. Raises StartupError (TLS_INVALID) for files that are missing or do not belong together.
    """
    certificate, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None or key is None:
        raise StartupError("TLS needs --tls-cert and --tls-key both", reason="TLS_INVALID")
    paths = tuple(path for path in (certificate, key, client_ca) if path is not None)
    files = WatchedFiles(paths, lambda: _read(certificate, key, client_ca))
    return grpc.dynamic_ssl_server_credentials(
        files.current(), files.current, require_client_authentication=client_ca is not None
    )


def _read(certificate: Path, key: Path, client_ca: Path | None) -> grpc.ServerCertificateConfiguration:
    """gRPC only says at a handshake that a pair is of no use; Python's ssl says it now, and why."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password="")
        authorities = None
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            authorities = client_ca.read_bytes()
        pairs = [(key.read_bytes(), certificate.read_bytes())]
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = error.reason if isinstance(error, ssl.SSLError) else getattr(error, "strerror", None)
        raise StartupError(
            f"the TLS files cannot be used: {reason or error}", reason="TLS_INVALID"
        ) from error
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=authorities)
