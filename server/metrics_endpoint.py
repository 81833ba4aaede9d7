"""The Prometheus endpoint: GET /metrics on a listener of its own."""

from __future__ import annotations

import logging
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

from prometheus_client import Info, ProcessCollector
from prometheus_client.exposition import choose_encoder

from fusionserve import __version__
from fusionserve.metrics import REGISTRY
from fusionserve.server.listen_address import ListenAddress

logger = logging.getLogger(__name__)

PATH = "/metrics"
# A scraper sends its request at once; a silent connection must not keep a thread.
REQUEST_TIMEOUT_S = 10.0
_POLL_S = 0.05  # how often the listener looks whether it should close

ProcessCollector(registry=REGISTRY)
Info("fusionserve_build", "The server's version.", registry=REGISTRY).info({"version": __version__})


class MetricsEndpoint:
    """Answers scrapes from its own threads until closed. Raises StartupError if it cannot listen."""

    def __init__(self, address: ListenAddress) -> None:
        self._server = _Server(address)
        self.address = ListenAddress(address.host, self._server.socket.getsockname()[1])
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
    daemon_threads = True

    def __init__(self, address: ListenAddress) -> None:
        super().__init__((address.host, address.port), _Handler, bind_and_activate=False)
        self.socket.close()  # made for IPv4 whatever the host
        self.socket = address.bind()
        self.server_activate()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a metrics connection failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_TIMEOUT_S
    server_version = "fusionserve"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != PATH:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        body = encode(REGISTRY)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
