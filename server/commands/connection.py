"""What the commands that talk to a server share: which server, and how its errors are shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from fusionserve.client import Client, ClientError
from fusionserve.client.authorized_channel import checked_token
from fusionserve.client.server_access import ServerAccess
from fusionserve.server import setting_kinds as kinds
from fusionserve.server.command_errors import FailedCallError, UsageError
from fusionserve.server.setting_kinds import Kind
from fusionserve.server.settings import Setting, Values

# A secret that is mounted as a variable often ends in a newline.
TOKEN = Kind("TEXT", lambda text: checked_token(text.strip()))

PUBLIC = "public"  # the authorities that gRPC brings along, or those of GRPC_DEFAULT_SSL_ROOTS_FILE_PATH
AUTHORITY = Kind("FILE|public", lambda text: PUBLIC if text == PUBLIC else kinds.parse_path(text))

# Without CLIENT the variables are the server's, where a command may run beside it.
_CLIENT_PREFIX = "FUSIONSERVE_CLIENT_"
TLS_SETTINGS = (
    Setting(name="tls-ca", kind=AUTHORITY, help="use TLS, and trust who is in this file (PEM)"),
    Setting(
        name="tls-cert",
        kind=kinds.FILE,
        help="certificate to show (PEM)",
        env_prefix=_CLIENT_PREFIX,
    ),
    Setting(name="tls-key", kind=kinds.FILE, help="its private key (PEM)", env_prefix=_CLIENT_PREFIX),
    Setting(
        name="allow-insecure",
        kind=kinds.SWITCH,
        help="send the token away without TLS",
        env_prefix=_CLIENT_PREFIX,
    ),
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
    access = to_access(values)
    client = Client(
        values["server"],
        credentials=access.credentials,
        token=access.token,
        allow_insecure=access.allow_insecure,
        timeout_s=values["timeout"],
        max_attempts=values["max-attempts"],
    )
    with client:
        try:
            yield client
        except ClientError as error:
            raise FailedCallError(str(error)) from error


def to_access(values: Values) -> ServerAccess:
    """What the server wants to see.

    Raises UsageError for a file that cannot be read, and for a token that would go to another machine in the clear.
    """
    access = ServerAccess(
        token=values["token"],
        credentials=_to_credentials(values),
        allow_insecure=bool(values["allow-insecure"]),
    )
    if access.exposes_token(values["server"]):
        raise UsageError(
            f"the token would go to {values['server']} in the clear: give --tls-ca, or --allow-insecure on"
        )
    return access


def _to_credentials(values: Values) -> grpc.ChannelCredentials | None:
    certificate, key = _read(values["tls-cert"]), _read(values["tls-key"])
    if (certificate is None) != (key is None):
        raise UsageError("--tls-cert and --tls-key go together")
    if values["tls-ca"] is None and certificate is None:
        return None
    authority = None if values["tls-ca"] == PUBLIC else _read(values["tls-ca"])
    return grpc.ssl_channel_credentials(authority, key, certificate)


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
