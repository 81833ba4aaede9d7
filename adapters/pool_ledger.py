"""The book-keeping of the adapter pool: which adapter owns which rank rows. Integers only; `pool.py` holds the tensors.

Capacity is counted in rank rows, so an adapter of rank 8 costs an eighth of one of rank 64. An adapter in use (with at
least one hold) is never evicted or overwritten; idle ones stay until their rows are needed, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusionserve import metrics
from fusionserve.adapters.adapter import Adapter


@dataclass(frozen=True, slots=True)
class WriteRows:
    """Copy the adapter's weights to the rows from `start`."""

    adapter: Adapter
    start: int


@dataclass(frozen=True, slots=True)
class MoveRows:
    """Copy `num_rows` rows from `source` down to `target`; moves are ordered so that none overwrites a later source."""

    source: int
    target: int
    num_rows: int


PoolChange = WriteRows | MoveRows


@dataclass(slots=True)
class _Resident:
    adapter: Adapter
    start: int
    num_holds: int = 0

    @property
    def end(self) -> int:
        return self.start + self.adapter.num_rows


class PoolLedger:
    """Places adapters in `capacity` rank rows and remembers what must be copied before the next forward pass."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._residents: OrderedDict[int, _Resident] = OrderedDict()  # by uid, least recently used first
        self._changes: list[PoolChange] = []

    @property
    def num_used(self) -> int:
        """Rank rows that hold an adapter, idle ones included."""
        return sum(resident.adapter.num_rows for resident in self._residents.values())

    @property
    def resident_uids(self) -> frozenset[int]:
        """The uids of all adapters in the pool."""
        return frozenset(self._residents)

    def hold(self, adapters: Sequence[Adapter]) -> bool:
        """Makes `adapters` resident and holds each once; or, for lack of room, changes nothing and returns False."""
        missing = {adapter.uid: adapter for adapter in adapters if adapter.uid not in self._residents}
        needed = sum(adapter.num_rows for adapter in missing.values())
        if needed > self.capacity - self._num_rows_kept({adapter.uid for adapter in adapters}):
            return False
        for adapter in adapters:  # first, so that making room for one never evicts another
            if adapter.uid not in missing:
                self._touch(adapter.uid)
        for adapter in adapters:  # one that is named twice is placed once and held twice
            if adapter.uid in missing:
                if adapter.uid not in self._residents:
                    self._place(adapter)
                self._touch(adapter.uid)
        return True

    def release(self, adapters: Iterable[Adapter]) -> None:
        """Ends one hold on each of `adapters`."""
        for adapter in adapters:
            resident = self._residents[adapter.uid]
            assert resident.num_holds > 0, f"adapter {adapter.name} is released more often than held"
            resident.num_holds -= 1

    def forget(self, uid: int) -> None:
        """Frees the rows of an adapter that nobody holds; unknown uids are fine."""
        resident = self._residents.get(uid)
        if resident is None:
            return
        assert resident.num_holds == 0, f"adapter {resident.adapter.name} is forgotten while held"
        self._remove(uid)

    def start_of(self, adapter: Adapter) -> int:
        """First rank row of a resident adapter."""
        return self._residents[adapter.uid].start

    def take_changes(self) -> tuple[PoolChange, ...]:
        """What must be copied, in order; each change is handed out once."""
        changes = tuple(self._changes)
        self._changes.clear()
        return changes

    def repeat_writes(self) -> None:
        """Has every resident copied again: changes handed out before may not have been carried out."""
        self._changes = [WriteRows(resident.adapter, resident.start) for resident in self._residents.values()]

    def check_integrity(self, num_holds: int | None = None) -> None:
        """Asserts that no rows overlap, and that there are `num_holds` holds in all if given."""
        end = 0
        for resident in self._in_order():
            assert resident.start >= end, "rank rows overlap"
            end = resident.end
        assert end <= self.capacity, "rank rows past the end"
        if num_holds is not None:
            assert sum(r.num_holds for r in self._residents.values()) == num_holds, "holds do not add up"

    def _touch(self, uid: int) -> None:
        self._residents[uid].num_holds += 1
        self._residents.move_to_end(uid)

    def _num_rows_kept(self, wanted: set[int]) -> int:
        """Rows that cannot be evicted while `wanted` is made resident."""
        kept = (r for uid, r in self._residents.items() if r.num_holds > 0 or uid in wanted)
        return sum(resident.adapter.num_rows for resident in kept)

    def _place(self, adapter: Adapter) -> None:
        start = self._find_gap(adapter.num_rows)
        while start is None and self._evict_one():
            start = self._find_gap(adapter.num_rows)
        if start is None:
            self._compact()
            start = self._find_gap(adapter.num_rows)
        assert start is not None, "room was counted before placing"
        self._residents[adapter.uid] = _Resident(adapter, start)
        self._changes.append(WriteRows(adapter, start))

    def _find_gap(self, num_rows: int) -> int | None:
        """The lowest start of `num_rows` free rows in a row, so that adapters in use lie close together."""
        start = 0
        for resident in self._in_order():
            if resident.start - start >= num_rows:
                return start
            start = resident.end
        return start if self.capacity - start >= num_rows else None

    def _in_order(self) -> list[_Resident]:
        """All residents by their place; one without rank rows comes before the rows at its start."""
        return sorted(self._residents.values(), key=lambda resident: (resident.start, resident.end))

    def _evict_one(self) -> bool:
        for uid, resident in self._residents.items():
            if resident.num_holds == 0:
                self._remove(uid)
                metrics.ADAPTER_EVICTIONS.labels("device").inc()
                return True
        return False

    def _remove(self, uid: int) -> None:
        """Drops a resident; a write that was not yet handed out goes with it."""
        del self._residents[uid]
        self._changes = [c for c in self._changes if not (isinstance(c, WriteRows) and c.adapter.uid == uid)]

    def _compact(self) -> None:
        """Moves every resident down to close the gaps."""
        start = 0
        for resident in self._in_order():
            if resident.start != start:
                self._changes.append(MoveRows(resident.start, start, resident.adapter.num_rows))
                resident.start = start
            start = resident.end
