"""The file of bearer tokens: who may call, what, under which adapters and how often.

TOML, one table per token; only `name`, `sha256` and `role` must be there:

    [[token]]
    name = "team-a"              # the tenant: logs and limits go by it, and cached prompts are shared within it
    sha256 = "9f86d081..."       # of the token, in hex; the token itself is nowhere on the server
    role = "generate"            # read, generate (and read), or admin (all)
    adapters = ["team-a-*"]      # patterns of adapters' and fusions' names; default all
    base = false                 # whether requests without an adaptation are allowed; default true
    max_priority = 0             # -1000 to 1000; default 1000
    rate = 10.0                  # calls a second; default no limit
    burst = 20                   # calls at once within the rate, at least 1; default a second's worth
    concurrency = 8              # open generations, at least 1; default no limit
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from fnmatch import fnmatchcase
from pathlib import Path

from fusionserve.errors import PermissionDeniedError, StartupError
from fusionserve.generation import Adaptation
from fusionserve.limits import MAX_PRIORITY, is_name

_SHA256 = re.compile(r"[0-9a-f]{64}")
_IS: Mapping[str, Callable[[object], bool]] = {
    "str": lambda value: isinstance(value, str),
    "Role": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int,
    "int | None": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float),
    "tuple[str, ...]": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
}  # whether a value of the file may fill a field, by the field's type


class Role(IntEnum):
    """What a caller may do; each includes those before it."""

    READ = 1
    GENERATE = 2
    ADMIN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One entry. Its rights are checked by methods that raise PermissionDeniedError."""

    name: str
    sha256: str = field(repr=False)
    role: Role
    adapters: tuple[str, ...] = ("*",)
    base: bool = True
    max_priority: int = MAX_PRIORITY
    rate: float = math.inf
    burst: int | None = None  # None: a second's worth of the rate
    concurrency: int | None = None  # None: no limit

    def check_role(self, needed: Role) -> None:
        """Raises ROLE_REQUIRED unless the token has the role or a higher one."""
        if self.role < needed:
            role = needed.name.lower()
            raise PermissionDeniedError(
                f"this call needs a token with the role {role}",
                reason="ROLE_REQUIRED",
                metadata={"role": role},
            )

    def may_use(self, name: str) -> bool:
        """True if an adapter or a fusion of that name is allowed."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)

    def check_name(self, name: str, noun: str) -> None:
        """Raises ADAPTER_NOT_ALLOWED or FUSION_NOT_ALLOWED, whether or not there is such a thing."""
        if not self.may_use(name):
            raise PermissionDeniedError(
                f"this token may not use {noun} {name}",
                reason=f"{noun.upper()}_NOT_ALLOWED",
                metadata={noun: name},
            )

    def check_generation(self, adaptation: Adaptation, priority: int) -> None:
        """Raises unless the token may use all of the adaptation, and may ask for the priority."""
        if adaptation.kind == "base" and not self.base:
            raise PermissionDeniedError(
                "this token may not use the base model alone", reason="BASE_NOT_ALLOWED"
            )
        for term in adaptation.terms:
            self.check_name(term.name, "adapter")
        if adaptation.kind == "fusion":
            self.check_name(adaptation.fusion, "fusion")
        if priority > self.max_priority:
            raise PermissionDeniedError(
                f"this token's requests have at most priority {self.max_priority}",
                reason="PRIORITY_NOT_ALLOWED",
                metadata={"max_priority": str(self.max_priority)},
            )


@dataclass(frozen=True, slots=True)
class Tokens:
    """All entries of the file."""

    entries: tuple[Token, ...]

    def find(self, secret: str) -> Token | None:
        """The entry of a token. Every entry is compared, each in constant time, so time tells nothing of any."""
        digest = hashlib.sha256(secret.encode()).hexdigest()
        found = None
        for entry in self.entries:
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        return found


def read_tokens(path: Path) -> Tokens:
    """The tokens of a file. Raises StartupError (TOKENS_INVALID) with the entry and the key that is wrong."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _invalid(path, error.strerror or "cannot be read") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _invalid(path, f"not TOML: {error}") from None
    tables = content.pop("token", None)
    if content or not isinstance(tables, list) or not tables:
        raise _invalid(path, "it must have [[token]] tables, and nothing else")
    entries = tuple(_to_token(path, number, table) for number, table in enumerate(tables, 1))
    if len({entry.sha256 for entry in entries}) < len(entries):
        raise _invalid(path, "two entries have the same sha256")
    return Tokens(entries)


def _to_token(path: Path, number: int, table: object) -> Token:
    where = f"token {number}"
    if not isinstance(table, dict):
        raise _invalid(path, f"{where} is not a table")
    _check_types(path, where, table)
    if not is_name(table["name"]):
        raise _invalid(path, f"{where}: name must be 1 to 63 of a-z 0-9 . _ -")
    if not _SHA256.fullmatch(table["sha256"]):
        raise _invalid(path, f"{where}: sha256 must be 64 hex digits")
    if table["role"].upper() not in Role.__members__:
        raise _invalid(path, f"{where}: role must be one of read, generate, admin")
    token = Token(
        **{**table, "role": Role[table["role"].upper()], "adapters": tuple(table.get("adapters", ("*",)))}
    )
    if wrong := _wrong_number(token):
        raise _invalid(path, f"{where}: {wrong}")
    return token


def _wrong_number(token: Token) -> str:
    """What is wrong with the numbers of an entry, or nothing."""
    if abs(token.max_priority) > MAX_PRIORITY:
        return f"max_priority must be {-MAX_PRIORITY} to {MAX_PRIORITY}"
    if not token.rate > 0:
        return "rate must be above 0"
    if token.burst is not None and math.isinf(token.rate):
        return "burst needs a rate"
    for key, value in (("burst", token.burst), ("concurrency", token.concurrency)):
        if value is not None and value < 1:
            return f"{key} must be at least 1"
    return ""


def _check_types(path: Path, where: str, table: Mapping[str, object]) -> None:
    known = {entry.name: entry for entry in fields(Token)}
    for key, value in table.items():
        if key not in known:
            raise _invalid(path, f"{where}: unknown key {key!r}")
        if not _IS[str(known[key].type)](value):
            raise _invalid(path, f"{where}: {key} has the wrong type")
    for key in ("name", "sha256", "role"):
        if key not in table:
            raise _invalid(path, f"{where}: {key} is missing")


def _invalid(path: Path, problem: str) -> StartupError:
    return StartupError(f"token file {path}: {problem}", reason="TOKENS_INVALID")
