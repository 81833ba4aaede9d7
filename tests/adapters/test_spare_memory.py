"""Memory that is given out again, and never while somebody holds a tensor in it."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fusionserve.adapters import spare_memory
from fusionserve.adapters.spare_memory import SpareMemory

SIZE = 10_000


@pytest.fixture
def spare(monkeypatch: pytest.MonkeyPatch) -> SpareMemory:
    monkeypatch.setattr(spare_memory, "_PAUSE_S", 0.0)
    return SpareMemory(2 * SIZE)


def test_memory_that_is_let_go_is_given_out_again(spare: SpareMemory) -> None:
    first = spare.take(SIZE)
    address = first.data_ptr()
    assert (first.dtype, first.shape, spare.kept_bytes) == (torch.uint8, (SIZE,), 0)
    del first
    assert spare.kept_bytes == SIZE
    assert spare.take(SIZE).data_ptr() == address


def test_a_view_holds_it(spare: SpareMemory) -> None:
    """Of any kind: modules of an adapter are strided, in its own type."""
    view = spare.take(SIZE).view(torch.bfloat16).as_strided((3, 5), (5, 1), 7).fill_(1.5)
    assert spare.kept_bytes == 0
    spare.take(SIZE).zero_()
    assert torch.equal(view, torch.full((3, 5), 1.5, dtype=torch.bfloat16))


def test_only_one_piece_is_kept(spare: SpareMemory) -> None:
    pieces = [spare.take(SIZE) for _ in range(3)]
    pieces.clear()
    assert spare.kept_bytes == SIZE


def test_another_size_is_not_kept(spare: SpareMemory) -> None:
    """It follows the adapters that are loaded now."""
    small, large = spare.take(SIZE), spare.take(SIZE + 1)
    del small
    assert spare.kept_bytes == 0
    del large
    assert spare.kept_bytes == SIZE + 1
    assert len(spare.take(SIZE)) == SIZE
    assert spare.kept_bytes == SIZE


def test_nothing_larger_than_the_bound_is_kept(spare: SpareMemory) -> None:
    spare.take(2 * SIZE + 1)
    spare.refill_soon()
    time.sleep(0.05)
    assert spare.kept_bytes == 0


def test_no_bytes_are_given_and_kept(spare: SpareMemory) -> None:
    assert spare.take(0).numel() == 0
    spare.refill_soon()
    time.sleep(0.05)
    assert spare.kept_bytes == 0


def test_a_piece_is_got_ahead(spare: SpareMemory) -> None:
    held = spare.take(SIZE)
    spare.refill_soon()
    deadline_s = time.monotonic() + 10
    while spare.kept_bytes < SIZE:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    assert spare.take(SIZE).data_ptr() != held.data_ptr()


def test_no_memory_left_is_a_memory_error(spare: SpareMemory) -> None:
    with pytest.raises(MemoryError):
        spare.take(1 << 60)
    spare.refill_soon()  # gives up in silence


def test_many_threads_never_share_a_piece(spare: SpareMemory) -> None:
    def take_and_look(number: int) -> bool:
        draw = random.Random(number)
        for _ in range(200):
            piece = spare.take(SIZE).fill_(number)
            if draw.random() < 0.2:
                spare.refill_soon()
            time.sleep(draw.random() * 1e-4)
            if not bool((piece == number).all()):
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(take_and_look, range(8)))
