"""AdapterService: check, call the engine, translate."""

from __future__ import annotations

from grpc import aio

from fusionserve.server import checks
from fusionserve.server.adapter_message import to_adapter
from fusionserve.server.adapter_page import to_page
from fusionserve.server.engine_gate import EngineGate
from fusionserve.v1 import adapter_pb2 as pb
from fusionserve.v1 import adapter_pb2_grpc


class AdapterServicer(adapter_pb2_grpc.AdapterServiceServicer):
    """The life of adapters; only loading counts as new work, which a draining server refuses."""

    def __init__(self, gate: EngineGate) -> None:
        self._gate = gate

    async def LoadAdapter(
        self,
        request: pb.LoadAdapterRequest,
        context: aio.ServicerContext[pb.LoadAdapterRequest, pb.LoadAdapterResponse],
    ) -> pb.LoadAdapterResponse:
        """The adapter, ready."""
        engine = self._gate.admit()
        checks.check_new_adapter_name("name", request.name, engine.model_info().name)
        path = request.path if request.HasField("path") else None
        if path is not None:
            checks.check_adapter_path("path", path)
        status = await engine.load_adapter(request.name, path, pin=request.pin, replace=request.replace)
        return pb.LoadAdapterResponse(adapter=to_adapter(status))

    async def UnloadAdapter(
        self,
        request: pb.UnloadAdapterRequest,
        context: aio.ServicerContext[pb.UnloadAdapterRequest, pb.UnloadAdapterResponse],
    ) -> pb.UnloadAdapterResponse:
        """The adapter as it was left."""
        engine = self._gate.engine()
        checks.check_adapter_name("name", request.name)
        status = await engine.unload_adapter(request.name, force=request.force)
        return pb.UnloadAdapterResponse(adapter=to_adapter(status))

    async def GetAdapter(
        self,
        request: pb.GetAdapterRequest,
        context: aio.ServicerContext[pb.GetAdapterRequest, pb.GetAdapterResponse],
    ) -> pb.GetAdapterResponse:
        """One adapter."""
        engine = self._gate.engine()
        checks.check_adapter_name("name", request.name)
        return pb.GetAdapterResponse(adapter=to_adapter(await engine.get_adapter(request.name)))

    async def ListAdapters(
        self,
        request: pb.ListAdaptersRequest,
        context: aio.ServicerContext[pb.ListAdaptersRequest, pb.ListAdaptersResponse],
    ) -> pb.ListAdaptersResponse:
        """One page of all adapters."""
        return to_page(request, await self._gate.engine().list_adapters())
