"""Token files, and metadata with a token in it."""

from __future__ import annotations

import hashlib
from pathlib import Path

SECRETS = {"reader": "reader-secret", "team-a": "a-secret", "team-b": "b-secret", "boss": "boss-secret"}
ROLES = {"reader": "read", "team-a": "generate", "team-b": "generate", "boss": "admin"}


def entry(name: str, role: str, secret: str, **keys: object) -> str:
    """One [[token]] table."""
    digest = hashlib.sha256(secret.encode()).hexdigest()
    fields = {"name": name, "sha256": digest, "role": role, **keys}
    return "[[token]]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in fields.items())


def write_tokens(path: Path, **keys_of_team_a: object) -> Path:
    """A token of every role, and two of the one that generates."""
    tables = [
        entry(name, ROLES[name], secret, **(keys_of_team_a if name == "team-a" else {}))
        for name, secret in SECRETS.items()
    ]
    path.write_text("".join(tables))
    return path


def bearing(name: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call by a token of `write_tokens`."""
    return (("authorization", f"Bearer {SECRETS[name]}"),)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)
