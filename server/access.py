"""Who is calling, and whether they may: bearer tokens, and the role that each method needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from fusionserve.errors import UnauthenticatedError
from fusionserve.server.token_limits import TokenLimits
from fusionserve.server.tokens import Role, Token, read_tokens
from fusionserve.server.watched_file import WatchedFiles

_INFERENCE = "/fusionserve.v1.InferenceService/"
_ADAPTERS = "/fusionserve.v1.AdapterService/"

# A method that is not here needs ADMIN. Health needs nothing: balancers ask for it.
ROLES: Mapping[str, Role | None] = {
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/Watch": None,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.READ,
    **{_INFERENCE + name: Role.READ for name in ("GetModel", "Tokenize", "Detokenize")},
    **{_INFERENCE + name: Role.GENERATE for name in ("Generate", "StreamGenerate")},
    **{_ADAPTERS + name: Role.READ for name in ("GetAdapter", "ListAdapters", "GetFusion", "ListFusions")},
    **{
        _ADAPTERS + name: Role.ADMIN
        for name in ("LoadAdapter", "UnloadAdapter", "LoadFusion", "UnloadFusion")
    },
}

# Where there are no tokens, everybody may do everything.
ANYBODY = Token(name="", sha256="", role=Role.ADMIN, rate=math.inf)

# Each call runs in a task of its own, so what is set in one is seen by no other.
_CALLER: ContextVar[Token] = ContextVar("caller", default=ANYBODY)


def caller() -> Token:
    """Whose call this is."""
    return _CALLER.get()


class Access:
    """Admits calls by the token in their metadata; without a token file it admits all."""

    def __init__(self, token_file: Path | None) -> None:
        """Raises StartupError if the file cannot be used."""
        self.limits = TokenLimits()
        self._tokens = (
            None if token_file is None else WatchedFiles((token_file,), lambda: read_tokens(token_file))
        )

    def admit(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Token:
        """The caller, if it may call the method at all.

        Raises UnauthenticatedError, PermissionDeniedError (ROLE_REQUIRED), CapacityError (RATE_LIMITED).
        """
        needed = ROLES.get(method, Role.ADMIN)
        if self._tokens is None or needed is None:
            return ANYBODY
        token = self._tokens.current().find(_secret_of(metadata))
        if token is None:
            raise UnauthenticatedError("the bearer token is not known here", reason="TOKEN_INVALID")
        token.check_role(needed)
        self.limits.count_call(token)
        return token


@contextmanager
def called_by(token: Token) -> Iterator[None]:
    """In its block `caller()` is the token's owner."""
    before = _CALLER.set(token)
    try:
        yield
    finally:
        _CALLER.reset(before)


def _secret_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    values = [value for key, value in metadata if key == "authorization"]
    scheme, _, secret = str(values[0]).partition(" ") if len(values) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not secret:
        raise UnauthenticatedError("this server needs a bearer token", reason="TOKEN_REQUIRED")
    return secret
