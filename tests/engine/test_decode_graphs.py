"""Which graphs are recorded, kept and given up, over a base that computes nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda, is_replay
from torch import Tensor

from fusionserve.engine import decode_graphs, graph_recorder
from fusionserve.engine.decode_graphs import DecodeGraphs, DecodeStep, GraphSize
from fusionserve.engine.graph_recorder import GraphRecorder
from fusionserve.kernels.paged_sequence import PackedSequence


class Base:
    """A model that may wait for its device in every pass."""

    device, dtype, max_context_tokens = torch.device("cpu"), torch.float32, 64

    def __init__(self, cuda: FakeCuda) -> None:
        self.pool = SimpleNamespace(layout=0)
        self.waits = False
        self._cuda = cuda

    @contextmanager
    def planned(self, plan: object) -> Iterator[None]:
        yield

    def logits(self, ids: Tensor, positions: Tensor, wanted: None, batch: object) -> Tensor:
        if self.waits:
            self._cuda.wait()
        return torch.zeros(len(ids), 5)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    graph_recorder._recording_stream.cache_clear()
    yield FakeCuda(monkeypatch)
    graph_recorder._recording_stream.cache_clear()


@pytest.fixture
def base(cuda: FakeCuda) -> Base:
    return Base(cuda)


@pytest.fixture
def graphs(base: Base) -> DecodeGraphs:
    planner = SimpleNamespace(
        empty_tables=lambda **sizes: SimpleNamespace(tables=None), items_of=lambda tables, width: object()
    )
    graphs = DecodeGraphs(base, {}, planner, block_size=16, trash_block=3)
    graphs._recorder = GraphRecorder()
    return graphs


def test_graphs_without_adapters_outlive_a_move_of_the_pool(graphs: DecodeGraphs, base: Base) -> None:
    graphs.record_base(2)
    adapting = graphs._graph(GraphSize(1, num_items=16))
    plain = [graphs._graph(GraphSize(n)) for n in (1, 2)]
    base.pool.layout += 1
    assert [graphs._graph(GraphSize(n)) for n in (1, 2)] == plain
    assert graphs._graph(GraphSize(1, num_items=16)) is not adapting


def test_memory_of_no_graph_is_not_used_again(graphs: DecodeGraphs, base: Base, cuda: FakeCuda) -> None:
    graphs._graph(GraphSize(1, num_items=16))
    assert cuda.num_pools == 1
    base.pool.layout += 1
    graphs._graph(GraphSize(1, num_items=16))
    assert cuda.num_pools == 2


def test_adapters_graph_that_was_not_used_for_longest_goes_first(
    graphs: DecodeGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graphs, "_MOST_ADAPTING", 2)
    graphs.record_base(1)
    one, two, three = (GraphSize(1, num_items=n) for n in (16, 32, 64))
    for size in (one, two, one, three):
        graphs._graph(size)
    assert list(graphs._graphs) == [GraphSize(1), one, three]


def test_model_that_waits_in_its_pass_is_served_unrecorded(
    graphs: DecodeGraphs, base: Base, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    base.waits = True
    with caplog.at_level(logging.WARNING):
        graphs.record_base(2)
    assert len(caplog.messages) == 1 and "not recorded" in caplog.messages[0]
    assert not any(is_replay(graph.replay) for graph in graphs._graphs.values())
    assert cuda.num_recorded == 0 and cuda.mode == 0
    graph = graphs._graph(GraphSize(2))
    graph.replay()
    assert graph.logits.shape == (2, 5)


def test_block_tables_are_copied_as_far_as_they_are_used(graphs: DecodeGraphs) -> None:
    graph = graphs._graph(GraphSize(4))
    blocks = graph._queries.singles.blocks
    blocks.fill_(-1)
    sequences = [PackedSequence(0, 1, 20, (7, 5)), PackedSequence(1, 2, 3, (6,))]
    graph.fill(DecodeStep([1, 2], sequences, (), ()), None)
    assert blocks.tolist() == [[7, 5, -1, -1], [6, 0, -1, -1], [-1] * 4, [-1] * 4]
    assert graph._queries.singles.tiles.tolist() == [[0, 1, 20, 0], [1, 1, 3, 1], [0] * 4, [0] * 4]


def test_what_a_step_does_not_fill_is_nobodys(graphs: DecodeGraphs) -> None:
    graph = graphs._graph(GraphSize(4))
    nobody = graph._numbers.clone()
    assert nobody.tolist() == [[0] * 4, [0] * 4, [48] * 4]
    full = [PackedSequence(i, i + 1, 20 + i, (7, 5)) for i in range(4)]
    graph.fill(DecodeStep([1, 2, 3, 4], full, (), ()), None)
    graph.fill(DecodeStep([9], [PackedSequence(0, 1, 3, (6,))], (), ()), None)
    assert graph._numbers[:, 0].tolist() == [9, 3, 99] and torch.equal(graph._numbers[:, 1:], nobody[:, 1:])
    assert graph._queries.singles.tiles.tolist() == [[0, 1, 3, 0], [0] * 4, [0] * 4, [0] * 4]
