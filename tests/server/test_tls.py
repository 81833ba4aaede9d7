"""TLS and mTLS with real certificates, replaced while the server runs; and what may be reached from where."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme
from grpc import aio
from server_fixture import Served, serving_server

from fusionserve.client import AsyncClient, UnavailableError
from fusionserve.config import ServerConfig
from fusionserve.errors import StartupError
from fusionserve.server.exposure import check_exposure, is_loopback, tell_of_metrics
from fusionserve.server.listen_address import ListenAddress
from fusionserve.server.tls import to_credentials
from fusionserve.v1 import inference_pb2, inference_pb2_grpc

YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


@dataclass(frozen=True)
class Files:
    """Where a server's certificate and key are."""

    tls_cert: Path
    tls_key: Path

    def write(self, authority: trustme.CA, **options: object) -> None:
        """A certificate of `authority` for this machine."""
        issued = authority.issue_cert("127.0.0.1", "localhost", **options)  # type: ignore[arg-type]
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        self.tls_key.write_bytes(issued.private_key_pem.bytes())
        self.tls_cert.write_bytes(chain)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> Files:
    made = Files(tmp_path / "server.pem", tmp_path / "server.key")
    made.write(authority)
    return made


def trusting(authority: trustme.CA, client: trustme.LeafCert | None = None) -> grpc.ChannelCredentials:
    if client is None:
        return grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    chain = b"".join(blob.bytes() for blob in client.cert_chain_pems)
    return grpc.ssl_channel_credentials(authority.cert_pem.bytes(), client.private_key_pem.bytes(), chain)


@asynccontextmanager
async def serving(files: Files, **config: object) -> AsyncIterator[Served]:
    async with serving_server(tls_cert=files.tls_cert, tls_key=files.tls_key, **config) as served:
        yield served


async def works(served: Served, credentials: grpc.ChannelCredentials | None) -> bool:
    """Whether a client of its own connection gets an answer."""
    target = str(served.app.grpc_address)
    async with AsyncClient(target, credentials=credentials, timeout_s=5) as client:
        try:
            await client.model()
        except UnavailableError:
            return False
        return True


async def test_client_that_trusts_the_authority_is_served(files: Files, authority: trustme.CA) -> None:
    async with serving(files) as served:
        assert await works(served, trusting(authority))


async def test_others_are_not(files: Files, authority: trustme.CA) -> None:
    async with serving(files) as served:
        assert not await works(served, None), "in the clear"
        assert not await works(served, trusting(trustme.CA())), "an authority that is a stranger"
        assert await works(served, trusting(authority)), "and it goes on"


async def test_expired_certificate_is_not_accepted(files: Files, authority: trustme.CA) -> None:
    files.write(authority, not_after=YESTERDAY)
    async with serving(files) as served:
        assert not await works(served, trusting(authority))


async def test_client_certificate_is_demanded(files: Files, authority: trustme.CA, tmp_path: Path) -> None:
    clients = trustme.CA()
    path = tmp_path / "clients.pem"
    path.write_bytes(clients.cert_pem.bytes())
    async with serving(files, tls_client_ca=path) as served:
        assert await works(served, trusting(authority, clients.issue_cert("client")))
        assert not await works(served, trusting(authority)), "no certificate"
        assert not await works(served, trusting(authority, trustme.CA().issue_cert("client"))), "a stranger's"
        expired = clients.issue_cert("client", not_after=YESTERDAY)
        assert not await works(served, trusting(authority, expired))


async def test_certificate_is_replaced_while_a_stream_runs(
    files: Files, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fusionserve.server.watched_file._LOOK_EVERY_S", 0.0)
    successor = trustme.CA()
    async with serving(files) as served:
        served.engine.gate = asyncio.Event()
        async with aio.secure_channel(str(served.app.grpc_address), trusting(authority)) as channel:
            request = inference_pb2.StreamGenerateRequest(request=inference_pb2.GenerateRequest(text="a"))
            stream = inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request)
            await stream.read()
            files.tls_cert.write_text("no certificate")
            assert await works(served, trusting(authority)), "the last one that was of use stays"
            assert "server.pem" in caplog.text
            files.write(successor)
            assert await works(served, trusting(successor))
            assert not await works(served, trusting(authority))
            served.engine.gate.set()
            while (message := await stream.read()) is not aio.EOF:
                last = message
            assert last.HasField("finished")


@pytest.mark.parametrize("broken", ["missing", "garbage", "other key", "no key", "garbage authority"])
def test_unusable_files_are_refused_at_the_start(broken: str, files: Files, tmp_path: Path) -> None:
    config = {"tls_cert": files.tls_cert, "tls_key": files.tls_key}
    match broken:
        case "missing":
            files.tls_cert.unlink()
        case "garbage":
            files.tls_cert.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
        case "other key":
            files.tls_key.write_bytes(trustme.CA().issue_cert("x").private_key_pem.bytes())
        case "no key":
            config["tls_key"] = None  # type: ignore[assignment]
        case "garbage authority":
            config["tls_client_ca"] = tmp_path / "ca.pem"
            config["tls_client_ca"].write_text("nonsense")
    with pytest.raises(StartupError) as caught:
        to_credentials(ServerConfig(**config))  # type: ignore[arg-type]
    assert caught.value.reason == "TLS_INVALID"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("listen", "is_local"),
    [
        ("127.0.0.1:0", True),
        ("127.1.2.3:0", True),
        ("[::1]:0", True),
        ("localhost:0", True),
        ("0.0.0.0:0", False),
        ("[::]:0", False),
        ("10.1.2.3:0", False),
    ],
)
def test_only_loopback_is_open_without_tls_and_tokens(
    listen: str, is_local: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = ListenAddress.parse(listen)
    assert is_loopback(address) is is_local
    some = tmp_path / "file"
    check_exposure(address, ServerConfig(tls_cert=some, token_file=some))
    for lacking in ({}, {"tls_cert": some}, {"token_file": some}):
        config = ServerConfig(**lacking)  # type: ignore[arg-type]
        if is_local:
            check_exposure(address, config)
            continue
        with pytest.raises(StartupError) as caught:
            check_exposure(address, config)
        assert caught.value.reason == "INSECURE_LISTEN"
        check_exposure(address, ServerConfig(allow_insecure=True, **lacking))  # type: ignore[arg-type]
    assert ("INSECURE" in caplog.text) is not is_local
    caplog.clear()
    tell_of_metrics(address)
    assert ("metrics at" in caplog.text) is not is_local
