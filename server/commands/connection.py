"""What the commands that talk to a server share: which server, and how its errors are shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fusionserve.client import Client, ClientError
from fusionserve.server import setting_kinds as kinds
from fusionserve.server.command_errors import FailedCallError
from fusionserve.server.settings import Setting, Values

CONNECTION_SETTINGS = (
    Setting(name="server", kind=kinds.TARGET, help="server to call", default="127.0.0.1:50051"),
    Setting(
        name="timeout", kind=kinds.SECONDS, help="time for each call", default_text="as long as it takes"
    ),
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
    client = Client(values["server"], timeout_s=values["timeout"], max_attempts=values["max-attempts"])
    with client:
        try:
            yield client
        except ClientError as error:
            raise FailedCallError(str(error)) from error
