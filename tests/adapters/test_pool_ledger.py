"""Placing, evicting and moving adapters in rank rows, checked by carrying out the changes on a plain list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import pytest
from delayed_copies import DelayedCopies
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from loose_adapters import make_ranked

from fusionserve.adapters.adapter import Adapter
from fusionserve.adapters.pool_ledger import MoveRows, PoolChange, PoolLedger, WriteRows


class Rows:
    """A pool whose rows hold (uid, row of the adapter); what `pool.py` does with tensors."""

    def __init__(self, capacity: int) -> None:
        self.rows: list[tuple[int, int] | None] = [None] * capacity

    def apply(self, changes: Sequence[PoolChange]) -> None:
        for change in changes:
            if isinstance(change, MoveRows):
                assert change.target < change.source, "a move goes down"
                moved = self.rows[change.source : change.source + change.num_rows]
                self.rows[change.target : change.target + change.num_rows] = moved
            else:
                for row in range(change.resident.num_rows):
                    self.rows[change.start + row] = (change.resident.uid, row)

    def assert_holds(self, ledger: PoolLedger, adapters: Sequence[Adapter]) -> None:
        for adapter in adapters:
            start = ledger.start_of(adapter)
            expected = [(adapter.uid, row) for row in range(adapter.num_rows)]
            assert self.rows[start : start + adapter.num_rows] == expected


def test_held_adapters_are_written_once_from_the_lowest_free_row() -> None:
    ledger, a, b = PoolLedger(16), make_ranked(4), make_ranked(8)
    assert ledger.hold([a])
    assert ledger.hold([b, a])
    assert (ledger.start_of(a), ledger.start_of(b), ledger.num_used) == (0, 4, 12)
    assert ledger.take_changes() == (WriteRows(a, 0), WriteRows(b, 4))
    assert ledger.take_changes() == ()
    ledger.check_integrity(3)


def test_released_adapters_stay_until_their_rows_are_needed() -> None:
    ledger, a, b, c = PoolLedger(8), make_ranked(4), make_ranked(4), make_ranked(4)
    for adapter in (a, b):
        assert ledger.hold([adapter])
        ledger.release([adapter])
    ledger.take_changes()
    assert ledger.hold([a])  # so that b is the least recently used
    assert ledger.take_changes() == ()
    ledger.release([a])
    assert ledger.hold([c])
    assert ledger.resident_uids == {a.uid, c.uid}
    assert ledger.take_changes() == (WriteRows(c, 4),)


def test_adapter_in_use_is_not_evicted() -> None:
    ledger, a, b, c = PoolLedger(8), make_ranked(4), make_ranked(4), make_ranked(5)
    assert ledger.hold([a])
    assert ledger.hold([b])
    ledger.release([b])
    ledger.take_changes()
    assert not ledger.hold([c])
    assert ledger.resident_uids == {a.uid, b.uid}, "refusal changes nothing"
    assert ledger.take_changes() == ()
    ledger.check_integrity(1)


def test_blend_does_not_evict_its_own_members() -> None:
    ledger, a, b, c = PoolLedger(12), make_ranked(4), make_ranked(4), make_ranked(8)
    for adapter in (a, b):
        assert ledger.hold([adapter])
        ledger.release([adapter])
    assert ledger.hold([c, a])  # a is the least recently used, and wanted
    assert ledger.resident_uids == {a.uid, c.uid}
    ledger.check_integrity(2)
    assert not ledger.hold([b])


@pytest.mark.parametrize("is_resident", [False, True])
def test_adapter_named_twice_takes_rows_once_and_two_holds(is_resident: bool) -> None:
    ledger, a = PoolLedger(6), make_ranked(4)
    if is_resident:
        assert ledger.hold([a])
        ledger.release([a])
    assert ledger.hold([a, a])
    ledger.check_integrity(2)
    assert ledger.num_used == 4
    ledger.release([a, a])
    ledger.check_integrity(0)


def test_gaps_are_closed_when_no_single_one_is_wide_enough() -> None:
    ledger, rows = PoolLedger(16), Rows(16)
    adapters = [make_ranked(4) for _ in range(4)]
    for adapter in adapters:
        assert ledger.hold([adapter])
    ledger.release([adapters[0], adapters[2]])
    wide = make_ranked(8)
    rows.apply(ledger.take_changes())
    assert ledger.hold([wide])
    changes = ledger.take_changes()
    assert changes == (MoveRows(4, 0, 4), MoveRows(12, 4, 4), WriteRows(wide, 8))
    rows.apply(changes)
    rows.assert_holds(ledger, [adapters[1], adapters[3], wide])


def test_write_not_handed_out_goes_with_its_adapter() -> None:
    ledger, a, b = PoolLedger(4), make_ranked(4), make_ranked(2)
    assert ledger.hold([a])
    ledger.release([a])
    assert ledger.hold([b])
    assert ledger.take_changes() == (WriteRows(b, 0),)


def test_adapter_without_rank_rows_leaves_the_others_in_place() -> None:
    """One that only saves whole modules takes no row, and must not make the rows at its start look free."""
    ledger, rows = PoolLedger(12), Rows(12)
    a, none, b, c = make_ranked(4), make_ranked(0), make_ranked(4), make_ranked(4)
    for adapter in (a, none, b, c):
        assert ledger.hold([adapter])
        ledger.check_integrity()
    rows.apply(ledger.take_changes())
    rows.assert_holds(ledger, [a, none, b, c])
    assert not ledger.hold([make_ranked(1)])
    assert ledger.hold([make_ranked(0)])


def test_forget_frees_rows_and_ignores_strangers() -> None:
    ledger, a = PoolLedger(4), make_ranked(4)
    assert ledger.hold([a])
    with pytest.raises(AssertionError, match="while held"):
        ledger.forget(a.uid)
    ledger.release([a])
    ledger.forget(a.uid)
    ledger.forget(12345)
    assert (ledger.num_used, ledger.take_changes()) == (0, ())


def test_release_without_hold_is_a_bug() -> None:
    ledger, a = PoolLedger(4), make_ranked(4)
    assert ledger.hold([a])
    ledger.release([a])
    with pytest.raises(AssertionError, match="more often"):
        ledger.release([a])


def test_repeat_writes_hands_out_every_resident_again() -> None:
    ledger, rows = PoolLedger(12), Rows(12)
    a, b, c = make_ranked(3), make_ranked(3), make_ranked(8)
    assert ledger.hold([a])
    assert ledger.hold([b])
    ledger.release([a])
    assert ledger.hold([c])
    ledger.take_changes()  # and the step that should carry them out fails
    ledger.repeat_writes()
    rows.apply(ledger.take_changes())
    rows.assert_holds(ledger, [b, c])


@pytest.mark.parametrize("has_begun", [False, True])
def test_gaps_are_closed_under_a_copy_that_is_not_done(has_begun: bool) -> None:
    """Rows that are being filled move when they are full; rows that are to be filled need not."""
    copies, rows = DelayedCopies(None), Rows(16)
    ledger = PoolLedger(16, copies)
    a, b, c, wide = make_ranked(4), make_ranked(4), make_ranked(4), make_ranked(6)

    def begin() -> list[WriteRows]:
        writes = ledger.take_copies()
        for write in writes:
            copies.begin(write.resident.uid, partial(rows.apply, [write]))
        return list(writes)

    assert not ledger.hold([a, b])
    begin()
    copies.finish()
    ledger.begin_round()
    assert ledger.hold([a, b])
    assert not ledger.hold([c])
    if has_begun:
        begin()
    ledger.release([a])
    assert not ledger.hold([wide])
    changes = ledger.take_changes()
    assert changes == (MoveRows(4, 0, 4), *([MoveRows(8, 4, 4)] if has_begun else []))
    copies.join()
    rows.apply(changes)
    assert begin() == [*([] if has_begun else [WriteRows(c, 4)]), WriteRows(wide, 8)]
    copies.finish()
    ledger.begin_round()
    assert ledger.hold([c, wide])
    rows.assert_holds(ledger, [b, c, wide])


def test_copies_are_handed_out_a_few_at_a_time_in_the_order_of_asking() -> None:
    ledger, adapters = PoolLedger(18, DelayedCopies()), [make_ranked(2) for _ in range(9)]
    for adapter in adapters:
        assert not ledger.hold([adapter])
    handed = [[write.resident for write in ledger.take_copies()] for _ in range(4)]
    assert handed == [adapters[:4], adapters[4:8], adapters[8:], []]


class LedgerMachine(RuleBasedStateMachine):
    """Any order of holds, releases and forgets: adapters in use keep their rows, and the changes make them true.

    With copies, what fits may have to wait for them, and no hold is granted before.
    """

    adapters = Bundle("adapters")
    held = Bundle("held")

    @initialize(
        capacity=st.integers(1, 24),
        copies=st.one_of(st.none(), st.builds(DelayedCopies, st.integers(0, 3))),
    )
    def start(self, capacity: int, copies: DelayedCopies | None) -> None:
        self.copies = copies
        self.ledger = PoolLedger(capacity, copies)
        self.rows = Rows(capacity)
        self.holds: Counter[Adapter] = Counter()

    @rule(target=adapters, ranks=st.lists(st.integers(0, 9), min_size=1, max_size=3))
    def load(self, ranks: list[int]) -> object:
        return multiple(*(make_ranked(rank) for rank in ranks))

    @rule(target=held, wanted=st.lists(adapters, min_size=1, max_size=4))
    def hold(self, wanted: list[Adapter]) -> object:
        residents = self.ledger.resident_uids
        in_use = {*self.holds, *wanted}
        fits = sum(adapter.num_rows for adapter in in_use) <= self.ledger.capacity
        is_held = self.ledger.hold(wanted)
        assert is_held == fits or (self.copies is not None and not is_held)
        if not fits:
            assert self.ledger.resident_uids == residents
        if not is_held:
            return multiple()
        self.holds.update(wanted)
        return wanted

    @rule(group=consumes(held))
    def release(self, group: list[Adapter]) -> None:
        self.ledger.release(group)
        self.holds = self.holds - Counter(group)

    @rule(adapter=consumes(adapters))
    def forget(self, adapter: Adapter) -> None:
        if adapter not in self.holds:
            self.ledger.forget(adapter.uid)
            assert adapter.uid not in self.ledger.resident_uids

    @rule(wanted=st.lists(adapters, max_size=2))
    def bring_ahead(self, wanted: list[Adapter]) -> None:
        is_there = self.ledger.bring_ahead(wanted)
        assert not is_there or {adapter.uid for adapter in wanted} <= self.ledger.resident_uids
        assert not is_there or self.copies is not None

    @rule()
    def step(self) -> None:
        self.apply(self.ledger.take_changes())
        self.rows.assert_holds(self.ledger, list(self.holds))
        self.begin(self.ledger.take_copies())
        self.ledger.begin_round()

    @rule()
    def failed_step(self) -> None:
        changes, copies = self.ledger.take_changes(), self.ledger.take_copies()
        self.apply(changes[: len(changes) // 2])
        self.begin(copies[: len(copies) // 2])
        self.ledger.repeat_writes()

    def apply(self, changes: Sequence[PoolChange]) -> None:
        if changes and self.copies is not None:
            self.copies.join()
        self.rows.apply(changes)

    def begin(self, writes: Sequence[WriteRows]) -> None:
        for write in writes:
            assert self.copies is not None
            self.copies.begin(write.resident.uid, partial(self.rows.apply, [write]))

    @invariant()
    def is_consistent(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.check_integrity(self.holds.total())
            assert self.ledger.num_used <= self.ledger.capacity
            assert {adapter.uid for adapter in self.holds} <= self.ledger.resident_uids


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
