"""The requests that are open, from a client's call to its last event, and how many more may come.

Room is shared by dynamic thresholds (Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998): what one
party may hold is `SHARE` times the room that is left. The parties are tenants, and in what is a tenant's its flows, an
adapter's requests each. A flow alone gets the configured limit; a quarter more takes in the tenant's other flows while
one floods the server, and a quarter more of that the other tenants, however many flows a tenant makes up.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from typing import TypeVar

from fusionserve import metrics
from fusionserve.errors import AlreadyExistsError, CapacityError
from fusionserve.generation import GenerateParams

SHARE = 4
_RETRY_S = 1.0

K = TypeVar("K")


class SharedRoom:
    """Room for `limit` of something if one flow has it all, and for more among several flows and tenants."""

    def __init__(self, limit: int, what: str, reason: str) -> None:
        self._limit = limit
        self._what = what
        self._reason = reason
        self._capacity = limit * Fraction(SHARE + 1, SHARE) ** 2
        self._by_tenant: Counter[str] = Counter()
        self._by_flow: Counter[tuple[str, str]] = Counter()

    @property
    def num_taken(self) -> int:
        """What all tenants hold."""
        return self._by_tenant.total()

    @contextmanager
    def taking(self, tenant: str, flow: str, amount: int) -> Iterator[None]:
        """Holds `amount` for the tenant's `flow` in its block. Raises CapacityError if that is more than its share."""
        left = _share_of(self._capacity - self.num_taken, self._by_tenant[tenant])
        if amount > _share_of(left, self._by_flow[tenant, flow]):
            raise self._full(amount)
        self._by_tenant[tenant] += amount
        self._by_flow[tenant, flow] += amount
        try:
            yield
        finally:
            _take_off(self._by_tenant, tenant, amount)
            _take_off(self._by_flow, (tenant, flow), amount)

    def _full(self, amount: int) -> CapacityError:
        if amount > self._limit:  # waiting would not help
            return CapacityError(
                f"the request alone takes {amount} {self._what}, the server takes {self._limit} at once",
                reason=self._reason,
                metadata={"max": str(self._limit)},
            )
        return CapacityError(
            f"too many {self._what} are waiting", reason=self._reason, retry_after_s=_RETRY_S
        )


def _share_of(left: Fraction, taken: int) -> Fraction:
    """What may still be taken of `left` by who has `taken` so far: all it has is then SHARE times what is left."""
    return (SHARE * left - taken) / (SHARE + 1)


def _take_off(held: Counter[K], key: K, amount: int) -> None:
    held[key] -= amount
    if not held[key]:
        del held[key]


class OpenRequests:
    """Counts open requests, so that limits, duplicate ids and draining see them. Used on the event loop only."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._requests = SharedRoom(max_requests, "requests", "QUEUE_FULL")
        self._tokens = SharedRoom(max_tokens, "tokens", "TOKENS_FULL")
        self._ids: set[tuple[str, str]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_empty(self) -> bool:
        """True if no request is open."""
        return not self._ids

    @contextmanager
    def opened(self, params: GenerateParams) -> Iterator[None]:
        """The request is open in its block.

        Raises AlreadyExistsError if its tenant has one of this id, CapacityError (QUEUE_FULL) if too many are open.
        """
        key = (params.tenant, params.request_id)
        if key in self._ids:
            raise AlreadyExistsError(
                "a request with this id is in flight",
                reason="REQUEST_ID_IN_USE",
                metadata={"request_id": params.request_id},
            )
        with self._requests.taking(params.tenant, params.adaptation.flow, params.num_candidates):
            self._ids.add(key)
            self._idle.clear()
            metrics.REQUESTS_OPEN.inc()
            try:
                yield
            finally:
                self._ids.remove(key)
                metrics.REQUESTS_OPEN.dec()
                if not self._ids:
                    self._idle.set()

    def holding_tokens(self, params: GenerateParams, num_tokens: int) -> AbstractContextManager[None]:
        """Counts the tokens that the request may come to have. Raises CapacityError (TOKENS_FULL)."""
        return self._tokens.taking(params.tenant, params.adaptation.flow, num_tokens)

    async def wait_idle(self) -> None:
        """Returns once no request is open."""
        await self._idle.wait()
