"""What `torch.cuda` has for recording graphs, without a GPU: functions run at once, and the calls are written down."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch


class FakeStream:
    """Waits for nothing."""

    def __init__(self, name: str = "recording") -> None:
        self.name = name

    def wait_stream(self, other: FakeStream) -> None: ...


class FakeCuda:
    """Streams, graphs and modes. A wait is refused in a recording, and where the mode says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream = FakeStream("current")
        self.mode: int | str = 0
        self.recording: FakeGraph | None = None
        self.num_emptied = 0
        self.num_recorded = 0
        self.num_pools = 0
        self.failure: Exception | None = None  # of the next end of a recording
        replaced = {
            "Stream": FakeStream,
            "stream": self._stream,
            "current_stream": lambda device=None: self.stream,
            "graph_pool_handle": self._new_pool,
            "CUDAGraph": lambda: FakeGraph(self),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "empty_cache": self._empty_cache,
            "synchronize": lambda *_: pytest.fail("the device is waited for"),
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def wait(self) -> None:
        """What `.item()` does on a GPU."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.recording is not None:
            self.recording.is_spoilt = True
            raise accelerator_error(900, "CUDA error: operation not permitted when stream is capturing")

    def _new_pool(self) -> tuple[int, int]:
        self.num_pools += 1
        return (0, self.num_pools)

    def _empty_cache(self) -> None:
        assert self.recording is None
        self.num_emptied += 1

    @contextmanager
    def _stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before


class FakeGraph:
    """Remembers nothing: replaying is for a GPU."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.is_spoilt = False

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        assert self._cuda.recording is None and self._cuda.stream.name == "recording"
        assert capture_error_mode == "thread_local" and not gc.isenabled()
        self._cuda.recording = self

    def capture_end(self) -> None:
        assert self._cuda.recording is self and not gc.isenabled()
        self._cuda.recording = None
        if self.is_spoilt:
            raise accelerator_error(
                901, "CUDA error: operation failed due to a previous error during capture"
            )
        failure, self._cuda.failure = self._cuda.failure, None
        if failure is not None:
            raise failure
        self._cuda.num_recorded += 1

    def replay(self) -> None: ...


def accelerator_error(code: int, text: str) -> torch.AcceleratorError:
    """As torch raises it."""
    error = torch.AcceleratorError(text)
    error.error_code = code
    return error


def is_replay(function: Callable[[], None]) -> bool:
    """True for what replays a graph."""
    return isinstance(getattr(function, "__self__", None), FakeGraph)
