"""Bad adapters and fusions through the front door: each is refused for its reason, and nothing else notices."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_artifacts import BadArtifact, bad_artifacts, write_bad
from bad_requests import ADAPTERS
from front_door import HEALTHY, check_form, healthy, in_batches, send
from grpc import aio
from server_process import TIGHT_HEAP, ServerProcess, server_process

from fusionserve.config import EMBEDDED_ADAPTERS, EMBEDDED_FUSIONS
from fusionserve.v1 import adapter_pb2

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[ServerProcess]:
    folders = ("--adapter-dir", str(root), "--adapter-dir", str(EMBEDDED_ADAPTERS))
    fusions = ("--fusion-dir", str(root), "--fusion-dir", str(EMBEDDED_FUSIONS))
    with server_process(*folders, *fusions, heap=TIGHT_HEAP) as server:
        yield server
        server.terminate()
        assert server.wait() == 0


def load(bad: BadArtifact, name: str) -> tuple[str, bytes]:
    """Method and request of a load."""
    if bad.noun == "adapter":
        return ADAPTERS + "LoadAdapter", adapter_pb2.LoadAdapterRequest(name=name).SerializeToString()
    return ADAPTERS + "LoadFusion", adapter_pb2.LoadFusionRequest(name=name).SerializeToString()


def num_descriptors(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def test_names_are_their_own() -> None:
    names = [bad.name for bad in bad_artifacts()]
    assert len(set(names)) == len(names) > 150


async def test_every_bad_artifact_is_refused_for_its_reason(server: ServerProcess, root: Path) -> None:
    cases = [(bad, write_bad(root, number, bad)) for number, bad in enumerate(bad_artifacts())]
    wrong: list[str] = []
    async with aio.insecure_channel(server.grpc) as channel:
        alone = [await healthy(channel, which) for which in range(len(HEALTHY))]
        assert await send(channel, ADAPTERS + "LoadFusion", b"\x0a\x07domains") is None
        descriptors = num_descriptors(server)
        for number, batch in enumerate(in_batches(cases)):
            which = number % len(HEALTHY)
            beside = asyncio.create_task(healthy(channel, which))
            failures = await asyncio.gather(*(send(channel, *load(bad, name)) for bad, name in batch))
            for (bad, _), failure in zip(batch, failures, strict=True):
                if failure is None:
                    wrong.append(f"{bad.name}: loaded")
                    continue
                check_form(bad.name, failure)
                assert str(root) not in failure.text, bad.name
                if (failure.code.name, failure.reason) != (bad.code, bad.reason):
                    wrong.append(
                        f"{bad.name}: {failure.code.name} {failure.reason}, not {bad.reason}: {failure.text}"
                    )
            assert await beside == alone[which], [bad.name for bad, _ in batch]
        assert wrong == [], "\n".join(wrong)
        assert num_descriptors(server) <= descriptors + 1
        listed = await channel.unary_unary(ADAPTERS + "ListAdapters")(
            adapter_pb2.ListAdaptersRequest(page_size=1000).SerializeToString()
        )
        states = adapter_pb2.ListAdaptersResponse.FromString(listed).adapters
        assert {each.name for each in states if each.state == adapter_pb2.Adapter.STATE_READY} == {
            *("changelog", "cpp", "perl", "polish", "spanish")
        }
        assert await grown_bytes(server, channel, cases) < MEBIBYTE


async def grown_bytes(
    server: ServerProcess, channel: aio.Channel, cases: list[tuple[BadArtifact, str]]
) -> int:
    """How much more memory the server holds after five rounds of loads, once it has warmed up."""
    sizes = []
    for _ in range(7):
        for bad, name in cases:
            await send(channel, *load(bad, name))
        sizes.append(server.held_bytes())
    print("KiB held after each round:", [size >> 10 for size in sizes])
    return sizes[-1] - sizes[1]
