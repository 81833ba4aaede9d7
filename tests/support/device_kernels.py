"""The device on which the tests of `kernels/device` run: without a GPU the CPU, where Triton interprets the kernels."""

from __future__ import annotations

import pytest
import torch
from quick_interpreter import interpret_quickly

from fusionserve.kernels import native_call
from fusionserve.kernels.device import triton_use

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    interpret_quickly()


def serve_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets engines on DEVICE compute with these kernels, as one on a GPU does."""
    monkeypatch.setattr(native_call, "native_library", lambda: None)
    monkeypatch.setattr(triton_use, "INTERPRETS", True)
