"""A token goes to another machine under TLS, or because somebody says so."""

import grpc
import pytest

from fusionserve.client import AsyncClient, Client
from fusionserve.client.server_access import ServerAccess

HERE = [
    "127.0.0.1:50051",
    "127.8.9.10:1",
    "localhost:50051",
    "LocalHost",
    "[::1]:50051",
    "dns:localhost:1",
    "dns:///localhost:1",
    "ipv4:127.0.0.1:1",
    "ipv6:[::1]:1",
    "unix:/run/server.sock",
    "unix:///run/server.sock",
    "unix-abstract:server",
]
ELSEWHERE = [
    "192.0.2.2:50051",
    "host:50051",
    "[2001:db8::1]:1",
    "0.0.0.0:1",
    "127.0.0.1.example:1",
    "localhost.example:1",
    "localhost:1@host:2",
    "dns://192.0.2.2/localhost:1",  # the name server is asked what that is
    "ipv4:127.0.0.1:1,192.0.2.2:1",
    "xds:///localhost",
    "",
]


@pytest.mark.parametrize("target", HERE)
def test_token_goes_to_this_machine(target: str) -> None:
    assert not ServerAccess(token="secret").exposes_token(target)


@pytest.mark.parametrize("target", ELSEWHERE)
def test_token_goes_to_no_other_machine(target: str) -> None:
    assert ServerAccess(token="secret").exposes_token(target)
    assert not ServerAccess().exposes_token(target), "there is none"
    assert not ServerAccess(token="secret", allow_insecure=True).exposes_token(target)
    assert not ServerAccess(token="secret", credentials=grpc.ssl_channel_credentials()).exposes_token(target)


async def test_clients_refuse_to_expose_a_token() -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match=r"192\.0\.2\.2:1 in the clear"):
            kind("192.0.2.2:1", token="secret")
    async with AsyncClient("192.0.2.2:1", token="secret", allow_insecure=True):
        pass
    with Client("192.0.2.2:1", token="secret", allow_insecure=True):
        pass
