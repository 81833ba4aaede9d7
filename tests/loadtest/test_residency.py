"""Which requests waited for a load, told by versions."""

from load_records import make_record

from fusionserve.loadtest.residency import COLD, JOINED, NONE, WARM, residencies

A1, A2, B1 = ("adapter", "a", 1), ("adapter", "a", 2), ("adapter", "b", 1)
F1 = ("fusion", "f", 1)


def test_the_first_request_on_a_version_has_loaded_it() -> None:
    records = [
        make_record(0, sent_s=1.0, started_s=2.0, parts=(A1,)),
        make_record(1, sent_s=1.5, started_s=1.9, parts=(A1,)),
        make_record(2, sent_s=2.5, started_s=2.6, parts=(A1,)),
        make_record(3, sent_s=0.0, started_s=0.1),
    ]
    assert residencies(records, {}) == {0: COLD, 1: JOINED, 2: WARM, 3: NONE}


def test_what_was_loaded_at_the_start_is_warm() -> None:
    record = make_record(0, started_s=0.1, parts=(A1,))
    assert residencies([record], {("adapter", "a"): 1}) == {0: WARM}
    assert residencies([record], {("fusion", "a"): 1}) == {0: COLD}


def test_a_new_version_after_an_eviction_is_cold_again() -> None:
    records = [
        make_record(0, sent_s=0.0, started_s=0.1, parts=(A1,)),
        make_record(1, sent_s=1.0, started_s=1.1, parts=(A2,)),
    ]
    assert residencies(records, {}) == {0: COLD, 1: COLD}


def test_one_cold_part_makes_a_request_cold() -> None:
    records = [
        make_record(0, sent_s=0.0, started_s=0.1, parts=(A1,)),
        make_record(1, sent_s=1.0, started_s=1.1, parts=(A1, B1)),
        make_record(2, sent_s=2.0, started_s=2.1, parts=(A1, B1, F1)),
        make_record(3, sent_s=3.0, started_s=3.1, parts=(A1, B1, F1)),
    ]
    assert residencies(records, {}) == {0: COLD, 1: COLD, 2: COLD, 3: WARM}
