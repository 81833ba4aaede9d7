"""Calls that may stay open for ever at no cost to their clients, and how many of them the server has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fusionserve.errors import CapacityError

MAX_IDLE_CALLS: Mapping[str, int] = {
    "/grpc.health.v1.Health/Watch": 1024,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": 64,
}  # of all clients together
_RETRY_S = 5.0

Behaviour = Callable[[Any, Any], Awaitable[Any]]


class IdleCalls:
    """Bounds the open calls of the methods in MAX_IDLE_CALLS; others have bounds of their own. On the event loop."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def bounding(self, behaviour: Behaviour, method: str) -> Behaviour:
        """The method's behaviour; beyond the bound it raises CapacityError (TOO_MANY_IDLE_CALLS)."""
        max_open = MAX_IDLE_CALLS.get(method)
        if max_open is None:
            return behaviour

        async def bounded(request: Any, context: Any) -> Any:
            if self._open[method] >= max_open:
                raise CapacityError(
                    "too many calls of this method are open",
                    reason="TOO_MANY_IDLE_CALLS",
                    metadata={"max": str(max_open)},
                    retry_after_s=_RETRY_S,
                )
            self._open[method] += 1
            try:
                return await behaviour(request, context)
            finally:
                self._open[method] -= 1

        return bounded
