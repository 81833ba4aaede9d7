"""The Prometheus endpoint as a scraper, and as a vandal, sees it."""

from __future__ import annotations

import asyncio
import errno
import socket
import urllib.error
import urllib.request

import pytest
from server_fixture import Served

from fusionserve import __version__
from fusionserve.server import metrics_endpoint
from fusionserve.v1 import inference_pb2 as pb


def get(served: Served, path: str) -> str:
    with urllib.request.urlopen(f"http://{served.app.metrics_address}{path}", timeout=5) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        text: str = response.read().decode()
        return text


def send(served: Served, data: bytes) -> bytes:
    """The start of the answer; nothing if the server hung up first."""
    address = served.app.metrics_address
    with socket.create_connection((address.host, address.port), timeout=5) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(4096)
        except OSError:
            return b""


async def test_scrape_has_ours_grpcs_and_the_process(served: Served) -> None:
    await served.inference.Generate(pb.GenerateRequest(text="a"))
    text = await asyncio.to_thread(get, served, "/metrics")
    assert 'fusionserve_requests_total{finish_reason="length",kind="base",status="OK"}' in text
    assert "grpc_server_handling_seconds_bucket" in text
    assert "process_resident_memory_bytes" in text
    assert f'fusionserve_build_info{{version="{__version__}"}} 1.0' in text
    assert "_created" not in text


@pytest.mark.parametrize("path", ["/", "/metric", "/metrics/x", "/%2e%2e/etc/passwd"])
async def test_other_paths_are_not_found(served: Served, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        await asyncio.to_thread(get, served, path)
    assert caught.value.code == 404
    caught.value.close()


async def test_endpoint_without_descriptors_rests_between_its_tries(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tries = 0

    def fail(_: socket.socket) -> None:
        nonlocal num_tries
        num_tries += 1
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "accept", fail)
        scrape = asyncio.create_task(asyncio.to_thread(get, served, "/metrics"))
        await asyncio.sleep(0.5)
    assert 0 < num_tries < 20
    assert "fusionserve_build_info" in await scrape


async def test_garbage_is_survived(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    vandals = (
        b"",
        b"\n",
        b"\xff" * 100_000,
        b"POST /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/9\r\n\r\n",
        bytes(range(256)) * 40,
    )
    for data in vandals:
        assert not (await asyncio.to_thread(send, served, data)).startswith(b"HTTP/1.0 200")
    assert "fusionserve_build_info" in await asyncio.to_thread(get, served, "/metrics?name=x")
    assert capfd.readouterr() == ("", "")


async def test_connection_that_dawdles_is_cut_however_it_spreads_its_bytes(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_endpoint, "CONNECTION_LIMIT_S", 0.5)
    address = served.app.metrics_address
    reader, writer = await asyncio.open_connection(address.host, address.port)
    reading = asyncio.create_task(reader.read())
    for _ in range(30):
        writer.write(b"G")  # each of them keeps the socket's own timeout away
        done, _ = await asyncio.wait([reading], timeout=0.1)
        if done:
            break
    assert done, "the connection is still there"
    writer.close()


async def test_scrape_gets_through_when_all_connections_are_taken(served: Served) -> None:
    address = served.app.metrics_address
    silent = [
        await asyncio.open_connection(address.host, address.port)
        for _ in range(metrics_endpoint.MAX_CONNECTIONS)
    ]
    assert "fusionserve_build_info" in await asyncio.to_thread(get, served, "/metrics")
    assert await asyncio.wait_for(silent[0][0].read(), 2) == b""  # the oldest made way
    assert not silent[-1][0].at_eof()
    for _, writer in silent:
        writer.close()
