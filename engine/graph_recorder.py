"""Records what a GPU is given as CUDA graphs, while other threads and the steps launched before go on.

`torch.cuda.graph` would wait for the device and give all free memory back before each recording, and leave the thread
on another stream when one fails. Here a recording only waits, on the device, for what is there to be reused.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch

from fusionserve.kernels.device_waits import refusing_waits
from fusionserve.kernels.torch_errors import is_device_lost, is_out_of_memory


class RecordError(Exception):
    """A function cannot be recorded, for a reason of one line; it can still be called."""


class GraphRecorder:
    """Records graphs that share memory, for as long as one of them is there: memory of none cannot be used again."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        # The same for the first pass and the recording: what a library allocates for a stream, and keeps, is then there
        # before, and not in the graphs' memory.
        self._stream = _recording_stream()
        self._is_checked = False

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Calls the function, and returns what does the same again.

        Raises what the function does when it is called, out of memory, and RecordError if it cannot be recorded.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                function()  # compiles kernels, which cannot be recorded
                with _recording():
                    self._check(function)
                    return self._capture(function)
        finally:
            current.wait_stream(self._stream)

    def _check(self, function: Callable[[], None]) -> None:
        """Raises if the function waits for the device, which a recording forbids: models compute alike in all sizes.

        A recording that fails is harder to get over than a pass that does. Not while serving, for other threads may
        wait for the device.
        """
        if self._is_checked:
            return
        with refusing_waits():
            function()
        self._is_checked = True

    def _capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """The graph's replay. Memory that is kept free for others is given back if there is not enough."""
        with suppress(torch.OutOfMemoryError):
            return _captured(function, self._memory)
        torch.cuda.empty_cache()
        return _captured(function, self._memory)


@contextmanager
def _recording() -> Iterator[None]:
    """Turns what goes wrong into RecordErrors, but for what is wrong with the device."""
    try:
        yield
    except Exception as error:
        if is_device_lost(error) or is_out_of_memory(error):
            raise
        raise RecordError(next(iter(str(error).splitlines()), type(error).__name__)) from error


def _captured(function: Callable[[], None], memory: torch.cuda._POOL_HANDLE) -> Callable[[], None]:
    """What the function gives the current stream, as a graph."""
    graph = torch.cuda.CUDAGraph()
    with _without_collection():
        # Other threads go on meanwhile: one that loads an adapter pins memory, which must not spoil the recording.
        graph.capture_begin(pool=memory, capture_error_mode="thread_local")
        try:
            function()
        except BaseException:
            with suppress(RuntimeError):  # it says no more than that there was one
                graph.capture_end()
            raise
        graph.capture_end()
    return graph.replay


@contextmanager
def _without_collection() -> Iterator[None]:
    """No graph that nobody has any more may be freed during a recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@cache
def _recording_stream() -> torch.cuda.Stream:
    """One for good: libraries keep memory for every stream that they have met."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
