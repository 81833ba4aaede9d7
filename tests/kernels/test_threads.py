"""Several threads that call kernels at the same time share one pool of helpers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fusionserve.kernels.native_library import native_library
from fusionserve.kernels.pointwise import RMSNorm, argmax, reference_rms_norm, rms_norm

NUM_CALLERS, NUM_CALLS = 6, 200
NUM_ROWS, WIDTH = 64, 1024  # enough to be shared among threads


@pytest.mark.skipif(native_library() is None, reason="there is no native library")
def test_callers_do_not_mix_their_pieces() -> None:
    def call(caller: int) -> list[Tensor]:
        x = torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(caller))
        weight = torch.full((WIDTH,), float(caller + 1))
        expected = reference_rms_norm(x, RMSNorm(weight, 1e-6))
        found = []
        for _ in range(NUM_CALLS):
            found.append(rms_norm(x, RMSNorm(weight, 1e-6)) - expected)
            found.append(argmax(x) - x.argmax(-1))
        return found

    with ThreadPoolExecutor(NUM_CALLERS) as callers:
        for differences in callers.map(call, range(NUM_CALLERS)):
            assert max(float(difference.abs().max()) for difference in differences) < 1e-4
