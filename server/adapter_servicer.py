"""AdapterService: check, call the engine, translate."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from grpc import aio

from fusionserve.adapter_status import AdapterStatus
from fusionserve.errors import HeldByFusionsError
from fusionserve.server import checks
from fusionserve.server.access import caller
from fusionserve.server.adapter_message import to_adapter
from fusionserve.server.adapter_page import to_page
from fusionserve.server.engine_gate import EngineGate
from fusionserve.server.fusion_message import to_fusion
from fusionserve.v1 import adapter_pb2 as pb
from fusionserve.v1 import adapter_pb2_grpc

StatusT = TypeVar("StatusT")


class AdapterServicer(adapter_pb2_grpc.AdapterServiceServicer):
    """The life of adapters and fusions that the caller may use; a list has no others.

    Only loading counts as new work, which a draining server refuses.
    """

    def __init__(self, gate: EngineGate) -> None:
        self._gate = gate

    async def LoadAdapter(
        self,
        request: pb.LoadAdapterRequest,
        context: aio.ServicerContext[pb.LoadAdapterRequest, pb.LoadAdapterResponse],
    ) -> pb.LoadAdapterResponse:
        """The adapter, ready."""
        engine = self._gate.admit()
        status = await _load(engine.load_adapter, request, engine.model_info().name, "adapter")
        return pb.LoadAdapterResponse(adapter=_to_message(status))

    async def UnloadAdapter(
        self,
        request: pb.UnloadAdapterRequest,
        context: aio.ServicerContext[pb.UnloadAdapterRequest, pb.UnloadAdapterResponse],
    ) -> pb.UnloadAdapterResponse:
        """The adapter as it was left."""
        engine = self._gate.engine()
        checks.check_name("name", request.name)
        caller().check_name(request.name, "adapter")
        try:
            status = await engine.unload_adapter(request.name, force=request.force)
        except HeldByFusionsError as error:
            raise error.naming(caller().may_use) from None
        return pb.UnloadAdapterResponse(adapter=_to_message(status))

    async def GetAdapter(
        self,
        request: pb.GetAdapterRequest,
        context: aio.ServicerContext[pb.GetAdapterRequest, pb.GetAdapterResponse],
    ) -> pb.GetAdapterResponse:
        """One adapter."""
        engine = self._gate.engine()
        checks.check_name("name", request.name)
        caller().check_name(request.name, "adapter")
        return pb.GetAdapterResponse(adapter=_to_message(await engine.get_adapter(request.name)))

    async def ListAdapters(
        self,
        request: pb.ListAdaptersRequest,
        context: aio.ServicerContext[pb.ListAdaptersRequest, pb.ListAdaptersResponse],
    ) -> pb.ListAdaptersResponse:
        """One page of all adapters."""
        statuses = await self._gate.engine().list_adapters()
        page, token = to_page(request, [status for status in statuses if caller().may_use(status.name)])
        return pb.ListAdaptersResponse(adapters=map(_to_message, page), next_page_token=token)

    async def LoadFusion(
        self,
        request: pb.LoadFusionRequest,
        context: aio.ServicerContext[pb.LoadFusionRequest, pb.LoadFusionResponse],
    ) -> pb.LoadFusionResponse:
        """The fusion, ready."""
        engine = self._gate.admit()
        status = await _load(engine.load_fusion, request, engine.model_info().name, "fusion")
        return pb.LoadFusionResponse(fusion=to_fusion(status))

    async def UnloadFusion(
        self,
        request: pb.UnloadFusionRequest,
        context: aio.ServicerContext[pb.UnloadFusionRequest, pb.UnloadFusionResponse],
    ) -> pb.UnloadFusionResponse:
        """The fusion as it was left."""
        engine = self._gate.engine()
        checks.check_name("name", request.name, "fusion")
        caller().check_name(request.name, "fusion")
        status = await engine.unload_fusion(request.name, force=request.force)
        return pb.UnloadFusionResponse(fusion=to_fusion(status))

    async def GetFusion(
        self,
        request: pb.GetFusionRequest,
        context: aio.ServicerContext[pb.GetFusionRequest, pb.GetFusionResponse],
    ) -> pb.GetFusionResponse:
        """One fusion."""
        engine = self._gate.engine()
        checks.check_name("name", request.name, "fusion")
        caller().check_name(request.name, "fusion")
        return pb.GetFusionResponse(fusion=to_fusion(await engine.get_fusion(request.name)))

    async def ListFusions(
        self,
        request: pb.ListFusionsRequest,
        context: aio.ServicerContext[pb.ListFusionsRequest, pb.ListFusionsResponse],
    ) -> pb.ListFusionsResponse:
        """One page of all fusions."""
        statuses = await self._gate.engine().list_fusions()
        page, token = to_page(request, [status for status in statuses if caller().may_use(status.name)])
        return pb.ListFusionsResponse(fusions=map(to_fusion, page), next_page_token=token)


def _to_message(status: AdapterStatus) -> pb.Adapter:
    """The status without fusions that the caller may not use."""
    fusions = filter(caller().may_use, status.held_by_fusions)
    return to_adapter(replace(status, held_by_fusions=tuple(fusions)))


async def _load(
    load: Callable[..., Awaitable[StatusT]],
    request: pb.LoadAdapterRequest | pb.LoadFusionRequest,
    model_name: str,
    what: str,
) -> StatusT:
    """What the engine's `load` returns for the request. Raises what it does, and for a bad request before."""
    path = _checked_path(request, model_name, what)
    return await load(
        request.name,
        path,
        pin=request.pin if request.HasField("pin") else None,
        replace=request.replace,
        digest=_checked_digest(request),
        tenant=caller().name,
    )


def _checked_path(
    request: pb.LoadAdapterRequest | pb.LoadFusionRequest, model_name: str, what: str
) -> str | None:
    """The path of a request to load, if it brings one; its first folder must be one that the caller may name, too.

    Raises InvalidRequestError and PermissionDeniedError for the name or the path.
    """
    checks.check_new_name("name", request.name, model_name, what)
    caller().check_name(request.name, what)
    if not request.HasField("path"):
        return None
    checks.check_path("path", request.path, what)
    caller().check_name(request.path.partition("/")[0], what)
    return request.path


def _checked_digest(request: pb.LoadAdapterRequest | pb.LoadFusionRequest) -> str | None:
    """The digest of a request to load, if it brings one. Raises InvalidRequestError."""
    if not request.HasField("sha256"):
        return None
    checks.check_digest("sha256", request.sha256)
    return request.sha256
