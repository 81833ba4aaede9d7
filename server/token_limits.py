"""How often the callers of one name may call, and how much they may have open."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fusionserve.errors import CapacityError
from fusionserve.server.tokens import Token

_BUSY_RETRY_S = 1.0


class TokenLimits:
    """Rate and concurrency by token name. Used on the event loop only."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._buckets: dict[str, _Bucket] = {}
        self._open: Counter[str] = Counter()

    def count_call(self, token: Token) -> None:
        """Takes one call of the token's rate. Raises CapacityError (RATE_LIMITED) with the time until the next."""
        if math.isinf(token.rate):
            return
        bucket = self._buckets.setdefault(token.name, _Bucket(self._now_s()))
        wait_s = bucket.take(token.rate, token.burst or max(1, math.ceil(token.rate)), self._now_s())
        if wait_s > 0:
            raise CapacityError(
                f"this token may call {token.rate:g} times a second",
                reason="RATE_LIMITED",
                retry_after_s=wait_s,
            )

    @contextmanager
    def open_generation(self, token: Token) -> Iterator[None]:
        """One generation is open in the block. Raises CapacityError (TOO_MANY_REQUESTS)."""
        if token.concurrency is not None and self._open[token.name] >= token.concurrency:
            raise CapacityError(
                f"this token may have {token.concurrency} generations open",
                reason="TOO_MANY_REQUESTS",
                retry_after_s=_BUSY_RETRY_S,
            )
        self._open[token.name] += 1
        try:
            yield
        finally:
            self._open[token.name] -= 1


class _Bucket:
    """A token bucket: full at first, refilled at the rate, never over the burst."""

    def __init__(self, now_s: float) -> None:
        self._level = math.inf  # the first look cuts it to the burst
        self._seen_s = now_s

    def take(self, rate: float, burst: int, now_s: float) -> float:
        """Takes one and returns 0, or returns the seconds until there is one."""
        self._level = min(float(burst), self._level + (now_s - self._seen_s) * rate)
        self._seen_s = now_s
        if self._level < 1:
            return (1 - self._level) / rate
        self._level -= 1
        return 0.0
