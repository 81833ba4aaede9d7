"""The book-keeping of the adapter pool: who owns which rank rows. Integers only; `pool.py` holds the tensors.

Capacity is counted in rank rows, so an adapter of rank 8 costs an eighth of one of rank 64. An adapter in use (with at
least one hold) is never evicted or overwritten; idle ones stay until their rows are needed, least recently used first.

Without `copies` a resident is written in the step that first holds it. With them it is copied ahead: placed when it is
first asked for, and held from the round on, which is a step, in which the copy turns out to be done.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum, auto

from fusionserve import metrics
from fusionserve.adapters.resident import Resident
from fusionserve.adapters.side_copies import Copies
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

_MAX_BEGUN = 4  # copies begun in one round: to launch one takes the host a millisecond, and streams wait


class _Copy(Enum):
    """How far a resident's copy is: WANTED, BEGUN, and DONE, from which on a step may read the rows."""

    WANTED = auto()
    BEGUN = auto()
    DONE = auto()


@dataclass(slots=True)
class _Place:
    resident: Resident
    start: int
    copy: _Copy
    num_holds: int = 0

    @property
    def end(self) -> int:
        return self.start + self.resident.num_rows


class PoolLedger:
    """Places adapters in `capacity` rank rows and remembers what must be copied before the next forward pass.

    With `copies` it also remembers what is to be copied beside that.
    """

    def __init__(self, capacity: int, copies: Copies | None = None) -> None:
        self.capacity = capacity
        self._copies = copies
        self._places: OrderedDict[int, _Place] = OrderedDict()  # by uid, least recently used first
        self._changes: list[PoolChange] = []
        self._num_held = 0  # rows
        self._awaited: set[int] = set()  # uids asked for in this round by those who must wait for a copy

    @property
    def num_used(self) -> int:
        """Rank rows that are taken, idle residents included."""
        return sum(place.resident.num_rows for place in self._places.values())

    @property
    def num_held(self) -> int:
        """Rank rows that are in use."""
        return self._num_held

    @property
    def resident_uids(self) -> frozenset[int]:
        """The uids of all that is in the pool."""
        return frozenset(self._places)

    @property
    def is_copying(self) -> bool:
        """True if residents were on their way when the round began, or have been since."""
        return any(place.copy is not _Copy.DONE for place in self._places.values())

    @property
    def has_work(self) -> bool:
        """True if there is something to copy that was not handed out."""
        return bool(self._changes) or any(p.copy is _Copy.WANTED for p in self._places.values())

    def begin_round(self) -> None:
        """Takes note of the copies that are done; their residents may be held from here on."""
        self._awaited.clear()
        for uid, place in self._places.items():
            if place.copy is _Copy.BEGUN and self._copies is not None and self._copies.is_done(uid):
                place.copy = _Copy.DONE

    def hold(self, residents: Sequence[Resident]) -> bool:
        """Makes `residents` resident and holds each once; or, for lack of room, changes nothing and returns False.

        With `copies` it places what is missing and returns False until that is copied. Whoever asks after it in a round
        does not get these rows.
        """
        if not self._bring(residents):
            return False
        places = [self._places[resident.uid] for resident in residents]
        if any(place.copy is not _Copy.DONE for place in places):
            self._awaited.update(resident.uid for resident in residents)
            return False
        for place in places:  # one that is named twice is held twice
            self._num_held += 0 if place.num_holds else place.resident.num_rows
            place.num_holds += 1
        return True

    def needs_no_rows(self, residents: Sequence[Resident], without: Container[int]) -> bool:
        """True if all of `residents` are held and none of their uids is in `without`: holding them takes no rows."""
        held = {uid for uid, place in self._places.items() if place.num_holds > 0 and uid not in without}
        return held.issuperset(resident.uid for resident in residents)

    def to_drain(self, residents: Sequence[Resident]) -> frozenset[int]:
        """The uids of residents, those with the fewest holds, without which all of `residents` fit."""
        wanted = {resident.uid: resident.num_rows for resident in residents}
        others = [place for uid, place in self._places.items() if place.num_holds > 0 and uid not in wanted]
        room = self.capacity - sum(wanted.values()) - sum(place.resident.num_rows for place in others)
        draining = []
        for place in sorted(others, key=lambda place: place.num_holds):
            if room >= 0:
                break
            room += place.resident.num_rows
            draining.append(place.resident.uid)
        return frozenset(draining)

    def bring_ahead(self, residents: Sequence[Resident]) -> bool:
        """Places `residents` before their turn, to be copied ahead; False if there is no room, or no copying ahead.

        Takes free rows, and those of idle residents that nobody has asked for before in this round.
        """
        num_missing = len({resident.uid for resident in residents} - self._places.keys())
        if self._copies is None or not self._bring(residents):
            return False
        self._awaited.update(resident.uid for resident in residents)
        metrics.ADAPTER_PREFETCHES.inc(num_missing)
        return True

    def release(self, residents: Iterable[Resident]) -> None:
        """Ends one hold on each of `residents`."""
        for resident in residents:
            place = self._places[resident.uid]
            assert place.num_holds > 0, f"{resident.name} is released more often than held"
            place.num_holds -= 1
            self._num_held -= 0 if place.num_holds else place.resident.num_rows

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

    def take_copies(self) -> tuple[WriteRows, ...]:
        """What is to be copied ahead once the changes are made, a few at a time, in the order of asking."""
        begun = [place for place in self._places.values() if place.copy is _Copy.WANTED][:_MAX_BEGUN]
        for place in begun:
            place.copy = _Copy.BEGUN
        return tuple(WriteRows(place.resident, place.start) for place in begun)

    def repeat_writes(self) -> None:
        """Has every resident copied again: changes handed out before may not have been carried out."""
        done = [place for place in self._places.values() if place.copy is _Copy.DONE]
        self._changes = [WriteRows(place.resident, place.start) for place in done]
        self.repeat_copies()

    def repeat_copies(self) -> None:
        """Has what is not yet copied copied again: not all that was handed out may have been begun."""
        for place in self._places.values():
            if place.copy is _Copy.BEGUN:
                place.copy = _Copy.WANTED

    def check_integrity(self, num_holds: int | None = None) -> None:
        """Asserts that no rows overlap, and that there are `num_holds` holds in all if given."""
        end = 0
        for place in self._in_order():
            assert place.start >= end, "rank rows overlap"
            end = place.end
        assert end <= self.capacity, "rank rows past the end"
        held = (place.resident.num_rows for place in self._places.values() if place.num_holds > 0)
        assert sum(held) == self._num_held, "rows in use do not add up"
        if num_holds is not None:
            assert sum(place.num_holds for place in self._places.values()) == num_holds, "holds do not add up"

    def _bring(self, residents: Sequence[Resident]) -> bool:
        """Places what is missing of `residents`; or, if it does not fit, changes nothing and returns False."""
        missing = {resident.uid: resident for resident in residents if resident.uid not in self._places}
        needed = sum(resident.num_rows for resident in missing.values())
        if needed > self.capacity - self._num_held:  # as it is for each that waits for a full pool
            return False
        kept = self._awaited.union(resident.uid for resident in residents)
        if needed > self.capacity - self._num_rows_kept(kept):
            return False
        for resident in residents:
            if resident.uid not in missing:
                self._places.move_to_end(resident.uid)
        for resident in missing.values():  # one that is named twice is placed once
            self._place(resident, kept)
        return True

    def _num_rows_kept(self, kept: AbstractSet[int]) -> int:
        """Rows that cannot be evicted as long as those of `kept` are spared."""
        places = (place for uid, place in self._places.items() if not _may_evict(place, uid, kept))
        return sum(place.resident.num_rows for place in places)

    def _place(self, resident: Resident, kept: AbstractSet[int]) -> None:
        start = self._find_gap(resident.num_rows)
        while start is None and self._evict_one(kept):
            start = self._find_gap(resident.num_rows)
        if start is None:
            self._compact()
            start = self._find_gap(resident.num_rows)
        assert start is not None, "room was counted before placing"
        if self._copies is None:
            self._places[resident.uid] = _Place(resident, start, _Copy.DONE)
            self._changes.append(WriteRows(resident, start))
        else:
            self._places[resident.uid] = _Place(resident, start, _Copy.WANTED)

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

    def _evict_one(self, kept: AbstractSet[int]) -> bool:
        for uid, place in self._places.items():
            if _may_evict(place, uid, kept):
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
        """Moves every resident down to close the gaps; one whose copy has not begun leaves nothing to move."""
        start = 0
        for place in self._in_order():
            if place.start != start:
                if place.copy is not _Copy.WANTED:
                    self._changes.append(MoveRows(place.start, start, place.resident.num_rows))
                place.start = start
            start = place.end


def _may_evict(place: _Place, uid: int, kept: AbstractSet[int]) -> bool:
    """Neither what is in use nor what `kept` spares, nor what is on its way: it was asked for a moment ago."""
    return place.num_holds == 0 and place.copy is _Copy.DONE and uid not in kept
