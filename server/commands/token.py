"""`fusionserve token`."""

from __future__ import annotations

import hashlib
import secrets
import sys

from fusionserve.limits import is_name
from fusionserve.server.setting_kinds import Kind, choice
from fusionserve.server.settings import CommandParser, Setting, add_settings, resolve

_BYTES = 32


def _parse_name(text: str) -> str:
    if not is_name(text):
        raise ValueError("a name is 1 to 63 of a-z 0-9 . _ -")
    return text


_SETTINGS = (
    Setting(name="name", kind=Kind("NAME", _parse_name), help="whose token it is", default="default"),
    Setting(name="role", kind=choice("read", "generate", "admin"), help="what it may do", default="generate"),
)


def main(argv: list[str]) -> int:
    """Prints a fresh token to standard error, for it is stored nowhere, and its entry for the server's file."""
    parser = CommandParser(
        prog="fusionserve token", description="Make a bearer token and its entry for `serve --token-file`."
    )
    add_settings(parser, _SETTINGS)
    values = resolve(_SETTINGS, parser.parse_args(argv))
    token = secrets.token_urlsafe(_BYTES)
    digest = hashlib.sha256(token.encode()).hexdigest()
    print(f"the token, shown this once: {token}", file=sys.stderr)
    print(f'[[token]]\nname = "{values["name"]}"\nsha256 = "{digest}"\nrole = "{values["role"]}"')
    return 0
