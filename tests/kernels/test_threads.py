"""Several threads that call kernels at the same time share one pool of helpers, and may borrow a core of it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusionserve.kernels import threads
from fusionserve.kernels.argmax import argmax
from fusionserve.kernels.native_library import native_library
from fusionserve.kernels.norms import RMSNorm, normalize, reference_normalize
from fusionserve.kernels.threads import borrowed_core

NUM_CALLERS, NUM_CALLS = 6, 200
NUM_ROWS, WIDTH = 64, 1024  # enough to be shared among threads


@pytest.mark.skipif(native_library() is None, reason="there is no native library")
def test_callers_do_not_mix_their_pieces() -> None:
    def call(caller: int) -> list[Tensor]:
        x = torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(caller))
        weight = torch.full((WIDTH,), float(caller + 1))
        expected = reference_normalize(x, RMSNorm(weight, 1e-6))
        found = []
        for _ in range(NUM_CALLS):
            found.append(normalize(x, RMSNorm(weight, 1e-6)) - expected)
            found.append(argmax(x) - x.argmax(-1))
        return found

    with ThreadPoolExecutor(NUM_CALLERS) as callers:
        for differences in callers.map(call, range(NUM_CALLERS)):
            assert max(float(difference.abs().max()) for difference in differences) < 1e-4


# Prints what part of the time the only helper was busy: freely, while its core is lent, and after the loan's end.
HELPED = """
import os, time
from contextlib import nullcontext

import torch

from fusionserve.kernels.native_library import native_library
from fusionserve.kernels.argmax import argmax
from fusionserve.kernels.threads import borrowed_core

torch.set_num_threads(1)
library = native_library()
before = set(os.listdir("/proc/self/task"))
library.set_num_threads(2)
(helper,) = set(os.listdir("/proc/self/task")) - before
x = torch.randn(64, 1024)
expected = x.argmax(-1)

def cpu_s():
    return int(open(f"/proc/self/task/{helper}/schedstat").read().split()[0]) / 1e9

def helped(loan):
    with loan:
        begin_s, begin_cpu_s = time.monotonic(), cpu_s()
        while time.monotonic() < begin_s + 0.4:
            assert torch.equal(argmax(x), expected)
        return (cpu_s() - begin_cpu_s) / 0.4

print(helped(nullcontext()), helped(borrowed_core(60)), helped(borrowed_core(0.1)), helped(nullcontext()))
with borrowed_core(60):
    with borrowed_core(0.1):  # which has waited for its turn so long
        pass
    print(helped(nullcontext()))
"""


@pytest.mark.skipif(native_library() is None, reason="there is no native library")
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not say who computed")
def test_a_lent_core_is_left_alone_until_the_loan_ends() -> None:
    run = subprocess.run(
        [sys.executable, "-P", "-c", HELPED], capture_output=True, text=True, timeout=60, check=True
    )
    free, lent, late, after, lent_twice = map(float, run.stdout.split())
    # A helper gives its core away as it watches, so that it gets little where others are busy.
    assert max(lent, lent_twice) < 0.2 * min(free, late, after), run.stdout


# Asks for threads until no more fit into the address space, and computes with those there are.
CROWDED = """
import resource

import torch

from fusionserve.kernels.argmax import argmax
from fusionserve.kernels.native_library import native_library, set_num_threads

native_library()
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (64 << 20), resource.RLIM_INFINITY))
set_num_threads(1000)
x = torch.randn(8, 1024)
assert argmax(x).tolist() == [row.tolist().index(max(row.tolist())) for row in x]
set_num_threads(2)
"""


@pytest.mark.skipif(native_library() is None, reason="there is no native library")
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the system does not say what memory it has"
)
def test_where_no_more_threads_can_be_had_it_computes_with_fewer() -> None:
    run = subprocess.run([sys.executable, "-P", "-c", CROWDED], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "the system gives no more of the 1000" in run.stderr


@pytest.mark.skipif(native_library() is None, reason="there is no native library")
def test_blocks_that_borrow_a_core_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_turns", threading.Semaphore(1))
    spans: list[tuple[float, float]] = []

    def compute() -> None:
        with borrowed_core(60):
            started_s = time.monotonic()
            time.sleep(0.01)
            spans.append((started_s, time.monotonic()))

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(compute) for _ in range(3)]:
            done.result()
    assert all(begin >= end for (_, end), (begin, _) in pairwise(spans))


@pytest.mark.skipif(native_library() is None, reason="there is no native library")
def test_nobody_waits_for_a_block_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_turns", threading.Semaphore(1))
    hung, begun = threading.Event(), threading.Event()

    def hang() -> None:
        with borrowed_core(0.01):
            begun.set()
            assert hung.wait(60)

    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(hang)
        assert begun.wait(60)
        for _ in range(2):
            with borrowed_core(0.01):
                assert not hanging.done()
        hung.set()
        hanging.result()
    assert threads._turns.acquire(timeout=0), "the turn is given back"
    assert not threads._turns.acquire(timeout=0), "and once"
