"""The Prometheus endpoint: GET /metrics on a listener of its own."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

from prometheus_client import Info, ProcessCollector

from fusionserve import __version__
from fusionserve.metrics import REGISTRY
from fusionserve.server.exposure import tell_of_metrics
from fusionserve.server.listen_address import ListenAddress
from fusionserve.server.memory_collector import MemoryCollector
from fusionserve.server.metrics_snapshot import MetricsSnapshot

logger = logging.getLogger(__name__)

PATH = "/metrics"
# A scraper sends its request and reads the answer at once; one that dawdles must not keep a thread.
CONNECTION_LIMIT_S = 5.0
MAX_CONNECTIONS = 32
_IS_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_POLL_S = 0.05  # how often the listener looks whether it should close, and whose time is over

ProcessCollector(registry=REGISTRY)
REGISTRY.register(MemoryCollector())
Info("fusionserve_build", "The server's version.", registry=REGISTRY).info({"version": __version__})


class MetricsEndpoint:
    """Answers scrapes from its own threads until closed. Raises StartupError if it cannot listen."""

    def __init__(self, address: ListenAddress) -> None:
        self._server = _Server(address)
        self.address = ListenAddress(address.host, self._server.socket.getsockname()[1])
        tell_of_metrics(self.address)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingTCPServer):
    """At most MAX_CONNECTIONS at once, none for longer than CONNECTION_LIMIT_S however it spreads its bytes.

    When all are taken the oldest is cut for a new one: a scrape takes milliseconds, so what is old is no scrape.
    """

    daemon_threads = True

    def __init__(self, address: ListenAddress) -> None:
        super().__init__((address.host, address.port), _Handler, bind_and_activate=False)
        self.socket.close()  # made for IPv4 whatever the host
        self.socket = address.bind()
        self.snapshot = MetricsSnapshot(REGISTRY)
        self._opened: dict[socket.socket, float] = {}  # since when, the oldest first
        self._lock = threading.Lock()
        self.server_activate()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return self.socket.accept()
        except OSError as error:
            if error.errno in _IS_FULL:  # the connection stays in the queue, and would be tried again at once
                time.sleep(_POLL_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._cut(len(self._opened) - MAX_CONNECTIONS + 1)
            self._opened[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        latest_s = time.monotonic() - CONNECTION_LIMIT_S
        with self._lock:
            self._cut(sum(since_s < latest_s for since_s in self._opened.values()))

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._opened.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a metrics connection failed", exc_info=True)

    def _cut(self, num_connections: int) -> None:
        """Wakes the threads of the oldest connections with the end of their stream."""
        for connection in list(self._opened)[: max(num_connections, 0)]:
            del self._opened[connection]
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    timeout = CONNECTION_LIMIT_S
    server: _Server
    server_version = "fusionserve"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != PATH:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        body, content_type = self.server.snapshot.render(self.headers.get("Accept", ""))
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
