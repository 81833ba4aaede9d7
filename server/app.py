"""The server's life: bind, load, serve, drain, stop. Everything is wired here."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress

from fusionserve.config import EngineConfig, ServerConfig
from fusionserve.daemon_thread import in_daemon_thread, is_thread_alive
from fusionserve.garbage import spare_from_collection
from fusionserve.metrics import AdapterLabels
from fusionserve.server.engine_facade import EngineFacade
from fusionserve.server.grpc_server import GrpcServer
from fusionserve.server.heap_trimming import heap_trimmed
from fusionserve.server.listen_address import ListenAddress
from fusionserve.server.loop_monitor import loop_measured
from fusionserve.server.metrics_endpoint import MetricsEndpoint
from fusionserve.server.standard_streams import drop_output
from fusionserve.server.stop_signals import StopSignals
from fusionserve.server.watchdog import loop_watched

logger = logging.getLogger(__name__)

LoadEngine = Callable[[EngineConfig, AdapterLabels], EngineFacade]

EXIT_OK = 0
EXIT_ENGINE_FAILED = 1
# After the drain every request has its answer; this is for the answers on their way to slow clients.
STOP_GRACE_S = 2.0
_WORKERS_GRACE_S = 0.5
# For so long a thread that reads an adapter may keep the engine's from going on; Python's own 5 ms are half a step.
_SWITCH_S = 0.0005
METRICS_OFF = "off"
_LOADER = "load-engine"
_ENGINE = "engine"


def serve(engine_config: EngineConfig, server_config: ServerConfig, load_engine: LoadEngine) -> int:
    """Serves until SIGTERM or SIGINT and returns the exit code: 0, or 1 if engine or listener failed.

    Raises StartupError if a port or the model cannot be had.
    """
    return asyncio.run(_run(engine_config, server_config, load_engine))


async def _run(engine_config: EngineConfig, server_config: ServerConfig, load_engine: LoadEngine) -> int:
    async with loop_watched(engine_config.step_timeout_s), loop_measured():
        code = await _serve(engine_config, server_config, load_engine)
        is_at_work = is_thread_alive(_LOADER) or is_thread_alive(_ENGINE) or not await _workers_end()
        if is_thread_alive(_ENGINE):  # it did not stop in its time: it hangs
            code = EXIT_ENGINE_FAILED
    if is_at_work:
        # Told to stop while loading, or hung: native code cannot be interrupted, and crashes if Python ends around it.
        sys.stdout.flush()
        logging.shutdown()
        os._exit(code)
    return code


async def _serve(engine_config: EngineConfig, server_config: ServerConfig, load_engine: LoadEngine) -> int:
    with StopSignals() as signals:
        app = App(server_config, engine_config.max_open_requests)
        try:
            await app.start()
            loading = app.load(functools.partial(load_engine, engine_config))
            if not await _finishes_before(loading, signals.asked):
                return EXIT_OK
            spare_from_collection()
            sys.setswitchinterval(_SWITCH_S)
            _say(f"ready grpc={app.grpc_address} metrics={app.metrics_address}")
            async with loop_watched(engine_config.step_timeout_s), heap_trimmed():
                if await _finishes_before(app.wait_failed(), signals.asked):
                    return EXIT_ENGINE_FAILED
                await _finishes_before(app.drain(), signals.asked_again)
            return EXIT_OK
        finally:
            await app.close(0 if signals.asked_again.is_set() else STOP_GRACE_S)


class App:
    """Both listeners and the engine behind them, which takes `max_open_requests`.

    Making it binds the ports; `close` releases everything.

    Raises StartupError if a port cannot be bound.
    """

    def __init__(self, config: ServerConfig, max_open_requests: int) -> None:
        self._config = config
        self._engine: EngineFacade | None = None
        metrics_listen = _parse_metrics_listen(config.metrics_listen)
        self._grpc = GrpcServer(config, max_open_requests)
        self._metrics = None if metrics_listen is None else MetricsEndpoint(metrics_listen)

    @property
    def grpc_address(self) -> ListenAddress:
        """Where the gRPC listener is bound."""
        return self._grpc.address

    @property
    def metrics_address(self) -> ListenAddress | str:
        """Where the metrics listener is bound, or "off"."""
        return METRICS_OFF if self._metrics is None else self._metrics.address

    async def start(self) -> None:
        """Answers calls: health says NOT_SERVING, generation is refused with STARTING."""
        await self._grpc.start()

    async def load(self, load_engine: Callable[[AdapterLabels], EngineFacade]) -> None:
        """Loads and starts the engine off the event loop, then serves requests."""
        labels = AdapterLabels(self._config.adapter_label_limit)
        self._engine = await in_daemon_thread(_LOADER, lambda: load_engine(labels))
        await self._engine.start()
        self._grpc.gate.open(self._engine)
        self._grpc.health.serve()

    async def wait_failed(self) -> None:
        """Returns when the engine has died, or the listener and then the running requests have ended by themselves.

        Health then says NOT_SERVING and every request is refused.
        """
        assert self._engine is not None, "load comes first"
        engine = asyncio.create_task(self._engine.wait_failed())
        listener = asyncio.create_task(self._grpc.wait_ended())
        try:
            await asyncio.wait((engine, listener), return_when=asyncio.FIRST_COMPLETED)
            if not engine.done():
                logger.error("no more calls are accepted; the server stops once the running ones have ended")
                await self.drain()
                return
            engine.result()
            logger.error("the engine has failed; the server stops")
            self._grpc.gate.fail()
            self._grpc.health.drain()
        finally:
            engine.cancel()
            listener.cancel()

    async def drain(self) -> None:
        """Refuses new requests with DRAINING; returns when the running ones have ended, and the window has."""
        assert self._engine is not None, "load comes first"
        self._grpc.health.drain()
        self._grpc.gate.drain()
        window = asyncio.sleep(self._config.drain_window_s)
        await asyncio.gather(self._engine.drain(self._config.drain_grace_s), window)

    async def close(self, grace_s: float) -> None:
        """Closes the listeners, giving calls `grace_s` to end, and then the engine."""
        await self._grpc.stop(grace_s)
        if self._engine is not None:
            await self._engine.close()
        if self._metrics is not None:
            self._metrics.close()


async def _workers_end() -> bool:
    """Ends the threads that read files for the event loop; False if one still reads after a moment."""
    # Not `wait_for`: that cancels, and what it cancels joins the threads.
    ending = asyncio.ensure_future(asyncio.get_running_loop().shutdown_default_executor())
    await asyncio.wait([ending], timeout=_WORKERS_GRACE_S)
    return ending.done()


def _say(line: str) -> None:
    """Prints it, for whoever started the server, if anybody reads what it prints."""
    try:
        print(line, flush=True)
    except OSError as error:
        drop_output()
        logger.warning("cannot print %r: %s", line, error.strerror)


def _parse_metrics_listen(listen: str) -> ListenAddress | None:
    return None if listen == METRICS_OFF else ListenAddress.parse(listen)


async def _finishes_before(work: Coroutine[None, None, None], event: asyncio.Event) -> bool:
    """True if `work` finishes first, with its exception if it has one; else it is cancelled."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
        return True
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return False
