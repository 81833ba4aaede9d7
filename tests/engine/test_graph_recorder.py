"""Recording steps: what cannot be recorded is found out, and leaves everything as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from fake_cuda import FakeCuda, accelerator_error, is_replay

from fusionserve.engine import graph_recorder
from fusionserve.engine.graph_recorder import GraphRecorder, RecordError


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    graph_recorder._recording_stream.cache_clear()
    cuda = FakeCuda(monkeypatch)
    yield cuda
    graph_recorder._recording_stream.cache_clear()
    assert cuda.stream.name == "current" and cuda.mode == 0 and cuda.recording is None and gc.isenabled()


def test_function_is_called_before_it_is_recorded(cuda: FakeCuda) -> None:
    calls: list[bool] = []
    recorder = GraphRecorder()
    assert is_replay(recorder.record(lambda: calls.append(cuda.recording is not None)))
    assert calls == [False, False, True]  # to compile, to see whether it waits, and the recording
    recorder.record(lambda: calls.append(cuda.recording is not None))
    assert calls[3:] == [False, True]
    assert cuda.num_emptied == 0


def test_function_that_waits_is_found_out_before_a_recording(cuda: FakeCuda) -> None:
    calls: list[str] = []

    def wait() -> None:
        calls.append("recording" if cuda.recording else "pass")
        cuda.wait()

    with pytest.raises(RecordError, match="synchronizing"):
        GraphRecorder().record(wait)
    assert calls == ["pass", "pass"]


def test_failed_recording_leaves_the_stream(cuda: FakeCuda) -> None:
    recorder = GraphRecorder()
    recorder.record(lambda: None)
    with pytest.raises(RecordError, match="not permitted when stream is capturing"):
        recorder.record(cuda.wait)
    cuda.failure = RuntimeError("the end fails")
    with pytest.raises(RecordError, match="the end fails"):
        recorder.record(lambda: None)
    assert is_replay(recorder.record(lambda: None))


def test_what_the_function_itself_raises_is_its_own(cuda: FakeCuda) -> None:
    with pytest.raises(ZeroDivisionError):
        GraphRecorder().record(lambda: 1 // 0 and None)


def test_lost_device_is_no_reason_to_go_on(cuda: FakeCuda) -> None:
    cuda.failure = accelerator_error(719, "CUDA error: unspecified launch failure")
    with pytest.raises(torch.AcceleratorError):
        GraphRecorder().record(lambda: None)


def test_free_memory_is_given_back_for_a_recording_that_needs_it(cuda: FakeCuda) -> None:
    cuda.failure = torch.OutOfMemoryError("CUDA out of memory")
    assert is_replay(GraphRecorder().record(lambda: None))
    assert cuda.num_emptied == 1
