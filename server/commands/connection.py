"""What the commands that talk to a server share: which server, and how its errors are shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from fusionserve.client import Client, ClientError
from fusionserve.client.authorized_channel import checked_token
from fusionserve.server import setting_kinds as kinds
from fusionserve.server.command_errors import FailedCallError, UsageError
from fusionserve.server.setting_kinds import Kind
from fusionserve.server.settings import Setting, Values

# A secret that is mounted as a variable often ends in a newline.
TOKEN = Kind("TEXT", lambda text: checked_token(text.strip()))

# FUSIONSERVE_TLS_CERT and FUSIONSERVE_TLS_KEY are the server's, where a command may run beside it.
_CLIENT_PREFIX = "FUSIONSERVE_CLIENT_"
TLS_SETTINGS = (
    Setting(name="tls-ca", kind=kinds.FILE, help="use TLS, and trust who is in this file (PEM)"),
    Setting(
        name="tls-cert",
        kind=kinds.FILE,
        help="certificate to show (PEM)",
        env_prefix=_CLIENT_PREFIX,
    ),
    Setting(name="tls-key", kind=kinds.FILE, help="its private key (PEM)", env_prefix=_CLIENT_PREFIX),
)
CONNECTION_SETTINGS = (
    Setting(name="server", kind=kinds.TARGET, help="server to call", default="127.0.0.1:50051"),
    Setting(
        name="timeout", kind=kinds.SECONDS, help="time for each call", default_text="as long as it takes"
    ),
    Setting(
        name="token",
        kind=TOKEN,
        help="bearer token; better in the environment than here, where other users of the machine see it",
    ),
    *TLS_SETTINGS,
    Setting(
        name="max-attempts",
        kind=kinds.integer(1, 5),
        help="times a generation is tried while the server is too busy or away",
        default=1,
    ),
)


@contextmanager
def connected(values: Values) -> Iterator[Client]:
    """A client of the server that the settings name; its errors leave as FailedCallError."""
    client = Client(
        values["server"],
        credentials=to_credentials(values),
        token=values["token"],
        timeout_s=values["timeout"],
        max_attempts=values["max-attempts"],
    )
    with client:
        try:
            yield client
        except ClientError as error:
            raise FailedCallError(str(error)) from error


def to_credentials(values: Values) -> grpc.ChannelCredentials | None:
    """TLS as the settings say; None is none. Raises UsageError for a file that cannot be read."""
    authority, certificate, key = (_read(values[name]) for name in ("tls-ca", "tls-cert", "tls-key"))
    if (certificate is None) != (key is None):
        raise UsageError("--tls-cert and --tls-key go together")
    if authority is None and certificate is None:
        return None
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
