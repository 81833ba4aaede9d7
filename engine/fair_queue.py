"""The waiting requests in fair order, and what every flow has had of the server so far.

A flow is what an adaptation's requests are in together (`Adaptation.flow`). Each has a service: the tokens computed
for it, divided by its weight. Among equal priorities the flow of the least service comes next, so that a flow that
sends little is served as soon as it asks, whatever the others have queued. A flow that begins to wait starts no lower
than the virtual time, which follows the service of those that are served: nobody saves up service while idle, and
nobody pays for what it had of an idle server. That is start-time fair queueing (Goyal, Vin and Cheng, IEEE/ACM
Transactions on Networking 5(5), 1997) with tokens for bits.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from fusionserve.engine.request import Request

DEFAULT_WEIGHT = 1.0

Rank = tuple[int, float]  # (-priority, service): the smaller goes first
_Lane = tuple[int, str]  # (-priority, flow)


@dataclass(slots=True)
class _Flow:
    service: float = 0.0
    num_requests: int = 0  # waiting and running
    num_waiting: int = 0


class FlowService:
    """The service of every flow by name; `weights` of those that do not have 1."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._flows: dict[str, _Flow] = {}
        self._virtual_time = 0.0

    def enter(self, flow: str) -> None:
        """Counts one more request of the flow."""
        self._flows.setdefault(flow, _Flow()).num_requests += 1

    def leave(self, flow: str) -> None:
        """Counts one request less. A flow without requests is remembered while it is ahead of its time."""
        self._flows[flow].num_requests -= 1
        if not any(entry.num_requests for entry in self._flows.values()):
            self._flows, self._virtual_time = {}, 0.0
        elif self._flows[flow].num_requests == 0:
            self._flows = {name: entry for name, entry in self._flows.items() if self._matters(entry)}

    def begin_waiting(self, flow: str) -> None:
        """One more request of the flow waits."""
        entry = self._flows[flow]
        if entry.num_waiting == 0:
            entry.service = max(entry.service, self._virtual_time)
        entry.num_waiting += 1

    def end_waiting(self, flow: str) -> None:
        """One request of the flow waits no longer."""
        self._flows[flow].num_waiting -= 1

    def advance(self) -> None:
        """Moves the virtual time on, before a step's tokens are charged.

        It is at least the least service of the flows that wait; if none does, the most of any, for what nobody waits
        for is nobody's loss.
        """
        waiting = [entry.service for entry in self._flows.values() if entry.num_waiting]
        served = [entry.service for entry in self._flows.values() if entry.num_requests]
        self._virtual_time = max(self._virtual_time, min(waiting) if waiting else max(served, default=0.0))

    def admit(self, flow: str) -> None:
        """It was the flow's turn."""
        self._virtual_time = max(self._virtual_time, self._flows[flow].service)

    def charge(self, flow: str, num_tokens: int) -> None:
        """Adds tokens computed for the flow."""
        self._flows[flow].service += num_tokens / self.weight(flow)

    def refund(self, flow: str, num_tokens: int) -> None:
        """Takes back the charge for tokens that were not computed after all; never while turns are taken."""
        self._flows[flow].service -= num_tokens / self.weight(flow)

    def rank(self, request: Request) -> Rank:
        """Whose turn it is, among requests of any state: the least goes first."""
        return (-request.priority, self._flows[request.flow].service)

    def weight(self, flow: str) -> float:
        """The flow's share, relative to others'."""
        return self._weights.get(flow, DEFAULT_WEIGHT)

    def num_waiting(self, flow: str) -> int:
        """Requests of the flow that wait."""
        return self._flows[flow].num_waiting

    def loads(self, running: Iterable[Request]) -> dict[str, float]:
        """Running requests of each flow, divided by its weight."""
        counts = Counter(request.flow for request in running)
        return {flow: count / self.weight(flow) for flow, count in counts.items()}

    def _matters(self, entry: _Flow) -> bool:
        return entry.num_requests > 0 or entry.service > self._virtual_time


@dataclass(slots=True)
class FairQueue:
    """Requests by priority, then by their flow's service, then in order of arrival."""

    service: FlowService
    _lanes: dict[_Lane, list[Request]] = field(default_factory=dict)  # each sorted by `order`, none empty

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.service.begin_waiting(request.flow)
        lane = self._lanes.setdefault(_lane_of(request), [])
        bisect.insort(lane, request, key=lambda queued: queued.order)

    def remove(self, request: Request) -> None:
        """Takes a queued request out."""
        key = _lane_of(request)
        self._lanes[key].remove(request)
        self.service.end_waiting(request.flow)
        if not self._lanes[key]:
            del self._lanes[key]

    def first(self, num_flows: int = 1) -> list[Request]:
        """The one whose turn it is, if there is one; or of several flows, those whose turn is next, in turn."""
        heads = (lane[0] for lane in self._lanes.values())
        return heapq.nsmallest(num_flows, heads, key=lambda head: (self.service.rank(head), head.order))

    def in_turn(self) -> Iterator[Request]:
        """The requests in the order in which their turn comes, if those handed out before are charged at once.

        The one handed out last may be removed meanwhile, and no other.
        """
        heads = [(self.service.rank(lane[0]), lane[0].order, deque(lane)) for lane in self._lanes.values()]
        heapq.heapify(heads)
        while heads:
            rank, order, lane = heapq.heappop(heads)
            if rank != (charged := self.service.rank(lane[0])):  # services only grow
                heapq.heappush(heads, (charged, order, lane))
                continue
            yield lane.popleft()
            if lane:
                heapq.heappush(heads, (self.service.rank(lane[0]), lane[0].order, lane))

    def __iter__(self) -> Iterator[Request]:
        for lane in self._lanes.values():
            yield from lane

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __contains__(self, request: Request) -> bool:
        return request in self._lanes.get(_lane_of(request), ())


def _lane_of(request: Request) -> _Lane:
    return (-request.priority, request.flow)
