"""A channel that sends a bearer token with every call."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar, cast

ChannelT = TypeVar("ChannelT")


def authorized(channel: ChannelT, token: str | None) -> ChannelT:
    """What stubs may be made of in place of `channel`, of grpc or grpc.aio, to send `token` with every call.

    Not grpc's call credentials: those refuse every channel without TLS, also to a server on the same machine. Others
    were refused before (`ServerAccess`).
    Raises ValueError for a token that no header can carry.
    """
    return channel if token is None else cast(ChannelT, _AuthorizedChannel(channel, checked_token(token)))


def checked_token(token: str) -> str:
    """The token. Raises ValueError if no header can carry it."""
    if not token or " " in token or not (token.isascii() and token.isprintable()):
        raise ValueError("a token has printable ASCII characters only, no spaces, and at least one")
    return token


class _AuthorizedChannel:
    def __init__(self, channel: Any, token: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {token}"),)

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        """A call with one answer, with the token."""
        return partial(self._channel.unary_unary(*arguments, **options), metadata=self._metadata)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        """A call with a stream of answers, with the token."""
        return partial(self._channel.unary_stream(*arguments, **options), metadata=self._metadata)
