"""The life of adapters and of fusions in the API's words: the same calls for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fusionserve.client import responses, results
from fusionserve.v1 import adapter_pb2

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True)
class ArtifactKind(Generic[ItemT]):
    """What is loaded and unloaded: its name in the API and how its snapshots are read."""

    name: str  # Adapter or Fusion
    to_item: Callable[[Any], ItemT]

    def request(self, verb: str, **fields: Any) -> Any:
        """The request of Load, Unload or Get."""
        return getattr(adapter_pb2, f"{verb}{self.name}Request")(**fields)

    def method(self, service: Any, verb: str) -> Any:
        """The call of Load, Unload or Get."""
        return getattr(service, f"{verb}{self.name}")

    def item(self, response: Any) -> ItemT:
        """The snapshot in the answer of Load, Unload or Get."""
        return self.to_item(getattr(response, self.name.lower()))

    def list_request(self) -> Any:
        """The request of the first page of the list."""
        return getattr(adapter_pb2, f"List{self.name}sRequest")()

    def list_method(self, service: Any) -> Any:
        """The call of one page of the list."""
        return getattr(service, f"List{self.name}s")

    def items(self, page: Any) -> list[ItemT]:
        """The snapshots of one page."""
        return [self.to_item(entry) for entry in getattr(page, f"{self.name.lower()}s")]


ADAPTERS: ArtifactKind[results.Adapter] = ArtifactKind("Adapter", responses.to_adapter)
FUSIONS: ArtifactKind[results.Fusion] = ArtifactKind("Fusion", responses.to_fusion)
