"""Which role each method needs, asked of one served fake engine for each caller."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from server_fixture import ADAPTERS, INFERENCE, Served, failure_of, serving_server
from token_files import bearing, write_tokens

from fusionserve.errors import PermissionDeniedError
from fusionserve.server.access import Access
from fusionserve.server.tokens import Role
from fusionserve.v1 import adapter_pb2, inference_pb2

# grpc.aio serves one event loop at a time well.
pytestmark = pytest.mark.asyncio(loop_scope="module")

NEEDED = {
    f"/{INFERENCE}/GetModel": Role.READ,
    f"/{INFERENCE}/Tokenize": Role.READ,
    f"/{INFERENCE}/Detokenize": Role.READ,
    f"/{INFERENCE}/Generate": Role.GENERATE,
    f"/{INFERENCE}/StreamGenerate": Role.GENERATE,
    f"/{ADAPTERS}/GetAdapter": Role.READ,
    f"/{ADAPTERS}/ListAdapters": Role.READ,
    f"/{ADAPTERS}/GetFusion": Role.READ,
    f"/{ADAPTERS}/ListFusions": Role.READ,
    f"/{ADAPTERS}/LoadAdapter": Role.ADMIN,
    f"/{ADAPTERS}/UnloadAdapter": Role.ADMIN,
    f"/{ADAPTERS}/LoadFusion": Role.ADMIN,
    f"/{ADAPTERS}/UnloadFusion": Role.ADMIN,
}
HELD = {"reader": Role.READ, "team-a": Role.GENERATE, "boss": Role.ADMIN}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    tokens = write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.toml")
    async with serving_server(token_file=tokens) as server:
        yield server


def call(served: Served, path: str, metadata: tuple[tuple[str, str], ...]) -> object:
    """A call of the method with an empty message."""
    streams = path.endswith("/StreamGenerate")
    make = served.channel.unary_stream if streams else served.channel.unary_unary
    return make(path)(b"", metadata=metadata)


@pytest.mark.parametrize("who", HELD)
@pytest.mark.parametrize("path", NEEDED, ids=lambda path: path.rpartition("/")[2])
async def test_method_is_refused_without_its_role_and_let_through_to_its_own_checks_with_it(
    served: Served, path: str, who: str
) -> None:
    failure = await failure_of(call(served, path, bearing(who)))
    if HELD[who] >= NEEDED[path]:
        assert failure is None or failure.code.name == "INVALID_ARGUMENT"
    else:
        assert failure is not None
        assert (failure.code.name, failure.reason) == ("PERMISSION_DENIED", "ROLE_REQUIRED")
        assert failure.details["ErrorInfo"].metadata == {"role": NEEDED[path].name.lower()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", NEEDED, ids=lambda path: path.rpartition("/")[2])
async def test_no_method_is_open_to_nobody(served: Served, path: str) -> None:
    failure = await failure_of(call(served, path, ()))
    assert failure is not None
    assert (failure.code.name, failure.reason) == ("UNAUTHENTICATED", "TOKEN_REQUIRED")


async def test_every_method_is_here() -> None:
    services = [
        service
        for file in (inference_pb2.DESCRIPTOR, adapter_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
    ]
    paths = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert paths == NEEDED.keys()


@pytest.mark.parametrize(("who", "is_admitted"), [("reader", False), ("team-a", False), ("boss", True)])
async def test_method_of_no_table_needs_the_highest_role(
    who: str, is_admitted: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    access = Access(write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.toml"))
    path = "/grpc.channelz.v1.Channelz/GetServers"
    if is_admitted:
        assert access.admit(path, bearing(who)).name == who
    else:
        with pytest.raises(PermissionDeniedError) as caught:
            access.admit(path, bearing(who))
        assert caught.value.reason == "ROLE_REQUIRED"
