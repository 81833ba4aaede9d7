"""The rendered metrics, rendered anew only as often as the server can afford."""

from __future__ import annotations

import threading
import time

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

_OPEN_METRICS = "application/openmetrics-text"
_LARGEST_SHARE = 0.1  # of a core, whoever scrapes how often: rendering holds the interpreter


class MetricsSnapshot:
    """Thread-safe. A rendering is handed out again until it is ten times as old as the time it took a core."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._bodies: dict[str, tuple[bytes, float]] = {}  # by content type, until when

    def render(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the format that the header `accept` asks for, and its content type."""
        # Of all that a scraper may ask for two formats are kept, so that no header makes for one rendering more.
        encode, content_type = choose_encoder(_OPEN_METRICS if _OPEN_METRICS in accept else "")
        with self._lock:
            body, fresh_until_s = self._bodies.get(content_type, (b"", 0.0))
            now_s = time.monotonic()
            if now_s >= fresh_until_s:
                # Not the time that passes: on a busy machine that is mostly waiting, and the figures would be old.
                started_s = time.thread_time()
                body = encode(self._registry)
                cost_s = time.thread_time() - started_s
                self._bodies[content_type] = body, now_s + cost_s / _LARGEST_SHARE
            return body, content_type
