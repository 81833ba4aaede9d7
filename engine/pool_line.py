"""Who waits for rows of the adapter pool, and whom they let pass meanwhile: many others, but not for ever."""

from __future__ import annotations

from collections.abc import Iterable

from fusionserve.adapters.pool_ledger import PoolLedger
from fusionserve.engine.request import Request

MOST_OVERTAKES = 64  # requests that may pass one waiting for rows, or for a copy to them


class PoolLine:
    """Gives the waiting requests, asked for in turn, their holds in the pool's ledger.

    Once a request has been overtaken often enough, nobody behind it gets rows that it could have, and the residents in
    use by the fewest are left to drain until it fits. Who needs no rows, or those of residents that stay, goes on.
    """

    def __init__(self, ledger: PoolLedger) -> None:
        self._ledger = ledger
        self._num_overtakes: dict[Request, int] = {}
        self._overtaken: list[Request] = []  # so far, in this pass through the queue
        self._draining: frozenset[int] | None = None  # once somebody has been overtaken often enough

    def begin_pass(self) -> None:
        """From here on it is asked from the head of the queue again."""
        self._overtaken, self._draining = [], None

    def hold(self, request: Request) -> bool:
        """Holds what the request needs in the pool; False if it waits and lets others pass."""
        residents = request.generation.adaptation.residents
        if self._draining is not None and not self._ledger.needs_no_rows(residents, self._draining):
            return False
        if self._ledger.hold(residents):
            return True
        self._overtaken.append(request)
        self._drain_for(request)
        return False

    def note_admitted(self, request: Request) -> None:
        """The request has passed those before it that wait."""
        self.forget(request)
        if self._draining is not None:
            return
        for waiting in self._overtaken:
            self._num_overtakes[waiting] = self._num_overtakes.get(waiting, 0) + 1
        for waiting in self._overtaken:
            self._drain_for(waiting)

    def forget(self, request: Request) -> None:
        """It waits no more."""
        self._num_overtakes.pop(request, None)

    def check_integrity(self, waiting: Iterable[Request]) -> None:
        """Asserts that it counts for none but those of `waiting`."""
        assert self._num_overtakes.keys() <= set(waiting), "the pool's line counts for one that waits no more"

    def _drain_for(self, request: Request) -> None:
        """The first in turn that has been overtaken often enough."""
        if self._draining is None and self._num_overtakes.get(request, 0) >= MOST_OVERTAKES:
            self._draining = self._ledger.to_drain(request.generation.adaptation.residents)
