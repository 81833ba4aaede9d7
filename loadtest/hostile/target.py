"""The server that hostile clients are let loose on, and the long generation that most of them ask for."""

from __future__ import annotations

from dataclasses import dataclass

from fusionserve.client import GenerateOptions

PROMPT = "The next"
LONG: GenerateOptions = {"temperature": 0.0, "max_new_tokens": 900, "ignore_eos": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a server listens, both HOST:PORT."""

    grpc: str
    metrics: str

    @property
    def grpc_endpoint(self) -> tuple[str, int]:
        """Host and port of gRPC."""
        return _endpoint(self.grpc)

    @property
    def metrics_endpoint(self) -> tuple[str, int]:
        """Host and port of the metrics."""
        return _endpoint(self.metrics)


def _endpoint(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
