"""The book-keeping of the adapter pool: who owns which rank rows. Integers only; `pool.py` holds the tensors.

Capacity is counted in rank rows, so an adapter of rank 8 costs an eighth of one of rank 64. An adapter in use (with at
least one hold) is never evicted or overwritten; idle ones stay until their rows are needed, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusionserve import metrics
from fusionserve.adapters.resident import Resident
from fusionserve.failpoints import reach_failpoint


@dataclass(frozen=True, slots=True)
class WriteRows:
    """Copy the resident's weights to the rows from `start`."""

    resident: Resident
    start: int


@dataclass(frozen=True, slots=True)
class MoveRows:
    """Copy `num_rows` rows from `source` down to `target`; moves are ordered so that none overwrites a later source."""

    source: int
    target: int
    num_rows: int


PoolChange = WriteRows | MoveRows


@dataclass(slots=True)
class _Place:
    resident: Resident
    start: int
    num_holds: int = 0

    @property
    def end(self) -> int:
        return self.start + self.resident.num_rows


class PoolLedger:
    """Places adapters in `capacity` rank rows and remembers what must be copied before the next forward pass."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._places: OrderedDict[int, _Place] = OrderedDict()  # by uid, least recently used first
        self._changes: list[PoolChange] = []

    @property
    def num_used(self) -> int:
        """Rank rows that are taken, idle residents included."""
        return sum(place.resident.num_rows for place in self._places.values())

    @property
    def num_held(self) -> int:
        """Rank rows that cannot be evicted at present."""
        return self._num_rows_kept(set())

    @property
    def resident_uids(self) -> frozenset[int]:
        """The uids of all that is in the pool."""
        return frozenset(self._places)

    def hold(self, residents: Sequence[Resident]) -> bool:
        """Makes `residents` resident and holds each once; or, for lack of room, changes nothing and returns False."""
        missing = {resident.uid: resident for resident in residents if resident.uid not in self._places}
        needed = sum(resident.num_rows for resident in missing.values())
        if needed > self.capacity - self._num_rows_kept({resident.uid for resident in residents}):
            return False
        for resident in residents:  # first, so that making room for one never evicts another
            if resident.uid not in missing:
                self._touch(resident.uid)
        for resident in residents:  # one that is named twice is placed once and held twice
            if resident.uid in missing:
                if resident.uid not in self._places:
                    self._place(resident)
                self._touch(resident.uid)
        return True

    def release(self, residents: Iterable[Resident]) -> None:
        """Ends one hold on each of `residents`."""
        for resident in residents:
            place = self._places[resident.uid]
            assert place.num_holds > 0, f"{resident.name} is released more often than held"
            place.num_holds -= 1

    def forget(self, uid: int) -> None:
        """Frees the rows of a resident that nobody holds; unknown uids are fine."""
        place = self._places.get(uid)
        if place is None:
            return
        assert place.num_holds == 0, f"{place.resident.name} is forgotten while held"
        self._remove(uid)

    def start_of(self, resident: Resident) -> int:
        """First rank row of a resident."""
        return self._places[resident.uid].start

    def take_changes(self) -> tuple[PoolChange, ...]:
        """What must be copied, in order; each change is handed out once."""
        changes = tuple(self._changes)
        self._changes.clear()
        return changes

    def repeat_writes(self) -> None:
        """Has every resident copied again: changes handed out before may not have been carried out."""
        self._changes = [WriteRows(place.resident, place.start) for place in self._places.values()]

    def check_integrity(self, num_holds: int | None = None) -> None:
        """Asserts that no rows overlap, and that there are `num_holds` holds in all if given."""
        end = 0
        for place in self._in_order():
            assert place.start >= end, "rank rows overlap"
            end = place.end
        assert end <= self.capacity, "rank rows past the end"
        if num_holds is not None:
            assert sum(place.num_holds for place in self._places.values()) == num_holds, "holds do not add up"

    def _touch(self, uid: int) -> None:
        self._places[uid].num_holds += 1
        self._places.move_to_end(uid)

    def _num_rows_kept(self, wanted: set[int]) -> int:
        """Rows that cannot be evicted while `wanted` is made resident."""
        kept = (place for uid, place in self._places.items() if place.num_holds > 0 or uid in wanted)
        return sum(place.resident.num_rows for place in kept)

    def _place(self, resident: Resident) -> None:
        start = self._find_gap(resident.num_rows)
        while start is None and self._evict_one():
            start = self._find_gap(resident.num_rows)
        if start is None:
            self._compact()
            start = self._find_gap(resident.num_rows)
        assert start is not None, "room was counted before placing"
        self._places[resident.uid] = _Place(resident, start)
        self._changes.append(WriteRows(resident, start))

    def _find_gap(self, num_rows: int) -> int | None:
        """The lowest start of `num_rows` free rows in a row, so that adapters in use lie close together."""
        start = 0
        for place in self._in_order():
            if place.start - start >= num_rows:
                return start
            start = place.end
        return start if self.capacity - start >= num_rows else None

    def _in_order(self) -> list[_Place]:
        """All places in order; one without rank rows comes before the rows at its start."""
        return sorted(self._places.values(), key=lambda place: (place.start, place.end))

    def _evict_one(self) -> bool:
        for uid, place in self._places.items():
            if place.num_holds == 0:
                reach_failpoint("pool.evict")
                self._remove(uid)
                metrics.ADAPTER_EVICTIONS.labels("device").inc()
                return True
        return False

    def _remove(self, uid: int) -> None:
        """Drops a resident; a write that was not yet handed out goes with it."""
        del self._places[uid]
        self._changes = [c for c in self._changes if not (isinstance(c, WriteRows) and c.resident.uid == uid)]

    def _compact(self) -> None:
        """Moves every resident down to close the gaps."""
        start = 0
        for place in self._in_order():
            if place.start != start:
                self._changes.append(MoveRows(place.start, start, place.resident.num_rows))
                place.start = start
            start = place.end
