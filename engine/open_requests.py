"""The requests that are open, from a client's call to its last event, and how many more may come.

Room is shared by dynamic thresholds (Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998): what one
flow, an adapter's requests, may hold is `SHARE` times the room that is left. Alone it gets the configured limit; the
room beyond it, a quarter more, takes in the others while one flow floods the server.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from fusionserve.errors import AlreadyExistsError, CapacityError
from fusionserve.generation import GenerateParams

SHARE = 4
_RETRY_S = 1.0


class SharedRoom:
    """Room for `limit` of something if one flow has it all, and for a quarter more among several."""

    def __init__(self, limit: int, what: str, reason: str) -> None:
        self._limit = limit
        self._what = what
        self._reason = reason
        self._taken: Counter[str] = Counter()

    @property
    def num_taken(self) -> int:
        """What all flows hold."""
        return self._taken.total()

    @contextmanager
    def taking(self, flow: str, amount: int) -> Iterator[None]:
        """Holds `amount` for `flow` in its block. Raises CapacityError if that is more than its share."""
        capacity = self._limit + self._limit / SHARE
        left = capacity - self.num_taken - amount
        if self._taken[flow] + amount > SHARE * left:
            raise self._full(amount)
        self._taken[flow] += amount
        try:
            yield
        finally:
            self._taken[flow] -= amount
            if not self._taken[flow]:
                del self._taken[flow]

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
        with self._requests.taking(params.adaptation.flow, params.num_candidates):
            self._ids.add(key)
            self._idle.clear()
            try:
                yield
            finally:
                self._ids.remove(key)
                if not self._ids:
                    self._idle.set()

    def holding_tokens(self, flow: str, num_tokens: int) -> AbstractContextManager[None]:
        """Counts the tokens a request may come to have. Raises CapacityError (TOKENS_FULL)."""
        return self._tokens.taking(flow, num_tokens)

    async def wait_idle(self) -> None:
        """Returns once no request is open."""
        await self._idle.wait()
