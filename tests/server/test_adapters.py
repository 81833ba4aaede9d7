"""The life of adapters over gRPC."""

from __future__ import annotations

import pytest
from fake_engine import LOAD_TIME_S, MODEL_NAME
from grpc import aio
from server_fixture import Failure, Served, to_failure

from fusionserve.errors import ArtifactError
from fusionserve.v1 import adapter_pb2 as pb


async def refused(call: aio.UnaryUnaryCall) -> Failure:
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return to_failure(caught.value)


async def test_load_get_unload(served: Served) -> None:
    loaded = (await served.adapters.LoadAdapter(pb.LoadAdapterRequest(name="gamma", pin=True))).adapter
    assert (loaded.name, loaded.version, loaded.pinned) == ("gamma", 1, True)
    again = await served.adapters.LoadAdapter(pb.LoadAdapterRequest(name="gamma", replace=True))
    assert (again.adapter.version, again.adapter.pinned) == (2, True)
    again = await served.adapters.LoadAdapter(pb.LoadAdapterRequest(name="gamma", replace=True, pin=False))
    loaded = again.adapter
    assert (loaded.version, loaded.pinned) == (3, False)
    assert loaded.digest == "gamma"  # the path was left to the engine
    assert loaded.state == pb.Adapter.STATE_READY
    assert loaded.residency == pb.Adapter.RESIDENCY_HOST
    assert list(loaded.target_modules) == ["q_proj", "v_proj"]
    assert loaded.load_time.ToMilliseconds() == LOAD_TIME_S * 1000
    assert (await served.adapters.GetAdapter(pb.GetAdapterRequest(name="gamma"))).adapter == loaded
    left = (await served.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="gamma"))).adapter
    assert left.state == pb.Adapter.STATE_AVAILABLE
    assert not left.HasField("load_time")
    failure = await refused(served.adapters.GetAdapter(pb.GetAdapterRequest(name="gamma")))
    assert (failure.code.name, failure.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")


async def test_name_in_use_needs_replace(served: Served) -> None:
    failure = await refused(served.adapters.LoadAdapter(pb.LoadAdapterRequest(name="alpha")))
    assert (failure.code.name, failure.reason) == ("ALREADY_EXISTS", "ADAPTER_EXISTS")
    request = pb.LoadAdapterRequest(name="alpha", path="v2/alpha", replace=True)
    replaced = (await served.adapters.LoadAdapter(request)).adapter
    assert (replaced.version, replaced.digest) == (2, "v2/alpha")


@pytest.mark.parametrize(
    "name", ["", "../x", "a/../../b", ".", "..", "~", "%2e%2e", "A", "x" * 64, MODEL_NAME, "base", "other"]
)
async def test_impossible_name_is_refused(served: Served, name: str) -> None:
    failure = await refused(served.adapters.LoadAdapter(pb.LoadAdapterRequest(name=name)))
    assert failure.code.name == "INVALID_ARGUMENT"
    assert (failure.field, failure.reason) == ("name", "ADAPTER_ID_INVALID")


@pytest.mark.parametrize("method", ["GetAdapter", "UnloadAdapter"])
async def test_every_method_checks_the_name(served: Served, method: str) -> None:
    for name in ("../x", "other"):
        failure = await refused(getattr(served.adapters, method)(getattr(pb, f"{method}Request")(name=name)))
        assert failure.reason == "ADAPTER_ID_INVALID"


@pytest.mark.parametrize(
    "path", ["", "/etc", "..", "a/../b", "a//b", "./a", "a/", "a\\b", "a\0b", "x" * 1025]
)
async def test_path_out_of_the_roots_is_refused(served: Served, path: str) -> None:
    failure = await refused(served.adapters.LoadAdapter(pb.LoadAdapterRequest(name="gamma", path=path)))
    assert failure.code.name == "INVALID_ARGUMENT"
    assert (failure.field, failure.reason) == ("path", "ADAPTER_PATH_INVALID")


async def test_unusable_artifact_keeps_its_reason(served: Served) -> None:
    served.engine.load_error = ArtifactError("bad", reason="PAIR_MISSING")
    failure = await refused(served.adapters.LoadAdapter(pb.LoadAdapterRequest(name="gamma")))
    assert (failure.code.name, failure.reason) == ("FAILED_PRECONDITION", "PAIR_MISSING")


async def names_by_page(served: Served, **page: int) -> list[list[str]]:
    pages, token = [], ""
    while True:
        request = pb.ListAdaptersRequest(page_token=token, **page)
        response = await served.adapters.ListAdapters(request)
        pages.append([adapter.name for adapter in response.adapters])
        token = response.next_page_token
        if not token:
            return pages


async def load_many(served: Served, count: int) -> list[str]:
    served.engine.adapters.clear()
    for index in range(count):
        await served.engine.load_adapter(f"a{index:04}", None, pin=False, replace=False)
    return sorted(served.engine.adapters)


async def test_list_without_page_size_sends_fifty(served: Served) -> None:
    names = await load_many(served, 101)
    assert await names_by_page(served) == [names[:50], names[50:100], names[100:]]
    assert await names_by_page(served, page_size=0) == [names[:50], names[50:100], names[100:]]


async def test_list_takes_larger_pages_as_a_thousand(served: Served) -> None:
    names = await load_many(served, 1001)
    assert await names_by_page(served, page_size=2**32 - 1) == [names[:1000], names[1000:]]


async def test_list_has_no_empty_last_page(served: Served) -> None:
    names = await load_many(served, 4)
    assert await names_by_page(served, page_size=2) == [names[:2], names[2:]]
    served.engine.adapters.clear()
    assert await names_by_page(served, page_size=2) == [[]]


async def test_list_goes_on_where_it_was_when_adapters_vanish(served: Served) -> None:
    names = await load_many(served, 4)
    first = await served.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=2))
    del served.engine.adapters[names[0]], served.engine.adapters[names[1]]
    rest = await served.adapters.ListAdapters(pb.ListAdaptersRequest(page_token=first.next_page_token))
    assert [adapter.name for adapter in rest.adapters] == names[2:]


@pytest.mark.parametrize("token", ["x", "é", "Li4=", "////", "YQ", "a" * 1000])
async def test_unknown_page_token_is_refused(served: Served, token: str) -> None:
    failure = await refused(served.adapters.ListAdapters(pb.ListAdaptersRequest(page_token=token)))
    assert (failure.field, failure.reason) == ("page_token", "PAGE_TOKEN_INVALID")
