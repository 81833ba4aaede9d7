"""Placing, evicting and moving adapters in rank rows, checked by carrying out the changes on a plain list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
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
    ledger, rows = PoolLedger(12), Rows(12)
    adapters = [make_ranked(3) for _ in range(4)]
    for adapter in adapters:
        assert ledger.hold([adapter])
    ledger.release([adapters[0], adapters[2]])
    wide = make_ranked(6)
    rows.apply(ledger.take_changes())
    assert ledger.hold([wide])
    changes = ledger.take_changes()
    assert changes == (MoveRows(3, 0, 3), MoveRows(9, 3, 3), WriteRows(wide, 6))
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


class LedgerMachine(RuleBasedStateMachine):
    """Any order of holds, releases and forgets: adapters in use keep their rows, and the changes make them true."""

    adapters = Bundle("adapters")
    held = Bundle("held")

    @initialize(capacity=st.integers(1, 24))
    def start(self, capacity: int) -> None:
        self.ledger = PoolLedger(capacity)
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
        assert self.ledger.hold(wanted) == fits
        if not fits:
            assert self.ledger.resident_uids == residents
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

    @rule()
    def step(self) -> None:
        self.rows.apply(self.ledger.take_changes())
        self.rows.assert_holds(self.ledger, list(self.holds))

    @rule()
    def failed_step(self) -> None:
        changes = self.ledger.take_changes()
        self.rows.apply(changes[: len(changes) // 2])
        self.ledger.repeat_writes()

    @invariant()
    def is_consistent(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.check_integrity(self.holds.total())
            assert self.ledger.num_used <= self.ledger.capacity
            assert {adapter.uid for adapter in self.holds} <= self.ledger.resident_uids


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
