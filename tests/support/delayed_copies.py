"""Copies beside the steps without a GPU: late, in order, and made only when they are due."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch


class DelayedCopies:
    """A copy is made when it has been asked after `num_questions` times; None is never, but by `finish` or `join`.

    Until then the rows hold what they held: whoever reads them too early gets something else.
    """

    def __init__(self, num_questions: int | None = 2) -> None:
        self.num_questions = num_questions
        self.num_begun = 0
        self.num_joined = 0
        self._numbers = count()
        self._writes: dict[int, Callable[[], None]] = {}  # by number, in the order in which they were begun
        self._last: dict[int, int] = {}  # the number of the last one of each uid
        self._num_asked: dict[int, int] = {}

    def begin(self, uid: int, write: Callable[[], None]) -> None:
        """Keeps the copy for later."""
        number = next(self._numbers)
        self._writes[number] = write
        self._last[uid], self._num_asked[uid] = number, 0
        self.num_begun += 1

    def is_done(self, uid: int) -> bool:
        """Makes the copy, and all before it, if it is due."""
        assert uid in self._last, "a copy is asked after that was never begun"
        self._num_asked[uid] += 1
        if self.num_questions is not None and self._num_asked[uid] > self.num_questions:
            self._make(self._last[uid])
        return self._last[uid] not in self._writes

    def finish(self) -> None:
        """Makes all copies."""
        if self._writes:
            self._make(max(self._writes))

    def join(self) -> None:
        """Makes all copies, as they must be before what waits for them."""
        self.num_joined += bool(self._writes)
        self.finish()

    @property
    def num_under_way(self) -> int:
        """Copies that are not made."""
        return len(self._writes)

    def _make(self, last: int) -> None:
        for number in [number for number in self._writes if number <= last]:
            with torch.inference_mode():
                self._writes.pop(number)()
