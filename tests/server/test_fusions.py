"""The life of fusions over gRPC."""

from __future__ import annotations

import pytest
from fake_engine import LOAD_TIME_S, MODEL_NAME
from grpc import aio
from server_fixture import ADAPTERS, Served, handled_total, to_failure

from fusionserve.v1 import adapter_pb2 as pb


async def refused(call: aio.UnaryUnaryCall) -> tuple[str, str]:
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    failure = to_failure(caught.value)
    return failure.code.name, failure.reason


async def test_load_get_unload(served: Served) -> None:
    before = handled_total(ADAPTERS, "LoadFusion", "OK")
    loaded = (await served.adapters.LoadFusion(pb.LoadFusionRequest(name="duo", pin=True))).fusion
    assert loaded.load_time.ToMilliseconds() == LOAD_TIME_S * 1000
    loaded.ClearField("load_time")
    assert loaded == pb.Fusion(
        name="duo",
        version=1,
        digest="duo",
        state=pb.Adapter.STATE_READY,
        residency=pb.Adapter.RESIDENCY_DEVICE,
        members=[pb.FusionMember(name=name, digest=f"digest-of-{name}") for name in ("alpha", "beta")],
        modules=["layers.0.q_proj", "layers.0.v_proj"],
        scope="layer",
        d_key=16,
        member_keys=True,
        value_kind="low_rank",
        temperature=0.5,
        base_member=True,
        pool_ranks=34,
        host_bytes=8192,
        pinned=True,
    )
    assert (await served.adapters.GetFusion(pb.GetFusionRequest(name="duo"))).fusion.name == "duo"
    left = (await served.adapters.UnloadFusion(pb.UnloadFusionRequest(name="duo"))).fusion
    assert left.state == pb.Adapter.STATE_AVAILABLE
    assert not left.HasField("load_time")
    gone = await refused(served.adapters.GetFusion(pb.GetFusionRequest(name="duo")))
    assert gone == ("NOT_FOUND", "FUSION_NOT_FOUND")
    assert handled_total(ADAPTERS, "LoadFusion", "OK") == before + 1


async def test_name_in_use_needs_replace(served: Served) -> None:
    taken = await refused(served.adapters.LoadFusion(pb.LoadFusionRequest(name="mix")))
    assert taken == ("ALREADY_EXISTS", "FUSION_EXISTS")
    request = pb.LoadFusionRequest(name="mix", path="v2/mix", replace=True)
    replaced = (await served.adapters.LoadFusion(request)).fusion
    assert (replaced.version, replaced.digest) == (2, "v2/mix")


async def test_names_and_paths_are_checked(served: Served) -> None:
    stub = served.adapters
    invalid = ("INVALID_ARGUMENT", "FUSION_ID_INVALID")
    assert await refused(stub.LoadFusion(pb.LoadFusionRequest(name=MODEL_NAME))) == invalid
    assert await refused(stub.LoadFusion(pb.LoadFusionRequest(name="other"))) == invalid
    assert await refused(stub.GetFusion(pb.GetFusionRequest(name="../x"))) == invalid
    assert await refused(stub.UnloadFusion(pb.UnloadFusionRequest(name=""))) == invalid
    path = await refused(stub.LoadFusion(pb.LoadFusionRequest(name="duo", path="a/../b")))
    assert path == ("INVALID_ARGUMENT", "FUSION_PATH_INVALID")


async def test_list_goes_page_by_page(served: Served) -> None:
    await served.engine.load_fusion("duo", None, pin=False, replace=False)
    first = await served.adapters.ListFusions(pb.ListFusionsRequest(page_size=1))
    rest = await served.adapters.ListFusions(pb.ListFusionsRequest(page_token=first.next_page_token))
    assert [fusion.name for fusion in (*first.fusions, *rest.fusions)] == ["duo", "mix"]
    assert not rest.next_page_token
    unknown = await refused(served.adapters.ListFusions(pb.ListFusionsRequest(page_token="x")))
    assert unknown == ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID")
    assert not (await served.adapters.GetAdapter(pb.GetAdapterRequest(name="alpha"))).adapter.held_by_fusions
