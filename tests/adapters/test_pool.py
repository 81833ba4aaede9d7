"""The pool's tensors after the ledger's changes: every resident's rows, padded with zeros, and nothing else."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from delayed_copies import DelayedCopies
from loose_adapters import (
    D_IN,
    D_OUT,
    EMBEDDING,
    FIRST,
    SECOND,
    VOCAB,
    make_adapter,
    make_content,
    make_lora,
    make_modules,
)
from pinned_memory import pin_rows
from torch import Tensor

from fusionserve import failpoints
from fusionserve.adapters.adapter import Adapter
from fusionserve.adapters.lora_weights import ModuleLoRA
from fusionserve.adapters.pool import AdapterPool
from fusionserve.adapters.pool_ledger import MoveRows, PoolLedger, WriteRows
from fusionserve.adapters.side_copies import CopyError, SideStream
from fusionserve.config import EngineConfig
from fusionserve.kernels.rank_panels import has_panels
from fusionserve.kernels.segments import Addition, Additions, Segment, Segments


def make_pool(capacity: int = 16, dtype: torch.dtype = torch.float32) -> AdapterPool:
    return AdapterPool(make_modules(), capacity, dtype=dtype, device=torch.device("cpu"))


def make_two_module_adapter(seed: int, first: int, second: int, *, bias: bool = False) -> Adapter:
    """Different ranks in the two modules; 0 leaves a module alone."""
    ranks = {FIRST: first, SECOND: second}
    loras = {path: make_lora(rank, seed=seed, bias=bias) for path, rank in ranks.items() if rank}
    return make_adapter(make_content(loras))


def assert_resident(pool: AdapterPool, adapter: Adapter, start: int) -> None:
    """The adapter's rows are in every module, zeros where its rank is smaller than its most."""
    for path in (FIRST, SECOND):
        rows, lora = pool.rows(path), adapter.weights.modules.get(path)
        if rows.is_empty:
            assert lora is None
            continue
        end = start + adapter.num_rows
        rank = 0 if lora is None else lora.rank
        if lora is not None:
            bias = torch.zeros(rank) if lora.shrink_bias is None else lora.shrink_bias
            assert torch.equal(rows.shrink_rows[start : start + rank].cpu(), lora.shrink)
            assert torch.equal(rows.expand_rows[start : start + rank].cpu(), lora.expand)
            assert torch.equal(rows.shrink_bias[start : start + rank].cpu(), bias)
        for tensor in (rows.shrink_rows, rows.expand_rows, rows.shrink_bias):
            assert tensor[start + rank : end].count_nonzero() == 0


def test_module_gets_tensors_with_its_first_adapter() -> None:
    pool = make_pool()
    assert pool.nbytes == 0
    rows = pool.rows(FIRST)
    pool.apply((WriteRows(make_two_module_adapter(1, 3, 0), 2),))
    assert not rows.is_empty
    assert pool.rows(FIRST) is rows
    assert pool.rows(SECOND).is_empty
    assert pool.rows(EMBEDDING).is_empty
    assert pool.nbytes == 16 * (D_IN + D_OUT + 1) * 4


def test_embedding_rows_are_as_wide_as_the_vocabulary() -> None:
    pool = make_pool()
    lora = make_lora(2, seed=1, d_in=VOCAB, d_out=D_IN)
    pool.apply((WriteRows(make_adapter(make_content({EMBEDDING: lora})), 0),))
    assert pool.rows(EMBEDDING).shrink_rows.shape == (16, VOCAB)
    assert torch.equal(pool.rows(EMBEDDING).expand_rows[:2], lora.expand)


def test_rows_of_a_wider_predecessor_are_wiped() -> None:
    pool = make_pool()
    wide = make_two_module_adapter(1, 8, 8, bias=True)
    pool.apply((WriteRows(wide, 0),))
    for successor in (make_two_module_adapter(2, 1, 6), make_two_module_adapter(3, 6, 0)):
        pool.apply((WriteRows(successor, 0),))
        assert_resident(pool, successor, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_predecessor_are_wiped_in_modules_that_a_resident_leaves_alone(dtype: torch.dtype) -> None:
    pool = make_pool(dtype=dtype)
    pool.apply((WriteRows(make_two_module_adapter(1, 6, 6), 2),))
    pool.apply((WriteRows(make_two_module_adapter(2, 4, 0), 2),))
    rows = pool.rows(SECOND)
    for tensor in (rows.shrink_rows, rows.expand_rows):
        assert tensor[2:6].count_nonzero() == 0 and tensor[6:8].count_nonzero() > 0


def test_neighbours_are_left_alone() -> None:
    pool = make_pool()
    a, b, c = (make_two_module_adapter(seed, 4, 3, bias=True) for seed in (1, 2, 3))
    pool.apply((WriteRows(a, 0), WriteRows(b, 8), WriteRows(c, 4)))
    for adapter, start in ((a, 0), (b, 8), (c, 4)):
        assert_resident(pool, adapter, start)


def test_overlapping_move_keeps_every_row() -> None:
    pool = make_pool()
    adapter = make_two_module_adapter(1, 8, 5, bias=True)
    pool.apply((WriteRows(adapter, 3), MoveRows(3, 1, 8)))
    assert_resident(pool, adapter, 1)


def test_weights_are_kept_in_the_pools_dtype() -> None:
    pool = make_pool(dtype=torch.bfloat16)
    adapter = make_two_module_adapter(1, 2, 2, bias=True)
    pool.apply((WriteRows(adapter, 0),))
    rows, lora = pool.rows(FIRST), adapter.weights.modules[FIRST]
    assert rows.shrink_rows.dtype == torch.bfloat16
    expected = lora.shrink.bfloat16()
    if has_panels(6, expected):  # a block of two rows, pair of inputs by pair
        expected = expected.view(2, 3, 2).transpose(0, 1).reshape(2, 6)
    assert torch.equal(rows.shrink_rows[:2], expected)


def test_random_traffic_keeps_every_resident_true() -> None:
    """The ledger decides, the pool obeys: after each step all held adapters are where the ledger says."""
    chance = random.Random(0)
    ledger, pool = PoolLedger(20), make_pool(20)
    adapters = [
        make_two_module_adapter(seed, chance.randint(1, 6), chance.randint(0, 6), bias=seed % 3 == 0)
        for seed in range(12)
    ]
    held: list[Adapter] = []
    num_moves = 0
    for _ in range(450):
        wanted = chance.choice(adapters)
        if ledger.hold([wanted]):
            held.append(wanted)
        while held and (chance.random() < 0.5 or len(held) > 4):
            ledger.release([held.pop(chance.randrange(len(held)))])
        changes = ledger.take_changes()
        num_moves += sum(isinstance(change, MoveRows) for change in changes)
        pool.apply(changes)
        for adapter in adapters:
            if adapter.uid in ledger.resident_uids:
                assert_resident(pool, adapter, ledger.start_of(adapter))
        ledger.check_integrity(len(held))
    assert num_moves > 10, "the traffic is too tame"


def test_rows_that_lie_as_kernels_take_them_add_what_the_adapter_says() -> None:
    """Odd ranks and even, a rank that differs by module, and moves over one another."""
    d_in, d_out = 64, 37
    modules = make_modules(d_in, d_out)
    pool = AdapterPool(modules, 120, dtype=torch.bfloat16, device=torch.device("cpu"))
    ranks, starts = {"a": (3, 37), "b": (40, 1), "c": (16, 0)}, {"a": 0, "b": 38, "c": 78}
    adapters = {
        name: make_adapter(
            make_content(
                {
                    path: make_lora(rank, seed=rank, d_in=d_in, d_out=d_out, bias=name == "b")
                    for path, rank in zip((FIRST, SECOND), of_modules, strict=True)
                    if rank
                }
            )
        )
        for name, of_modules in ranks.items()
    }
    pool.apply(tuple(WriteRows(adapter, starts[name] + 10) for name, adapter in adapters.items()))
    pool.apply(tuple(MoveRows(starts[n] + 10, starts[n], a.num_rows) for n, a in adapters.items()))
    x = torch.randn(3, d_in, generator=torch.Generator().manual_seed(0)).bfloat16()
    segments = [
        Segment(token, token + 1, starts[n], starts[n] + a.num_rows, a.num_rows, torch.ones(1, a.num_rows))
        for token, (n, a) in enumerate(adapters.items())
    ]
    for path in (FIRST, SECOND):
        y = torch.zeros(3, d_out, dtype=torch.bfloat16)
        Segments(segments, x).add_(x, Additions([Addition({0: pool.rows(path).part})]), [y])
        for token, adapter in enumerate(adapters.values()):
            lora = adapter.weights.modules.get(path)
            expected = torch.zeros(d_out) if lora is None else _delta(x[token].float(), lora)
            torch.testing.assert_close(y[token].float(), expected, rtol=0.05, atol=0.5)


def test_pool_of_an_odd_size_gets_a_row_more() -> None:
    """So that an adapter fits whose rank is all of it: kernels take rows by twos."""
    config = EngineConfig(model="m", model_name="m", adapter_pool_ranks=5)
    adapter = make_two_module_adapter(1, 5, 3)
    assert config.adapter_pool_ranks == adapter.num_rows == 6
    assert PoolLedger(config.adapter_pool_ranks).hold([adapter])


def _delta(x: Tensor, lora: ModuleLoRA) -> Tensor:
    """(A x + a) B of the weights as the pool rounds them."""
    shrink, expand = lora.shrink.bfloat16().float(), lora.expand.bfloat16().float()
    bias = 0 if lora.shrink_bias is None else lora.shrink_bias.bfloat16().float()
    return (x @ shrink.T + bias) @ expand


def test_copies_ahead_reach_the_rows_when_they_are_due_and_not_before() -> None:
    """The modules are made ready at once: what computes meanwhile must find them so."""
    pool, copies = make_pool(), DelayedCopies(None)
    pool.copies = copies
    a, b = make_two_module_adapter(1, 4, 3, bias=True), make_two_module_adapter(2, 5, 0)
    pool.copy_ahead((WriteRows(a, 0), WriteRows(b, 4)))
    rows = pool.rows(FIRST)
    assert not rows.is_empty and not rows.shrink_rows.any() and rows.part.bias is not None
    layout = pool.layout
    copies.finish()
    assert pool.layout == layout
    assert_resident(pool, a, 0)
    assert_resident(pool, b, 4)


def test_changes_wait_for_the_copies_under_way() -> None:
    pool, copies = make_pool(), DelayedCopies(None)
    pool.copies = copies
    a, b = make_two_module_adapter(1, 4, 3), make_two_module_adapter(2, 4, 4)
    pool.copy_ahead((WriteRows(a, 4),))
    pool.apply(())
    assert copies.num_under_way == 1, "nothing to wait for"
    pool.apply((MoveRows(4, 0, 4), WriteRows(b, 4)))
    assert copies.num_under_way == 0
    assert_resident(pool, a, 0)
    assert_resident(pool, b, 4)


def test_copy_that_cannot_begin_is_told_with_its_adapter_and_the_rest_is_left() -> None:
    pool, copies = make_pool(), DelayedCopies(None)
    pool.copies = copies
    a, b, c = (make_two_module_adapter(seed, 4, 4) for seed in (1, 2, 3))
    full = RuntimeError("the device is full")
    _fail_at(copies, b.uid, full)
    with pytest.raises(CopyError) as caught:
        pool.copy_ahead((WriteRows(a, 0), WriteRows(b, 4), WriteRows(c, 8)))
    assert caught.value.resident is b and caught.value.__cause__ is full
    assert copies.num_begun == 1


def test_adapter_that_cannot_be_written_is_told_and_what_comes_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = make_pool()
    a, b, c = (make_two_module_adapter(seed, 4, 4) for seed in (1, 2, 3))
    monkeypatch.setattr(failpoints, "_ARMED", failpoints.parse_failpoints("pool.activate=1+1*memory"))
    with pytest.raises(CopyError) as caught:
        pool.apply((WriteRows(a, 0), WriteRows(b, 4), WriteRows(c, 8)))
    assert caught.value.resident is b and isinstance(caught.value.__cause__, MemoryError)
    assert_resident(pool, a, 0)
    assert not pool.rows(FIRST).shrink_rows[4:].any()


def test_lost_device_is_no_adapters_fault() -> None:
    pool, copies = make_pool(), DelayedCopies(None)
    pool.copies = copies
    a = make_two_module_adapter(1, 4, 4)
    _fail_at(copies, a.uid, torch.AcceleratorError("gone"))
    with pytest.raises(torch.AcceleratorError):
        pool.copy_ahead((WriteRows(a, 0),))


def test_memory_is_got_beforehand_and_once() -> None:
    """On other threads at once, as when several adapters load; what is written there stays."""
    pool = make_pool()
    a = make_two_module_adapter(1, first=3, second=0)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: pool.prepare([FIRST]), range(8)))
    assert pool.rows(FIRST).is_empty and pool.rows(FIRST).layout == 0, "nothing changes under a running step"
    address = pool.rows(FIRST).memory()[0].data_ptr()
    pool.apply((WriteRows(a, 4),))
    pool.prepare([FIRST, SECOND])
    assert pool.rows(FIRST).shrink_rows.data_ptr() == address
    assert_resident(pool, a, 4)
    assert pool.rows(SECOND).is_empty


def _fail_at(copies: DelayedCopies, uid: int, error: Exception) -> None:
    begin = copies.begin

    def failing(begun: int, write: Callable[[], None]) -> None:
        if begun == uid:
            raise error
        begin(begun, write)

    copies.begin = failing  # type: ignore[method-assign]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a stream beside another needs a GPU")
def test_side_stream_copies_while_the_current_stream_is_busy() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    pool = AdapterPool(make_modules(), 16, dtype=torch.float32, device=device)
    assert isinstance(pool.copies, SideStream)
    loras = {path: pin_rows(make_lora(rank, seed=1, bias=True)) for path, rank in ((FIRST, 8), (SECOND, 5))}
    a = make_adapter(make_content(loras))
    pool.copy_ahead((WriteRows(a, 3),))
    torch.cuda._sleep(200_000_000)  # cycles, some 100 ms, of the current stream
    end_s = time.monotonic() + 10
    while not pool.copies.is_done(a.uid):
        assert time.monotonic() < end_s
    assert not torch.cuda.current_stream().query(), "it waited for what was computed after it"
    pool.apply((MoveRows(3, 1, 8),))
    torch.cuda.synchronize()
    assert_resident(pool, a, 1)
